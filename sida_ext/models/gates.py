"""Which of the kernels' activations computes what an experts module's own gate computes: found by asking both.

The flags of an experts module do not tell its formula: families with the flags of Mixtral clamp, cap or weigh their
gates. So the kernel and the module are given the same values, from tiny to far beyond any clamp, and the kernel's
formula is taken only where all results agree.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext import ops

__all__ = ["gate_formula"]

# Without the gate; gated ones are these with "gated-" before, and "swiglu_oai", which is gated by its name.
ELEMENTWISE = ("silu", "gelu_new", "gelu", "relu", "relu2", "quick_gelu", "linear")
# Results that differ by no more are the same formula: a share of the result, and of the product of what went in, since
# far out a gate is a small difference of large numbers in fp32.
OF_RESULT, OF_INPUTS = 2e-5, 1e-6


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


def _own(module: Any) -> Tensor:
    if not module.has_gate:
        return module.act_fn(_values())
    gate, up = _pairs()
    # As the module's products lie: halves one after the other, or gate and up in turns, which for one pair is the same.
    both = torch.stack([gate, up], dim=1)
    return module._apply_gate(both)[:, 0]


def gate_formula(module: nn.Module) -> str | None:
    """The kernel's activation that gives what ``module``'s own gate gives on every value asked, or None.

    Args:
        module: an experts module of the seam; its ``_apply_gate`` (or ``act_fn``) is called with float32 rows.
    """
    own: Any = module
    with torch.no_grad():
        wanted = _own(own)
    asked = _pairs() if own.has_gate else (_values(), torch.zeros(1))
    allowed = OF_RESULT * wanted.abs() + OF_INPUTS * (asked[0].abs() + 1) * (asked[1].abs() + 1)
    names = [f"gated-{name}" for name in ELEMENTWISE] + ["swiglu_oai"] if own.has_gate else list(ELEMENTWISE)
    for name in names:
        if bool(((_kernel(name) - wanted).abs() <= allowed).all()):  # a NaN is no agreement
            return name
    return None
