"""A row of moe_ffn's result depends on nothing but its own token: not on other rows, slots, waves or threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sida_ext import _C, ops
from sida_ext.experts.quantise import quantise
from tests.support.native_build import ROOT
from tests.support.reference import assert_within
from tests.support.reference import moe_ffn as reference_moe_ffn

X_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, "int4", "mxfp4"]


def weights(
    slots: int, d_model: int, d_ff: int, dtype: torch.dtype | str, gated: bool, random: torch.Generator
) -> dict:
    wi = torch.randn(slots, d_ff * (2 if gated else 1), d_model, generator=random) / d_model**0.5
    wo = torch.randn(slots, d_model, d_ff, generator=random) / d_ff**0.5
    if isinstance(dtype, torch.dtype) and dtype != torch.int8:
        return {"wi": wi.to(dtype), "wo": wo.to(dtype)}
    made: dict[str, Tensor] = {}
    for name, weight in (("wi", wi), ("wo", wo)):
        quantised = quantise(weight, dtype if isinstance(dtype, str) else "int8")
        made[name], made[f"{name}_scale"] = quantised.values, quantised.scale
    return made


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@st.composite
def layers(draw: st.DrawFn) -> dict:
    """A layer of any shape: sizes off every tile, more slots than experts, strided rows and slots."""
    return {
        "tokens": draw(st.integers(1, 90)),
        "top_k": draw(st.integers(1, 3)),
        "d_model": draw(st.integers(1, 130)),
        "d_ff": draw(st.integers(1, 150)),
        "experts": draw(st.integers(1, 12)),
        "extra_slots": draw(st.integers(0, 3)),
        "x_dtype": draw(st.sampled_from(X_DTYPES)),
        "w_dtype": draw(st.sampled_from(W_DTYPES)),
        "activation": draw(st.sampled_from(["relu", "gelu", "gelu_new", "silu", "gated-gelu", "gated-silu"])),
        "padding": draw(st.integers(0, 9)),
        "seed": draw(st.integers(0, 2**30)),
    }


def strided(tensor: Tensor, padding: int) -> Tensor:
    """The same values in rows and slots with `padding` foreign elements after them."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + padding), 1, dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def arguments_of(case: dict) -> tuple[dict, str]:
    random = torch.Generator().manual_seed(case["seed"])
    slots = case["experts"] + case["extra_slots"]
    made = weights(
        slots, case["d_model"], case["d_ff"], case["w_dtype"], case["activation"].startswith("gated-"), random
    )
    for name in ("wi", "wo"):
        made[name] = strided(made[name], case["padding"])
    made["x"] = strided(
        torch.randn(case["tokens"], case["d_model"], generator=random).to(case["x_dtype"]), case["padding"]
    )
    made["expert_index"] = torch.randint(-1, case["experts"], (case["tokens"], case["top_k"]), generator=random)
    made["gate"] = torch.randn(case["tokens"], case["top_k"], generator=random)
    made["slot_of_expert"] = torch.randperm(slots, generator=random)[: case["experts"]].int()
    return made, case["activation"]


def rows_of(arguments: dict, rows: Tensor) -> dict:
    return arguments | {name: arguments[name][rows] for name in ("x", "expert_index", "gate")}


@settings(max_examples=60, deadline=None)
@given(layers())
def test_any_shape_is_within_the_bound(case: dict) -> None:
    case = case | {"tokens": min(case["tokens"], 20)}
    arguments, activation = arguments_of(case)
    expected, bound = reference_moe_ffn(**arguments, activation=activation)
    assert_within(ops.moe_ffn(**arguments, activation=activation), expected, bound)


@settings(max_examples=60, deadline=None)
@given(layers(), st.data())
def test_a_row_does_not_depend_on_the_others(case: dict, data: st.DataObject) -> None:
    arguments, activation = arguments_of(case)
    together = ops.moe_ffn(**arguments, activation=activation)
    order = torch.tensor(data.draw(st.permutations(range(case["tokens"]))))
    assert same_bits(ops.moe_ffn(**rows_of(arguments, order), activation=activation), together[order])
    part = torch.tensor(data.draw(st.lists(st.integers(0, case["tokens"] - 1), min_size=1, max_size=7)))
    assert same_bits(ops.moe_ffn(**rows_of(arguments, part), activation=activation), together[part])
    alone = part[:1]
    assert same_bits(ops.moe_ffn(**rows_of(arguments, alone), activation=activation), together[alone])


