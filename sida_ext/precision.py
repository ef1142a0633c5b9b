"""What the CPU kernels may round: one setting for the process."""

from __future__ import annotations

from typing import Literal, cast, get_args

from sida_ext._load import _C

__all__ = ["Precision", "get_precision", "precisions", "set_precision"]

Precision = Literal["exact", "fast"]


def set_precision(precision: Precision) -> None:
    """Choose what the CPU kernels of ``moe_ffn`` and ``linear`` may round, for every call that begins afterwards.

    ``"exact"`` (the default) multiplies weights with activations as they are and sums in fp32. bfloat16 and float16
    weights are widened exactly; where instructions multiply bfloat16 pairs (``amx``), an activation is split
    into bfloat16 terms that add up to it.

    ``"fast"`` rounds activations (x, and the hidden layer between the two products). How depends on the weights:

    * **int8, int4, mxfp4**: to 8 bits for each group of 32 columns, ``q = x / s`` to nearest, ``s = max |x| / 127``;
      integers are multiplied and added exactly (VPDPBUSD under ``avx512`` and ``amx``, VPMADDUBSW under ``avx2``, SDOT
      under ``neon``), and each group's sum is scaled once. With G groups, of the largest ``|x|`` a_g each::

          |error| <= sum_g (a_g / 254) (1 + 2^-14) sum_{k in g} |w_k|
                     + (G + 4) 2^-24 sum_k |w_k| (|x_k| + a_g / 254) + 2^-119 sum_k |w_k| + 2^-133 G

      Half a step of q, then the roundings of s and of the sums to first order. A group with a_g below 2^-119 counts as
      zero; one with an infinity or a NaN makes the sums NaN that it is part of. A group's scale times a_g must stay
      below 2^128, or the sum need not be finite.
    * **bfloat16**: to bfloat16, and pairs are multiplied: one term under ``amx``, VDPBF16PS under ``avx512`` on a CPU
      with AVX512_BF16 and without AMX (where AMX is, VDPBF16PS was measured slower than ``"exact"``); elsewhere, and
      for rows of an odd number of columns under ``avx512``, as in ``"exact"``. With K columns::

          |error| <= (2^-8 + (K + 2) 2^-24) sum_k |w_k| |x_k| + 2^-126 (sum_k |w_k| + sum_k |x_k| + 4 K)

      2^-8 is bfloat16's rounding of x (none where x is bfloat16 itself), (K + 2) 2^-24 the rounding of fp32 sums in any
      order, to first order; the last term is what the instructions lose by taking denormal numbers for zero. Finite
      activations from 2^128 (1 - 2^-9) up round to infinity.
    * **float32, float16**: as in ``"exact"``.

    The hidden layer carries the error of the first product through the activation's slope and is rounded in its turn. A
    row's bits still do not depend on other rows, slots or threads.

    Any thread may call it at any time; a call that is under way keeps what it began with. Results under
    ``"fast"`` differ from those under ``"exact"``, so do not change it in the middle of a batch. CUDA kernels do not
    consult it.

    Raises:
        ValueError: ``precision`` is neither, or the instruction set in force has no kernels that round activations
            (scalar; avx512 without AVX512_VNNI, neon without dot products): ``"fast"`` would change nothing there, and
            says so.
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
