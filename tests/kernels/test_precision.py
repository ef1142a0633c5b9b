"""set_precision: what it takes where, its stated bound, and that exact stays exact."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings

import sida_ext
from sida_ext import _C, ops
from tests.kernels.test_moe_ffn_invariance import arguments_of, layers, rows_of, same_bits
from tests.support.reference import activate

WITH_FAST = "fast" in sida_ext.precisions()
needs_fast = pytest.mark.skipif(
    not WITH_FAST, reason=f"the instruction set in force, {_C.instruction_set()}, has no instruction for 'fast'"
)


@pytest.fixture(autouse=True)
def _exact_afterwards():
    yield
    sida_ext.set_precision("exact")


def test_exact_is_the_default_and_always_there():
    assert sida_ext.get_precision() == "exact"
    assert sida_ext.precisions()[0] == "exact"
    sida_ext.set_precision("exact")
    assert sida_ext.get_precision() == "exact"


@pytest.mark.parametrize("wrong", ["", "Fast", "bf16", None, 1])
def test_another_name_is_an_error(wrong):
    with pytest.raises(ValueError, match="expected 'exact' or 'fast'"):
        sida_ext.set_precision(wrong)
    with pytest.raises((ValueError, TypeError)):
        _C.set_precision(wrong)


@pytest.mark.parametrize("instructions", [name for name in _C.instruction_sets() if name in ("scalar", "avx2", "neon")])
def test_a_set_without_it_does_not_pretend(instructions):
    """An error that names the set; the setting stays, and info says what there is."""
    code = """
import sida_ext
from sida_ext.info import collect
try:
    sida_ext.set_precision("fast")
except ValueError as error:
    print(error)
print(sida_ext.get_precision(), sida_ext.precisions(), "|", collect(measure=False)["cpu"]["precision"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SIDA_CPU": instructions}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        f"precision is 'fast', but the instruction set in force, {instructions}, lacks an instruction that rounds "
        "activations, so that it would change nothing; expected 'exact'",
        "exact ['exact'] | exact; this set has: exact",
    ], done.stderr


def test_it_is_one_setting_for_all_threads():
    chosen = sida_ext.precisions()[-1]
    seen = []
    setter = threading.Thread(target=lambda: sida_ext.set_precision(chosen))
    setter.start()
    setter.join()
    reader = threading.Thread(target=lambda: seen.append(sida_ext.get_precision()))
    reader.start()
    reader.join()
    assert seen == [chosen] == [sida_ext.get_precision()]


def stated_bound(arguments: dict, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's output in float64 and how far set_precision's docstring lets "fast" be from it."""
    x, wi, wo = (arguments[name].double() for name in ("x", "wi", "wo"))
    out, allowed = torch.zeros_like(x), torch.zeros_like(x)
    first, second = (2**-8 + (k + 2) * 2**-24 for k in (x.shape[1], wo.shape[2]))
    for token in range(x.shape[0]):
        expert = int(arguments["expert_index"][token, 0])
        if expert < 0:
            continue
        slot, gate = int(arguments["slot_of_expert"][expert]), float(arguments["gate"][token, 0])
        rows, error = wi[slot] @ x[token], first * (wi[slot].abs() @ x[token].abs())
        hidden = activate(activation, rows)
        # Over the interval in which the sum may lie; an activation here has at most one turn in it.
        moved = torch.stack([activate(activation, rows + error * step / 8) for step in range(-8, 9)])
        hidden_error = (moved - hidden).abs().max(0).values * 1.01
        size = wo[slot].abs() @ (hidden.abs() + hidden_error)
        out[token] = gate * (wo[slot] @ hidden)
        allowed[token] = abs(gate) * (second * size + wo[slot].abs() @ hidden_error)
    ulp = out.abs() * torch.finfo(arguments["x"].dtype).eps
    return out, allowed + ulp + 1e-30


@needs_fast
@settings(max_examples=40, deadline=None)
@given(layers())
def test_fast_is_within_its_bound_and_batch_invariant(case):
    case = case | {"w_dtype": torch.bfloat16, "top_k": 1, "activation": "gelu", "tokens": min(case["tokens"], 20)}
    arguments, activation = arguments_of(case)
    sida_ext.set_precision("fast")
    found = ops.moe_ffn(**arguments, activation=activation)
    expected, allowed = stated_bound(arguments, activation)
    assert ((found.double() - expected).abs() <= allowed).all()
    assert same_bits(ops.moe_ffn(**rows_of(arguments, torch.tensor([0])), activation=activation), found[:1])


@needs_fast
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float16, torch.int8, "int4", "mxfp4"], ids=str)
def test_fast_changes_nothing_for_other_weights(w_dtype):
    case = {
        "tokens": 9, "top_k": 1, "d_model": 64, "d_ff": 96, "experts": 3, "extra_slots": 0,
        "x_dtype": torch.float32, "w_dtype": w_dtype, "activation": "relu", "padding": 0, "seed": 5,
    }  # fmt: skip
    arguments, activation = arguments_of(case)
    exact = ops.moe_ffn(**arguments, activation=activation)
    sida_ext.set_precision("fast")
    assert same_bits(ops.moe_ffn(**arguments, activation=activation), exact)
