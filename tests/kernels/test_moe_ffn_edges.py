"""moe_ffn at the edges: odd views, empty experts, one expert twice in a row, values that are no ordinary numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sida_ext import _C, ops
from tests.kernels.test_moe_ffn_invariance import W_DTYPES, X_DTYPES, arguments_of, layers, same_bits
from tests.support.reference import assert_within
from tests.support.reference import moe_ffn as reference_moe_ffn

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-42]


def case_of(**changes: object) -> dict:
    case = {
        "tokens": 9, "top_k": 1, "d_model": 64, "d_ff": 96, "experts": 3, "extra_slots": 0, "x_dtype": torch.float32,
        "w_dtype": torch.float32, "activation": "relu", "padding": 0, "seed": 5,
    }  # fmt: skip
    return case | changes


def moved(tensor: Tensor, elements: int) -> Tensor:
    """The same values and strides in storage that begins `elements` elements further on."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    whole = torch.ones(elements + size, dtype=tensor.dtype)
    view = whole.as_strided(tensor.shape, tensor.stride(), elements)
    view.copy_(tensor)
    assert view.data_ptr() == whole.data_ptr() + elements * tensor.element_size()
    return view


@settings(max_examples=60, deadline=None)
@given(layers(), st.lists(st.integers(0, 31), min_size=6, max_size=6))
def test_any_alignment_of_any_view(case: dict, offsets: list[int]) -> None:
    """Tokens, weights, scales and gates may begin at any element, with any stride between rows and slots."""
    arguments, activation = arguments_of(case)
    expected = ops.moe_ffn(**arguments, activation=activation)
    names = [n for n in ("x", "wi", "wo", "wi_scale", "wo_scale", "gate") if n in arguments]
    elsewhere = arguments | {n: moved(arguments[n], o) for n, o in zip(names, offsets, strict=False)}
    assert same_bits(ops.moe_ffn(**elsewhere, activation=activation), expected)


@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]))
def test_any_integer_type_and_stride_of_the_routing(case: dict, dtype: torch.dtype) -> None:
    arguments, activation = arguments_of(case)
    expected = ops.moe_ffn(**arguments, activation=activation)
    tokens, top_k = arguments["expert_index"].shape
    for name, kind in (("expert_index", dtype), ("gate", torch.float32)):
        wide = torch.zeros(top_k, 2 * tokens, dtype=kind)
        wide[:, ::2] = arguments[name].t()
        arguments[name] = wide[:, ::2].t()
    assert same_bits(ops.moe_ffn(**arguments, activation=activation), expected)


@settings(max_examples=40, deadline=None)
@given(layers(), st.data())
def test_experts_without_tokens(case: dict, data: st.DataObject) -> None:
    """All tokens at a few experts, or at none: the others' weights are not looked at, resident or not."""
    case = case | {"tokens": min(case["tokens"], 20)}
    arguments, activation = arguments_of(case)
    used = data.draw(st.lists(st.integers(-1, case["experts"] - 1), min_size=1, max_size=2))
    choices = st.lists(
        st.sampled_from(used), min_size=case["tokens"] * case["top_k"], max_size=case["tokens"] * case["top_k"]
    )
    arguments["expert_index"] = torch.tensor(data.draw(choices)).view(case["tokens"], case["top_k"])
    expected, bound = reference_moe_ffn(**arguments, activation=activation)
    for expert in range(case["experts"]):
        if expert in used:
            continue
        slot = int(arguments["slot_of_expert"][expert])
        for name in ("wi", "wo"):
            if arguments[name].is_floating_point():
                arguments[name][slot] = math.nan
            else:
                scale = arguments[f"{name}_scale"]
                scale[slot] = math.nan if scale.is_floating_point() else 255
        if expert % 2:
            arguments["slot_of_expert"][expert] = -1
    assert_within(ops.moe_ffn(**arguments, activation=activation), expected, bound)


