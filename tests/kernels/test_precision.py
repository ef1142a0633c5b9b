"""set_precision: what it takes where, its stated bound, and that exact stays exact."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sida_ext
from sida_ext import _C, ops
from sida_ext.experts.quantise import quantise
from tests.kernels.test_moe_ffn_invariance import arguments_of, layers, rows_of, same_bits
from tests.support.native_build import ROOT
from tests.support.reference import activate, fast_error, unpacked

WITH_FAST = "fast" in sida_ext.precisions()
needs_fast = pytest.mark.skipif(
    not WITH_FAST, reason=f"the instruction set in force, {_C.instruction_set()}, has no kernels for 'fast'"
)
QUANTISED = [torch.int8, "int4", "mxfp4"]


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


def test_a_set_without_it_does_not_pretend():
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
        [sys.executable, "-c", code], env=os.environ | {"SIDA_CPU": "scalar"}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "precision is 'fast', but the instruction set in force, scalar, lacks kernels that round activations, so that "
        "it would change nothing; expected 'exact'",
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


def dense(arguments: dict, name: str, columns: int) -> Tensor:
    """The stored weights in float64, [slots, rows, columns]."""
    weight, scale = arguments[name], arguments.get(f"{name}_scale")
    if scale is None:
        return weight.double()
    if weight.dtype == torch.uint8:
        return unpacked(weight, scale, columns)
    return weight.double() * scale.double()[:, :, None]


def stated_bound(arguments: dict, activation: str, stored: torch.dtype | str) -> tuple[Tensor, Tensor]:
    """One expert's output in float64 and how far set_precision's docstring lets "fast" be from it."""
    x = arguments["x"].double()
    d_ff = arguments["wi"].shape[1]
    wi, wo = dense(arguments, "wi", x.shape[1]), dense(arguments, "wo", d_ff)
    out, allowed = torch.zeros_like(x), torch.zeros_like(x)
    for token in range(x.shape[0]):
        expert = int(arguments["expert_index"][token, 0])
        if expert < 0:
            continue
        slot, gate = int(arguments["slot_of_expert"][expert]), float(arguments["gate"][token, 0])
        rows = wi[slot] @ x[token]
        error = fast_error(wi[slot], x[token], torch.zeros(x.shape[1], dtype=torch.float64), stored)
        hidden = activate(activation, rows)
        # Over the interval in which the sum may lie; an activation here has at most one turn in it.
        moved = torch.stack([activate(activation, rows + error * step / 8) for step in range(-8, 9)])
        hidden_error = (moved - hidden).abs().max(0).values * 1.01 + 1e-6 * hidden.abs()
        out[token] = gate * (wo[slot] @ hidden)
        allowed[token] = abs(gate) * fast_error(wo[slot], hidden, hidden_error, stored)
    info = torch.finfo(arguments["x"].dtype)
    ulp = out.abs().clamp(min=info.smallest_normal) * info.eps  # denormals stand as far apart as the smallest others
    return out, allowed + ulp + 1e-30


@needs_fast
@settings(max_examples=80, deadline=None)
@given(layers(), st.sampled_from([torch.bfloat16, *QUANTISED]))
def test_fast_is_within_its_bound_and_batch_invariant(case, w_dtype):
    case = case | {"w_dtype": w_dtype, "top_k": 1, "activation": "gelu", "tokens": min(case["tokens"], 20)}
    arguments, activation = arguments_of(case)
    sida_ext.set_precision("fast")
    found = ops.moe_ffn(**arguments, activation=activation)
    expected, allowed = stated_bound(arguments, activation, w_dtype)
    assert ((found.double() - expected).abs() <= allowed).all()
    assert same_bits(ops.moe_ffn(**rows_of(arguments, torch.tensor([0])), activation=activation), found[:1])


@needs_fast
@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 100),
    columns=st.integers(1, 200),
    w_dtype=st.sampled_from(["int8", "int4", "mxfp4"]),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    powers=st.lists(st.integers(-149, 90), min_size=7, max_size=7),
    seed=st.integers(0, 2**16),
)
def test_products_of_groups_of_any_size_are_within_the_bound(tokens, rows, columns, w_dtype, x_dtype, powers, seed):
    """Groups of activations from denormal to huge, some zero, beside each other."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 2.0 ** (-(seed % 7))
    quantised = quantise(weight, w_dtype)
    x = torch.randn(tokens, columns, generator=random)
    x *= (torch.rand(tokens, columns, generator=random) < 0.8).float()
    for group, power in enumerate(powers):
        x[:, group * 32 : group * 32 + 32] = (x[:, group * 32 : group * 32 + 32].double() * 2.0**power).float()
    x = x.to(x_dtype)
    sida_ext.set_precision("fast")
    found = ops.linear(x, quantised.values, quantised.scale)
    stored = {"w": quantised.values[None], "w_scale": quantised.scale[None]}
    weight = dense(stored, "w", columns)[0]
    for token in range(tokens):
        values = x[token].double()
        allowed = fast_error(weight, values, torch.zeros_like(values), w_dtype)
        expected = weight @ values
        ulp = expected.abs().clamp(min=torch.finfo(x_dtype).tiny) * torch.finfo(x_dtype).eps
        assert ((found[token].double() - expected).abs() <= allowed + ulp).all()


