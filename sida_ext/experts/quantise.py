"""Weights in fewer bits: int8 by rows, int4 and mxfp4 by groups of 32 columns, as the kernels take them.

* ``int8``: one float32 factor for each row, values from -127 to 127.
* ``int4``: one float16 factor for each group, values from -8 to 7 in two's complement: 4.5 bits a weight.
* ``mxfp4``: one power of two for each group (a byte e: ``2 ** (e - 127)``), values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
  negatives: 4.25 bits a weight (OCP Microscaling Formats 1.0). The layout within a row is that of GPT-OSS's
  ``*_blocks`` and ``*_scales``, which are kept bit for bit: ``blocks.flatten(-2)``.

Two 4-bit values lie in a byte, that of the even column in its low half; a row whose columns are no multiple of 32 is
padded with zeros. The type of the factors tells which format bytes hold: float16 int4, uint8 mxfp4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor

from sida_ext._load import _C

__all__ = ["GROUP", "Quantised", "QuantisedType", "is_quantised", "quantise", "quantize_rows"]

QuantisedType = Literal["int8", "int4", "mxfp4"]
# Columns that share a factor.
GROUP = 32


def is_quantised(dtype: str) -> TypeGuard[QuantisedType]:
    return dtype in get_args(QuantisedType)


@dataclass(frozen=True)
class Quantised:
    """A matrix in one of the formats above.

    Attributes:
        values: int8 [..., rows, columns], else uint8 [..., rows, 16 * ceil(columns / 32)].
        scale: int8: float32 [..., rows]; int4: float16, mxfp4: uint8 [..., rows, ceil(columns / 32)].
        columns: of the matrix.
    """

    values: Tensor
    scale: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., rows, columns]."""
        return (*self.values.shape[:-1], self.columns)

    @property
    def dtype(self) -> QuantisedType:
        if self.values.dtype == torch.int8:
            return "int8"
        return "int4" if self.scale.dtype == torch.float16 else "mxfp4"

    def dequantise(self) -> Tensor:
        """The stored weights as float32 [..., rows, columns]: exactly what the kernels multiply with."""
        if self.dtype == "int8":
            return self.values.float() * self.scale[..., None]
        out = torch.empty(self.shape, dtype=torch.float32)
        rows = math.prod(self.shape[:-1])
        values, scale = self.values.contiguous().numpy(), self.scale.contiguous().numpy()
        _C.expand_groups(self.dtype, rows, self.columns, values, scale, out.numpy())
        return out


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one factor for each row: ``weight ~ q * scale[:, None]``, ``|q| <= 127``.

    Args:
        weight: [..., rows, columns] floating point, finite.

    Returns:
        q [..., rows, columns] int8 and scale [..., rows] float32 (1 for a row of zeros).
    """
    exact = weight.float()
    largest = exact.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return torch.round(exact / scale[..., None]).clamp_(-127, 127).to(torch.int8), scale


def quantise(weight: Tensor, dtype: QuantisedType, importance: Tensor | None = None) -> Quantised:
    """Round a matrix to ``dtype``; factors give each group the least squared error (int8: hold a row's largest value).

    Args:
        weight: [..., rows, columns] floating point, finite.
        dtype: ``"int8"``, ``"int4"`` or ``"mxfp4"``.
        importance: [columns], what a column's squared errors count; for int4 and mxfp4.

    Raises:
        ValueError: another dtype; a weight that is not finite or too large for the format.
    """
    if not is_quantised(dtype):
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(get_args(QuantisedType))}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds NaN or infinity, expected finite numbers")
    columns = weight.shape[-1]
    if dtype == "int8":
        return Quantised(*quantize_rows(weight), columns)
    groups = -(-columns // GROUP)
    flat = weight.detach().float().reshape(-1, columns).contiguous()
    rows = flat.shape[0]
    if dtype == "int4" and rows and not bool(torch.isfinite((flat.abs().amax() / 8).half())):
        raise ValueError(f"a weight is {flat.abs().max().item():g}, expected at most {8 * 65504} for int4")
    values = torch.empty(rows, groups * GROUP // 2, dtype=torch.uint8)
    scale = torch.empty(rows, groups, dtype=torch.float16 if dtype == "int4" else torch.uint8)
    counts = None if importance is None else importance.float().contiguous().numpy()
    _C.round_groups(dtype, rows, columns, flat.numpy(), counts, values.numpy(), scale.numpy())
    leading = weight.shape[:-1]
    return Quantised(values.view(*leading, groups * GROUP // 2), scale.view(*leading, groups), columns)
