"""A record of the expert store as tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sida_ext.experts.quantise import GROUP, Quantised, is_quantised
from sida_ext.experts.source import ExpertWeights
from sida_ext.experts.store import DTYPES, StoreHeader

__all__ = ["stored_expert"]

_SCALES = {"int8": torch.float32, "int4": torch.float16, "mxfp4": torch.uint8}


def stored_expert(record: memoryview, header: StoreHeader) -> ExpertWeights:
    """The parts of a record, views of its memory; biases are float32."""
    form, dtype = header.format(), header.dtype
    rows = header.d_ff * (2 if header.gated else 1)

    def part(offset: int, kind: torch.dtype, *shape: int) -> Tensor:
        return torch.frombuffer(record, dtype=kind, count=math.prod(shape), offset=offset).view(shape)

    def matrix(offset: int, scale_offset: int, rows: int, columns: int) -> Tensor | Quantised:
        if not is_quantised(dtype):
            return part(offset, DTYPES[dtype], rows, columns)
        groups = -(-columns // GROUP)
        values, scales = ((columns,), ()) if dtype == "int8" else ((GROUP // 2 * groups,), (groups,))
        return Quantised(
            part(offset, DTYPES[dtype], rows, *values), part(scale_offset, _SCALES[dtype], rows, *scales), columns
        )

    return ExpertWeights(
        wi=matrix(form.wi_offset, form.wi_scale_offset, rows, header.d_model),
        wo=matrix(form.wo_offset, form.wo_scale_offset, header.d_model, header.d_ff),
        wi_bias=part(form.wi_bias_offset, torch.float32, rows) if header.biased else None,
        wo_bias=part(form.wo_bias_offset, torch.float32, header.d_model) if header.biased else None,
    )