@settings(max_examples=40, deadline=None)
@given(layers(), st.data())
def test_slots_and_waves_do_not_matter(case: dict, data: st.DataObject) -> None:
    arguments, activation = arguments_of(case)
    expected = ops.moe_ffn(**arguments, activation=activation)
    slots = arguments["wi"].shape[0]
    moved = torch.tensor(data.draw(st.permutations(range(slots))))
    where = torch.argsort(moved)
    elsewhere = arguments | {name: arguments[name][moved] for name in arguments if name.startswith(("wi", "wo"))}
    elsewhere["slot_of_expert"] = where[arguments["slot_of_expert"].long()].int()
    assert same_bits(ops.moe_ffn(**elsewhere, activation=activation), expected)
    if case["top_k"] > 1:
        return
    # Waves of top-1: each expert's rows come from one wave, the others' stay zero.
    waves = torch.zeros_like(expected)
    for expert in range(case["experts"]):
        here = torch.where(torch.arange(case["experts"]) == expert, arguments["slot_of_expert"], -1).int()
        wave = ops.moe_ffn(**(arguments | {"slot_of_expert": here}), activation=activation, missing="skip")
        mine = arguments["expert_index"][:, 0] == expert
        assert not wave[~mine].any()
        waves[mine] = wave[mine]
    assert same_bits(waves, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_do_not_matter(threads: int) -> None:
    before = torch.get_num_threads()
    case = {
        "tokens": 150, "top_k": 2, "d_model": 100, "d_ff": 210, "experts": 9, "extra_slots": 0,
        "x_dtype": torch.bfloat16, "w_dtype": torch.bfloat16, "activation": "gated-gelu", "padding": 0, "seed": 3,
    }  # fmt: skip
    arguments, activation = arguments_of(case)
    expected = ops.moe_ffn(**arguments, activation=activation)
    try:
        torch.set_num_threads(threads)
        assert same_bits(ops.moe_ffn(**arguments, activation=activation), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
def test_a_token_alone_and_in_a_batch_of_4096(x_dtype: torch.dtype, w_dtype: torch.dtype | str) -> None:
    case = {
        "tokens": 4096, "top_k": 1, "d_model": 70, "d_ff": 90, "experts": 16, "extra_slots": 0,
        "x_dtype": x_dtype, "w_dtype": w_dtype, "activation": "gelu", "padding": 0, "seed": 1,
    }  # fmt: skip
    arguments, activation = arguments_of(case)
    together = ops.moe_ffn(**arguments, activation=activation)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(2))
    assert same_bits(ops.moe_ffn(**rows_of(arguments, order), activation=activation), together[order])
    for token in (0, 1, 2047, 4095):
        alone = torch.tensor([token])
        assert same_bits(ops.moe_ffn(**rows_of(arguments, alone), activation=activation), together[alone])


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([math.nan, math.inf, -math.inf, 1e-40, 3e38]), st.data())
def test_extreme_values_stay_in_their_rows(case: dict, value: float, data: st.DataObject) -> None:
    """A NaN or an infinity in one token changes no other row, and its own row has the reference's class."""
    case = case | {"x_dtype": torch.float32, "w_dtype": torch.float32, "activation": "relu"}
    arguments, activation = arguments_of(case)
    before = ops.moe_ffn(**arguments, activation=activation)
    token = data.draw(st.integers(0, case["tokens"] - 1))
    column = data.draw(st.integers(0, case["d_model"] - 1))
    arguments["x"][token, column] = value
    after = ops.moe_ffn(**arguments, activation=activation)
    others = torch.arange(case["tokens"]) != token
    assert same_bits(after[others], before[others])
    alone = rows_of(arguments, torch.tensor([token]))
    expected, bound = reference_moe_ffn(**alone, activation=activation)
    found = after[token : token + 1].double()
    # Beyond the range of float32 on the way, a sum may overflow where float64 does not: in the hidden layer, or before
    # a small gate brings it back.
    _, ungated = reference_moe_ffn(**(alone | {"gate": torch.ones_like(alone["gate"])}), activation=activation)
    hidden = arguments["wi"].double().abs() @ alone["x"][0].double().abs()
    certain = (bound.abs() < 1e38) & (ungated.abs() < 1e38) & (hidden.max() < 1e38)
    assert torch.equal(found.isnan() & bound.isnan(), expected.isnan() & bound.isnan())
    inside = expected.isfinite() & certain
    assert found[inside].isfinite().all()
    assert ((found - expected).abs() <= 1e-5 * bound + 1e-37)[inside].all()


def test_unaligned_views() -> None:
    """Storage that starts off every alignment of vectors."""
    case = {
        "tokens": 9, "top_k": 1, "d_model": 64, "d_ff": 96, "experts": 3, "extra_slots": 0,
        "x_dtype": torch.float32, "w_dtype": torch.bfloat16, "activation": "relu", "padding": 0, "seed": 5,
    }  # fmt: skip
    arguments, activation = arguments_of(case)
    expected = ops.moe_ffn(**arguments, activation=activation)
    for name in ("x", "wi", "wo"):
        whole = torch.empty(arguments[name].numel() + 1, dtype=arguments[name].dtype)
        whole[1:] = arguments[name].flatten()
        arguments[name] = whole[1:].view(arguments[name].shape)
    assert same_bits(ops.moe_ffn(**arguments, activation=activation), expected)


SUBPROCESS = """
import tests.kernels.test_moe_ffn_invariance as t
from tests.support.reference import assert_within, moe_ffn
from sida_ext import _C, ops
for seed in range(12):
    case = dict(tokens=seed * 3 + 1, top_k=1, d_model=40 + seed, d_ff=61 + 5 * seed, experts=4, extra_slots=0,
                x_dtype=t.X_DTYPES[seed % 3], w_dtype=t.W_DTYPES[seed % 6], activation="gelu", padding=seed % 2,
                seed=seed)
    arguments, activation = t.arguments_of(case)
    expected, bound = moe_ffn(**arguments, activation=activation)
    assert_within(ops.moe_ffn(**arguments, activation=activation), expected, bound)
print(_C.instruction_set())
"""


@pytest.mark.parametrize("instructions", _C.instruction_sets())
def test_every_instruction_set_of_this_machine(instructions: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SUBPROCESS],
        cwd=ROOT,
        env=os.environ | {"SIDA_CPU": instructions},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == instructions
