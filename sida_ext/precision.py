"""What the CPU kernels may round: one setting for the process."""

from __future__ import annotations

from typing import Literal, cast, get_args

from sida_ext._load import _C

__all__ = ["Precision", "get_precision", "precisions", "set_precision"]

Precision = Literal["exact", "fast"]


def set_precision(precision: Precision) -> None:
    """Choose what the CPU kernels of ``moe_ffn`` may round, for every call of the process that begins afterwards.

    ``"exact"`` (the default) multiplies weights with activations as they are and sums in fp32. bfloat16 and float16
    weights are widened exactly; where instructions multiply bfloat16 pairs (``amx``), an activation is split
    into bfloat16 terms that add up to it.

    ``"fast"`` rounds activations (x, and the hidden layer between the two products) to bfloat16 where weights are
    bfloat16, and multiplies pairs: VDPBF16PS under ``avx512`` on a CPU with AVX512_BF16, one term under ``amx``.
    Weights of other dtypes (float32, float16, int8, int4, mxfp4), and rows of an odd number of columns under
    ``avx512``, are computed as in ``"exact"``.
    For each dot product of K columns::

        |error| <= (2^-8 + (K + 2) 2^-24) * sum_k |w_k| |x_k|  +  2^-126 (sum_k |w_k| + sum_k |x_k| + 4 K)

    2^-8 is bfloat16's rounding of x (none where x is bfloat16 itself), (K + 2) 2^-24 the rounding of fp32 sums in any
    order, to first order; the last term is what the instructions lose by taking denormal numbers for zero. The hidden
    layer carries the error of the first product through the activation's slope and is rounded in its turn. Finite
    activations from 2^128 (1 - 2^-9) up round to infinity. A row's bits still do not depend on other rows, slots or
    threads.

    Any thread may call it at any time; a call of ``moe_ffn`` that is under way keeps what it began with. Results under
    ``"fast"`` differ from those under ``"exact"``, so do not change it in the middle of a batch. CUDA kernels do not
    consult it.

    Raises:
        ValueError: ``precision`` is neither, or the instruction set in force has no instruction that rounds activations
            (scalar, avx2, neon; avx512 without AVX512_BF16): ``"fast"`` would change nothing there, and says so.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, expected 'exact' or 'fast'")
    _C.set_precision(precision)


def get_precision() -> Precision:
    """What :func:`set_precision` chose last; ``"exact"`` before."""
    return cast("Precision", _C.get_precision())


def precisions() -> list[Precision]:
    """What :func:`set_precision` takes with the instruction set in force, ``"exact"`` first."""
    return cast("list[Precision]", _C.precisions())
