"""What a model takes in memory and on disk, for each type of its experts, and what of it fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sida_ext.planning.counting import ExpertShape, ModelFacts

__all__ = [
    "DENSE_DTYPES",
    "EXPERT_DTYPES",
    "LOW_BIT_DTYPES",
    "MISSES",
    "Capacity",
    "experts_bytes",
    "kv_cache_bytes",
    "other_bytes",
    "record_bytes",
    "room",
]

# Bits of a weight; 4-bit formats with the scale of each group of 32 (float16, or the one byte of MX).
EXPERT_DTYPES = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "int8": 8.0, "int4": 4.5, "mxfp4": 4.25}
DENSE_DTYPES = ("bfloat16", "int8", "int4")
LOW_BIT_DTYPES = ("int4", "mxfp4")
MISSES = ("wait", "low_bit")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# The record of csrc/experts/expert.h: wi, wo, scales, biases, each part and the whole aligned.
PART, RECORD = 64, 4096
# What importing torch and transformers takes of anonymous memory: 248 MiB measured (torch 2.13, CPU build, transformers
# 5.24), and a model's modules and buffers besides.
PROCESS_BYTES = 320 << 20
# As a budget of "auto": left to activations, page tables and everybody else.
RESERVE_BYTES, RESERVE_SHARE = 512 << 20, 0.10


def _aligned(count: float, to: int) -> int:
    return math.ceil(count / to) * to


def record_bytes(shape: ExpertShape, dtype: str) -> int:
    """Bytes of one expert in a store and in a slot.

    Raises:
        ValueError: names the type and those that there are.
    """
    if dtype not in EXPERT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(EXPERT_DTYPES)}")
    wi_rows = shape.d_ff * (2 if shape.gated else 1)
    if dtype in ("int4", "mxfp4"):  # rows of whole groups of 32 columns, two values in a byte
        parts = [wi_rows * -(-shape.d_model // 32) * 16.0, shape.d_model * -(-shape.d_ff // 32) * 16.0]
    else:
        size = EXPERT_DTYPES[dtype] / 8
        parts = [wi_rows * shape.d_model * size, shape.d_model * shape.d_ff * size]
    if dtype == "int8":  # a float32 for each row
        parts += [wi_rows * 4, shape.d_model * 4]
    elif dtype in ("int4", "mxfp4"):
        scale = 2 if dtype == "int4" else 1
        parts += [wi_rows * -(-shape.d_model // 32) * scale, shape.d_model * -(-shape.d_ff // 32) * scale]
    if shape.biased:
        parts += [wi_rows * 4, shape.d_model * 4]
    end = 0
    for part in parts:
        end = _aligned(end, PART) + math.ceil(part)
    return _aligned(end, RECORD)


def experts_bytes(facts: ModelFacts, dtype: str) -> int:
    """Of all experts as records, each as large as the widest."""
    return facts.total_experts * record_bytes(facts.shape, dtype)


def other_bytes(facts: ModelFacts, dense_dtype: str | None = None) -> int:
    """Of everything but the experts, as it lies in memory.

    Args:
        dense_dtype: of the large matrices, as ``from_pretrained`` takes it; everything else, and all of it with None,
            is of the type that the checkpoint's configuration names.
    """
    item = ITEM_BYTES.get(facts.dtype, 4)
    if dense_dtype is None:
        return facts.other_numbers * item
    if dense_dtype not in DENSE_DTYPES:
        raise ValueError(f"dense_dtype is {dense_dtype!r}, expected None or one of {', '.join(DENSE_DTYPES)}")
    numbers = sum(rows * columns for rows, columns in facts.dense)
    if dense_dtype == "bfloat16":
        stored = 2 * numbers
    elif dense_dtype == "int8":
        stored = sum(rows * (columns + 4) for rows, columns in facts.dense)
    else:
        stored = sum(18 * rows * -(-columns // 32) for rows, columns in facts.dense)
    return (facts.other_numbers - numbers + facts.tied_numbers) * item + stored


def kv_cache_bytes(facts: ModelFacts, context: int, batch: int = 1) -> int:
    """Keys and values of ``context`` tokens in every attention layer; a layer with a window holds no more than that."""
    if context < 0 or batch < 1:
        raise ValueError(f"context is {context} and batch {batch}, expected 0 or more tokens and at least one sequence")
    numbers = facts.kv_numbers * context + sum(count * min(context, window) for count, window in facts.windowed)
    return numbers * batch * ITEM_BYTES.get(facts.dtype, 4)


@dataclass(frozen=True)
class Capacity:
    """What fits, in bytes.

    Attributes:
        needed: of the process without any expert: other weights, cache, import, and what is left to activations.
        smallest_budget: one expert; below it nothing runs.
        budget: of expert memory: all that is left, at the most all experts; or what was asked for.
        resident_share: of the experts that the budget holds.
    """

    needed: int
    smallest_budget: int
    budget: int
    resident_share: float
    fits: bool


def room(
    facts: ModelFacts,
    dtype: str,
    memory: int,
    *,
    kv: int,
    dense_dtype: str | None = None,
    budget: int | None = None,
    process: int = PROCESS_BYTES,
) -> Capacity:
    """How many experts fit beside everything else in ``memory`` bytes.

    Args:
        budget: expert memory that is asked for; None: what is left.
        process: taken by the import; on a GPU by its context.
    """
    record = record_bytes(facts.shape, dtype)
    total = experts_bytes(facts, dtype)
    needed = other_bytes(facts, dense_dtype) + kv + process
    # Of the memory that is not the model's own: a machine full of weights has no larger activations for that.
    left = memory - needed
    reserve = min(RESERVE_BYTES, max(0, int(left * RESERVE_SHARE)))
    given = min(total, left - reserve) if budget is None else min(budget, total)
    slots = max(0, given) // record
    fits = slots >= 1 and needed + slots * record <= memory
    if slots < 1 and budget is not None:
        raise ValueError(f"expert_memory is {budget} bytes; the smallest that works is one expert, {record} bytes")
    share = min(1.0, slots * record / total) if total else 0.0
    held = total if slots * record >= total else slots * record
    return Capacity(needed, record, held, share, fits)
