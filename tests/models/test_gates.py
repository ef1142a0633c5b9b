"""The gate formula is found by asking module and kernel, never by flags."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from sida_ext.models.gates import by_rows, gate_formula


def gated(function, *, concatenated=True):
    """Something with the face of an experts module."""

    def apply_gate(both):
        gate, up = both.chunk(2, dim=-1) if concatenated else (both[..., ::2], both[..., 1::2])
        return function(gate, up)

    return types.SimpleNamespace(has_gate=True, is_concatenated=concatenated, _apply_gate=apply_gate)


def gpt_oss(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", "gated-silu"),
        ("gelu", "gated-gelu"),
        ("gelu_pytorch_tanh", "gated-gelu_new"),
        ("relu", "gated-relu"),
        ("relu2", "gated-relu2"),
        ("quick_gelu", "gated-quick_gelu"),
    ],
)
def test_a_gate_that_a_kernel_knows_is_found(name, formula):
    function = ACT2FN[name]
    for concatenated in (True, False):
        assert gate_formula(gated(lambda g, u: function(g) * u, concatenated=concatenated), 48) == formula
    assert gate_formula(types.SimpleNamespace(has_gate=False, act_fn=function), 48) == formula.removeprefix("gated-")


def test_the_gate_of_gpt_oss_is_found_in_both_orders():
    for concatenated in (True, False):
        assert gate_formula(gated(gpt_oss, concatenated=concatenated), 48) == "swiglu_oai"


@pytest.mark.parametrize(
    "lookalike",
    [
        lambda g, u: nn.functional.silu(g.clamp(max=10.0)) * u,
        lambda g, u: nn.functional.silu(g) * u.clamp(-1000.0, 1000.0),
        lambda g, u: nn.functional.silu(u) * g,
        lambda g, u: nn.functional.silu(g) * (u + 1e-3),
        lambda g, u: (u + 1) * g.clamp(max=7.0) * torch.sigmoid(1.7 * g.clamp(max=7.0)),
        lambda g, u: gpt_oss(g, u.clamp(-6.9, 6.9)),
        lambda g, u: 15.0 * torch.tanh(nn.functional.silu(g) * u / 15.0),
        lambda g, u: torch.tanh(g) * u,
    ],
)
def test_a_gate_that_merely_looks_alike_is_not_taken_for_a_kernels(lookalike):
    assert gate_formula(gated(lookalike), 48) is None


@pytest.mark.parametrize(
    "mixing",
    [
        lambda g, u: nn.functional.silu(torch.where(g >= g.topk(24, dim=-1).values[..., -1:], g, 0.0)) * u,
        lambda g, u: nn.functional.silu(g) * u * torch.linspace(0.5, 1.5, 48),
        lambda g, u: nn.functional.silu(g - g.mean(-1, keepdim=True)) * u,
    ],
)
@pytest.mark.parametrize("concatenated", [True, False])
def test_a_gate_that_mixes_the_units_of_a_row_is_no_kernels(mixing, concatenated):
    """Each of them is a kernel's where a row has one unit."""
    assert gate_formula(gated(mixing, concatenated=concatenated), 48) is None


@pytest.mark.parametrize("width", [24, 100, 128, 640])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(width):
    """torch computes what stands behind the last whole vector, and at threads' borders, by other code."""
    rows = torch.randn(3 * 32768 // width, width, generator=torch.Generator().manual_seed(width))

    def silu(part):
        return nn.functional.silu(part.clamp(max=2.0))

    found = by_rows(silu, rows)
    for row in range(0, len(rows), 7):
        assert torch.equal(by_rows(silu, rows[row : row + 1])[0], found[row])
    assert by_rows(silu, rows[:0]).shape == (0, width)
