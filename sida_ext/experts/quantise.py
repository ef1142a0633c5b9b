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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor

__all__ = ["GROUP", "Quantised", "QuantisedType", "is_quantised", "quantise", "quantize_rows"]

QuantisedType = Literal["int8", "int4", "mxfp4"]
# Columns that share a factor.
GROUP = 32
# The value of each 4-bit code.
INT4 = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float32)
# Groups that are rounded together: their numbers stay in the cache.
_GROUPS_AT_ONCE = 4096
# What the factor that maps a group's largest value to the end of the range is multiplied with in the search for the
# least squared error: a smaller one rounds the many finer and cuts the largest off.
_INT4_TRIES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)


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
        table = INT4 if self.dtype == "int4" else E2M1
        codes = torch.stack([self.values & 15, self.values >> 4], -1).flatten(-2).long()
        scale = self.scale.float() if self.dtype == "int4" else _powers_of_two(self.scale)
        return (table[codes] * scale.repeat_interleave(GROUP, -1))[..., : self.columns]


def _powers_of_two(exponents: Tensor) -> Tensor:
    # Through float64, as torch's float32 powers lose the denormal 2 ** -127.
    powers = torch.ldexp(torch.ones((), dtype=torch.float64), exponents.double() - 127)
    return torch.where(exponents == 255, torch.nan, powers).float()


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


# Below, groups lie in columns, [32, groups]: sums over a group then run over whole vectors.


def _int4_values(groups: Tensor, scale: Tensor) -> Tensor:
    """The integers nearest to ``groups / scale``; a factor of 0 gives 0."""
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return torch.mul(groups, inverse).round_().clamp_(-8, 7)


def _e2m1_values(groups: Tensor, scale: Tensor) -> Tensor:
    """The values of e2m1 nearest to ``groups / scale``, a power of two; at a tie the one with an even mantissa."""
    quotient = groups / scale
    magnitude = quotient.abs()
    # Neighbours lie 0.5 apart below 2, 1 below 4 and 2 beyond.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (magnitude.div_(step).round_().mul_(step).clamp_(max=6)).copysign_(quotient)


def _least_error(
    groups: Tensor, importance: Tensor | None, tries: list[Tensor], values: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Of the factors in ``tries``, for each group the one with the least squared error."""
    best, least = tries[0], torch.full_like(tries[0], torch.inf)
    for scale in tries:
        error = values(groups, scale).mul_(scale).sub_(groups).square_()
        total = (error if importance is None else error.mul_(importance)).sum(0)
        better = total < least
        best, least = torch.where(better, scale, best), torch.where(better, total, least)
    return best


def _quantise_int4(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(0), groups.amax(0)
    end = torch.where(-low > high, low, high)
    # A negative factor puts a positive end at -8, where the range is longest.
    tries = [(end / -8 * factor).half().float() for factor in _INT4_TRIES]
    if not bool(torch.isfinite(tries[0]).all()):
        raise ValueError(f"a weight is {end.abs().max().item():g}, expected at most {8 * 65504} for int4")
    scale = _least_error(groups, importance, tries, _int4_values)
    # The factor that is best for these values, and the values that are best for it.
    values = _int4_values(groups, scale)
    weighted = values if importance is None else values * importance
    size = (weighted * values).sum(0)
    fitted = torch.where(size > 0, (weighted * groups).sum(0) / size, scale).half().float()
    fitted = torch.where(torch.isfinite(fitted), fitted, scale)
    scale = _least_error(groups, importance, [scale, fitted], _int4_values)
    return _int4_values(groups, scale).to(torch.int8).view(torch.uint8) & 15, scale.half()


def _quantise_mxfp4(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    largest = groups.abs().amax(0)
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 3, 0).clamp_(-126, 126)
    # Largest values between 4 and 8: no square can underflow.
    groups = torch.ldexp(groups, -exponent)
    tries = [torch.full_like(largest, factor) for factor in (1.0, 2.0, 0.5)]
    scale = _least_error(groups, importance, tries, _e2m1_values)
    values = _e2m1_values(groups, scale)
    size = values.abs()
    codes = torch.where(size <= 2, 2 * size, torch.where(size <= 4, size + 2, 7)).to(torch.uint8)
    power = exponent + torch.log2(scale).int()
    return codes | (torch.signbit(values).to(torch.uint8) << 3), (power + 127).to(torch.uint8)


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
    padding = (0, groups * GROUP - columns)
    flat = torch.nn.functional.pad(weight, padding).reshape(-1, GROUP)
    weights = None
    if importance is not None:
        weights = torch.nn.functional.pad(importance.float(), padding).reshape(groups, GROUP)
        weights = weights.repeat(flat.shape[0] // groups, 1)
    of_groups = _quantise_int4 if dtype == "int4" else _quantise_mxfp4
    values = torch.empty(flat.shape[0], GROUP // 2, dtype=torch.uint8)
    scale = torch.empty(flat.shape[0], dtype=torch.float16 if dtype == "int4" else torch.uint8)
    for begin in range(0, flat.shape[0], _GROUPS_AT_ONCE):
        part = slice(begin, begin + _GROUPS_AT_ONCE)
        weighted = None if weights is None else weights[part].t().contiguous()
        codes, scale[part] = of_groups(flat[part].float().t().contiguous(), weighted)
        values[part] = (codes[::2] | (codes[1::2] << 4)).t()
    rows = weight.shape[:-1]
    return Quantised(values.view(*rows, groups * GROUP // 2), scale.view(*rows, groups), columns)