@needs_fast
@pytest.mark.parametrize("w_dtype", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 3, 9, 33])
def test_no_product_of_bytes_saturates(w_dtype, tokens):
    """Rows of one weight each, the least and the greatest of the format, times the largest q of either sign."""
    codes = {
        "int8": [-128, 127, -127, 1],
        "int4": [0x88, 0x77, 0x99, 0x11],
        "mxfp4": [0x77, 0xFF, 0x11, 0x99],
    }[w_dtype]
    columns = 1184
    if w_dtype == "int8":
        weight = torch.tensor(codes, dtype=torch.int8)[:, None].expand(4, columns).contiguous()
        scale = torch.ones(4)
        values = weight.double()
    else:
        weight = torch.tensor(codes, dtype=torch.uint8)[:, None].expand(4, columns // 2).contiguous()
        scale = torch.ones(4, columns // 32).half() if w_dtype == "int4" else torch.full((4, columns // 32), 127).byte()
        values = unpacked(weight, scale, columns)
    x = torch.full((tokens, columns), 127.0) * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)[:, None]
    sida_ext.set_precision("fast")
    found = ops.linear(x, weight, scale).double()
    torch.testing.assert_close(found, x.double() @ values.T, rtol=1e-5, atol=0.0)


@needs_fast
@pytest.mark.parametrize("w_dtype", [torch.bfloat16, *QUANTISED], ids=str)
def test_bits_depend_on_neither_batch_nor_threads_nor_slots(w_dtype):
    case = {
        "tokens": 77, "top_k": 2, "d_model": 1130, "d_ff": 215, "experts": 3, "extra_slots": 1,
        "x_dtype": torch.float32, "w_dtype": w_dtype, "activation": "gated-silu", "padding": 3, "seed": 11,
    }  # fmt: skip
    arguments, activation = arguments_of(case)
    exact = ops.moe_ffn(**arguments, activation=activation)
    sida_ext.set_precision("fast")
    together = ops.moe_ffn(**arguments, activation=activation)
    # With bfloat16 weights not every set has anything to round.
    assert w_dtype == torch.bfloat16 or not same_bits(together, exact)
    for part in ([0], [76], [5, 6], list(range(9)), list(range(30, 70))):
        rows = torch.tensor(part)
        assert same_bits(ops.moe_ffn(**rows_of(arguments, rows), activation=activation), together[rows])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert same_bits(ops.moe_ffn(**arguments, activation=activation), together)
    finally:
        torch.set_num_threads(before)
    elsewhere = arguments | {name: arguments[name].flip(0) for name in arguments if name.startswith(("wi", "wo"))}
    elsewhere["slot_of_expert"] = arguments["wi"].shape[0] - 1 - arguments["slot_of_expert"]
    assert same_bits(ops.moe_ffn(**elsewhere, activation=activation), together)


@needs_fast
@pytest.mark.parametrize("w_dtype", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_makes_its_own_rows_nan(w_dtype, special):
    quantised = quantise(torch.randn(40, 100), w_dtype)
    x = torch.randn(5, 100)
    sida_ext.set_precision("fast")
    plain = ops.linear(x, quantised.values, quantised.scale)
    x[2, 97] = special
    found = ops.linear(x, quantised.values, quantised.scale)
    assert found[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    assert same_bits(found[others], plain[others])


@needs_fast
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float16], ids=str)
def test_fast_changes_nothing_for_other_weights(w_dtype):
    case = {
        "tokens": 9, "top_k": 1, "d_model": 64, "d_ff": 96, "experts": 3, "extra_slots": 0,
        "x_dtype": torch.float32, "w_dtype": w_dtype, "activation": "relu", "padding": 0, "seed": 5,
    }  # fmt: skip
    arguments, activation = arguments_of(case)
    exact = ops.moe_ffn(**arguments, activation=activation)
    sida_ext.set_precision("fast")
    assert same_bits(ops.moe_ffn(**arguments, activation=activation), exact)


@pytest.mark.parametrize("instructions", [name for name in _C.instruction_sets() if name != "scalar"])
def test_every_set_of_this_machine_that_has_it(instructions):
    """The checks above, once more with another set in force."""
    if os.environ.get("SIDA_CPU") is not None:
        pytest.skip("already under a set that was chosen")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"SIDA_CPU": instructions, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


BITS = """
import hashlib
import torch
import sida_ext
from sida_ext import ops
from sida_ext.experts.quantise import quantise
random = torch.Generator().manual_seed(4)
sida_ext.set_precision("fast")
for w_dtype in ("int8", "int4", "mxfp4"):
    for tokens, rows, columns in ((1, 5, 31), (3, 16, 96), (9, 37, 1130), (40, 50, 200)):
        made = quantise(torch.randn(rows, columns, generator=random), w_dtype)
        out = ops.linear(torch.randn(tokens, columns, generator=random), made.values, made.scale)
        print(w_dtype, tokens, hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_products_of_bytes_have_the_same_bits_on_every_set():
    found = {}
    for instructions in _C.instruction_sets():
        if instructions == "scalar":
            continue
        done = subprocess.run(
            [sys.executable, "-c", BITS],
            env=os.environ | {"SIDA_CPU": instructions, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if "precision is 'fast', but" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        found[instructions] = done.stdout
    assert len(set(found.values())) <= 1, found
