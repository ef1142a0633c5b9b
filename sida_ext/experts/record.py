"""A record of the expert store as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sida_ext.experts.store import DTYPES, StoreHeader

__all__ = ["StoredExpert", "stored_expert"]


@dataclass(frozen=True)
class StoredExpert:
    """One expert as it is stored; views of the record's memory.

    Attributes:
        wi: [rows, d_model] in the store's dtype; wo: [d_model, d_ff].
        wi_scale, wo_scale: float32, one factor for each row; int8 only.
        wi_bias, wo_bias: float32; biased experts only.
    """

    wi: Tensor
    wo: Tensor
    wi_scale: Tensor | None
    wo_scale: Tensor | None
    wi_bias: Tensor | None
    wo_bias: Tensor | None


def stored_expert(record: memoryview, header: StoreHeader) -> StoredExpert:
    """The parts of a record, without a copy."""
    form, dtype = header.format(), DTYPES[header.dtype]
    rows = header.d_ff * (2 if header.gated else 1)

    def part(offset: int, kind: torch.dtype, *shape: int) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        return torch.frombuffer(record, dtype=kind, count=count, offset=offset).view(shape)

    scaled = header.dtype == "int8"
    return StoredExpert(
        wi=part(form.wi_offset, dtype, rows, header.d_model),
        wo=part(form.wo_offset, dtype, header.d_model, header.d_ff),
        wi_scale=part(form.wi_scale_offset, torch.float32, rows) if scaled else None,
        wo_scale=part(form.wo_scale_offset, torch.float32, header.d_model) if scaled else None,
        wi_bias=part(form.wi_bias_offset, torch.float32, rows) if header.biased else None,
        wo_bias=part(form.wo_bias_offset, torch.float32, header.d_model) if header.biased else None,
    )