@settings(max_examples=40, deadline=None)
@given(layers(), st.integers(2, 4))
def test_one_expert_several_times_in_a_row(case: dict, top_k: int) -> None:
    """A token may choose an expert twice: each choice counts, with its own gate."""
    case = case | {"tokens": min(case["tokens"], 20), "top_k": top_k}
    arguments, activation = arguments_of(case)
    arguments["expert_index"][:, 1] = arguments["expert_index"][:, 0]
    arguments["expert_index"][::2] = arguments["expert_index"][::2, :1]
    expected, bound = reference_moe_ffn(**arguments, activation=activation)
    assert_within(ops.moe_ffn(**arguments, activation=activation), expected, bound)


def classes(values: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 and 3 the infinities."""
    return values.isnan() + 2 * values.isposinf() + 3 * values.isneginf()


ACTIVATIONS = ["relu", "gelu", "gelu_new", "silu", "tanh", "relu6", "linear", "gated-relu", "gated-silu"]


@settings(max_examples=150, deadline=None)
@given(
    layers(),
    st.sampled_from(ACTIVATIONS),
    st.lists(
        st.tuples(st.sampled_from(["x", "wi", "wo", "gate"]), st.sampled_from(SPECIAL), st.integers(0, 2**30)),
        min_size=1,
        max_size=4,
    ),
)
@example(case_of(), "relu", [("x", math.nan, 70)])
@example(case_of(w_dtype=torch.bfloat16), "silu", [("wo", -math.inf, 70), ("x", math.inf, 3)])
@example(case_of(tokens=1, experts=1, d_model=1, d_ff=36, extra_slots=0, seed=0), "relu", [("x", -1e-42, 0)])
def test_special_values_have_the_class_of_the_reference(
    case: dict, activation: str, planted: list[tuple[str, float, int]]
) -> None:
    """NaN, infinities, zeros and denormals in tokens, weights and gates: where float64 has a NaN, an infinity or a
    finite number, so have we, and finite ones are within the bound."""
    case = case | {"tokens": min(case["tokens"], 12), "activation": activation}
    arguments, _ = arguments_of(case)
    for name, value, where in planted:
        tensor = arguments[name]
        if tensor.is_floating_point():
            at = torch.unravel_index(torch.tensor(where % tensor.numel()), tensor.shape)
            tensor[at] = value
        elif math.isfinite(value):  # integers have no such values; their scales are finite in any store
            scale = arguments[f"{name}_scale"]
            at = torch.unravel_index(torch.tensor(where % scale.numel()), scale.shape)
            scale[at] = value if scale.is_floating_point() else 0  # an exponent: the smallest
    expected, bound = reference_moe_ffn(**arguments, activation=activation)
    found = ops.moe_ffn(**arguments, activation=activation)
    assert torch.equal(classes(found), classes(expected))
    finite = expected.isfinite() & bound.isfinite()
    assert_within(found[finite], expected[finite], bound[finite])


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
def test_denormal_tokens_are_not_flushed(x_dtype: torch.dtype, w_dtype: torch.dtype | str) -> None:
    """Tokens below the smallest normal number, made large by the gate: a kernel that flushes them gives zeros. Tiles of
    bfloat16 do (docs/instruction_sets.md), where a token is below bfloat16's smallest normal number."""
    arguments, _ = arguments_of(case_of(x_dtype=x_dtype, w_dtype=w_dtype, activation="linear"))
    tiny = torch.finfo(x_dtype).tiny
    arguments["x"] = (torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * tiny / 8).to(x_dtype)
    assert arguments["x"].abs().max() < tiny
    arguments["gate"] = torch.full((9, 1), 2.0**100 if x_dtype != torch.float16 else 2.0**12)
    arguments["expert_index"] = torch.zeros(9, 1, dtype=torch.long)
    expected, bound = reference_moe_ffn(**arguments, activation="linear")
    found = ops.moe_ffn(**arguments, activation="linear")
    if _C.instruction_set() == "amx" and w_dtype == torch.bfloat16 and x_dtype != torch.float16:
        assert not found.any()
        return
    assert (found != 0).any()
    assert ((found.double() - expected).abs() <= 1e-2 * bound).all()
