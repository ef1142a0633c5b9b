"""Which of the kernels' activations computes what an experts module's own gate computes: found by asking both.

The flags of an experts module do not tell its formula: families with the flags of Mixtral clamp, cap or weigh their
gates. So the kernel and the module are given the same values, from tiny to far beyond any clamp, and the kernel's
formula is taken only where all results agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext import ops

__all__ = ["by_rows", "gate_formula", "own_gate"]

# Without the gate; gated ones are these with "gated-" before, and "swiglu_oai", which is gated by its name.
ELEMENTWISE = ("silu", "gelu_new", "gelu", "relu", "relu2", "quick_gelu", "linear")
# Results that differ by no more are the same formula: a share of the result, and of the product of what went in, since
# far out a gate is a small difference of large numbers in fp32.
OF_RESULT, OF_INPUTS = 2e-5, 1e-6
# torch parts an elementwise function among threads from so many numbers on, and computes what whole vectors leave over
# (of which this is a multiple in every type and instruction set) by other code, whose last bits may differ.
GRAIN, VECTORS = 32768, 128


def own_gate(module: nn.Module, up: Tensor) -> Tensor:
    """What an experts module does between its two products, by its own function.

    Args:
        up: [rows, d_ff], gated: [rows, 2 * d_ff], gate before up.

    Returns:
        [rows, d_ff].
    """
    own: Any = module
    if not own.has_gate:
        return own.act_fn(up)
    return own._apply_gate(up if own.is_concatenated else torch.stack(up.chunk(2, dim=-1), dim=-1).flatten(-2))


def by_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function`` of ``rows`` [n, width], such that no row's bits depend on the rows beside it: called with so many
    rows that torch neither parts them among threads nor leaves numbers over behind its vectors."""
    width = rows.shape[1]
    at_once = 1 if width % VECTORS else max(1, (GRAIN - 1) // width)
    if rows.shape[0] <= at_once:
        return function(rows)
    return torch.cat([function(part) for part in rows.split(at_once)])


@functools.cache
def _values() -> Tensor:
    """What gate and up are asked with: dense where the functions bend, sparse where only clamps and caps still act."""
    near = torch.linspace(-12, 12, 97)
    far = torch.tensor([15.0, 25.0, 60.0, 130.0, 700.0, 3000.0, 20000.0])
    return torch.cat([near, far, -far, torch.tensor([1e-4, -1e-4])])


@functools.cache
def _pairs() -> tuple[Tensor, Tensor]:
    values = _values()
    return values.repeat_interleave(values.numel()), values.repeat(values.numel())


@functools.cache
def _kernel(activation: str) -> Tensor:
    """The kernel's own results, [values] or, gated, [values * values]: experts whose matrices pass values through."""
    gated = activation.startswith("gated-") or activation == "swiglu_oai"
    x = torch.stack(_pairs(), dim=1) if gated else _values().unsqueeze(1)
    tokens, width = x.shape
    wi = torch.eye(width).unsqueeze(0)
    wo = torch.ones(1, width, 1)
    index, gate = torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1)
    return ops.moe_ffn(x, index, gate, wi, wo, torch.zeros(1, dtype=torch.int32), activation=activation)[:, 0]


def _in_rows(values: Tensor, width: int) -> Tensor:
    """[rows, width], filled up from the beginning."""
    rows = -(-values.numel() // width)
    return values[torch.arange(rows * width) % values.numel()].view(rows, width)


def _own(module: nn.Module, d_ff: int) -> Tensor:
    """The module's own results, in the order of the values asked. They are asked in rows of its own width: a gate that
    mixes the units of a row, or treats them differently, gives something else than any kernel."""
    asked = _pairs() if module.has_gate else (_values(),)
    rows = torch.cat([_in_rows(part, d_ff) for part in asked], dim=-1)
    return own_gate(module, rows).flatten()[: asked[0].numel()]


def gate_formula(module: nn.Module, d_ff: int) -> str | None:
    """The kernel's activation that gives what ``module``'s own gate gives on every value asked, or None.

    Args:
        module: an experts module of the seam; its ``_apply_gate`` (or ``act_fn``) is called with float32 rows.
        d_ff: its width.
    """
    gated = bool(module.has_gate)
    with torch.no_grad():
        wanted = _own(module, d_ff)
    asked = _pairs() if gated else (_values(), torch.zeros(1))
    allowed = OF_RESULT * wanted.abs() + OF_INPUTS * (asked[0].abs() + 1) * (asked[1].abs() + 1)
    names = [f"gated-{name}" for name in ELEMENTWISE] + ["swiglu_oai"] if gated else list(ELEMENTWISE)
    for name in names:
        if bool(((_kernel(name) - wanted).abs() <= allowed).all()):  # a NaN is no agreement
            return name
    return None
