"""torch.ops.sida.linear: values against float64 in every format, bits, bad input, opcheck and torch.compile."""

from __future__ import annotations

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
from tests.support.reference import assert_within, unpacked

X_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W_DTYPES = [torch.float32, torch.bfloat16, torch.float16, "int8", "int4", "mxfp4"]


def matrix(rows: int, columns: int, w_dtype: torch.dtype | str, seed: int = 0) -> dict[str, Tensor]:
    """``weight`` and ``scale`` of linear."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    if isinstance(w_dtype, torch.dtype):
        return {"weight": weight.to(w_dtype)}
    quantised = quantise(weight, w_dtype)
    return {"weight": quantised.values, "scale": quantised.scale}


def reference(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None):
    """The product in float64 over the stored weights, and what an error may be measured against."""
    stored = weight.double()
    if scale is not None:
        int8 = weight.dtype == torch.int8
        stored = stored * scale.double()[:, None] if int8 else unpacked(weight, scale, x.shape[-1])
    expected, bound = x.double() @ stored.T, x.double().abs() @ stored.T.abs()
    if bias is not None:
        expected, bound = expected + bias.double(), bound + bias.double().abs()
    return expected, bound


def check(x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    actual = ops.linear(x, **arguments)
    assert actual.dtype == x.dtype
    assert actual.shape == (*x.shape[:-1], arguments["weight"].shape[0])
    assert_within(actual, *reference(x, **arguments))
    return actual


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 80),
    rows=st.integers(0, 260),
    columns=st.integers(1, 200),
    x_dtype=st.sampled_from(X_DTYPES),
    w_dtype=st.sampled_from(W_DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_is_within_the_bound(tokens, rows, columns, x_dtype, w_dtype, biased, seed):
    random = torch.Generator().manual_seed(seed)
    arguments = matrix(rows, columns, w_dtype, seed)
    if biased:
        arguments["bias"] = torch.randn(rows, generator=random)
    check(torch.randn(tokens, columns, generator=random).to(x_dtype), arguments)


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 1100])
def test_large_matrices_and_many_tokens(tokens, w_dtype):
    """More tokens than are packed at once, rows of several segments, more rows than tasks."""
    columns = 1300 if tokens > 1000 else 4500
    check(torch.randn(tokens, columns), matrix(700, columns, w_dtype))


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
def test_a_row_is_the_same_alone_in_a_batch_and_on_any_number_of_threads(w_dtype):
    arguments = matrix(500, 640, w_dtype) | {"bias": torch.randn(500)}
    x = torch.randn(600, 640)
    together = ops.linear(x, **arguments)
    for token in (0, 31, 32, 511, 512, 599):
        assert torch.equal(ops.linear(x[token : token + 1], **arguments)[0], together[token])
        assert torch.equal(ops.linear(x[token], **arguments), together[token])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(ops.linear(x, **arguments), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
def test_views_of_any_shape_and_stride(w_dtype):
    arguments = matrix(48, 96, w_dtype)
    x = torch.randn(3, 5, 96)
    flat = ops.linear(x.reshape(15, 96), **arguments)
    assert torch.equal(ops.linear(x, **arguments), flat.view(3, 5, 48))
    assert torch.equal(ops.linear(x.transpose(0, 1), **arguments), flat.view(3, 5, 48).transpose(0, 1))
    wide = torch.randn(15, 200)
    wide[:, 7:103] = x.reshape(15, 96)
    assert torch.equal(ops.linear(wide[:, 7:103], **arguments), flat)
    columns = x.reshape(15, 96).t().contiguous().t()
    assert columns.stride(1) != 1
    assert torch.equal(ops.linear(columns, **arguments), flat)
    weight = arguments["weight"]
    padded = torch.full((48, weight.shape[1] + 19), 3, dtype=weight.dtype)
    padded[:, : weight.shape[1]] = weight
    arguments["weight"] = padded[:, : weight.shape[1]]
    if w_dtype in ("int4", "mxfp4"):
        scale = arguments["scale"]
        far = torch.full((48, 11), 9, dtype=scale.dtype)
        far[:, 2:5] = scale
        arguments["scale"] = far[:, 2:5]
    assert torch.equal(ops.linear(x.reshape(15, 96), **arguments), flat)


def good(w_dtype="int4", **changes):
    return {"x": torch.zeros(2, 64)} | matrix(48, 64, w_dtype) | changes


BAD = [
    (good(x=torch.zeros(2, 64).double()), TypeError, r"linear: x has dtype Double, expected float32"),
    (good(x=torch.zeros(2, 0)), ValueError, r"x has shape \[2, 0\], expected .* at least one column"),
    (good(x=torch.zeros(2, 96)), ValueError, r"weight has shape \[48, 32\], expected 48 \(16 for each 32 columns"),
    (good(torch.float32, x=torch.zeros(2, 65)), ValueError, r"weight has shape .* expected 65 \(columns, as in x"),
    (good(weight=torch.zeros(48, 64).long()), TypeError, r"weight has dtype Long, expected float32, bfloat16, float16"),
    (good(weight=torch.zeros(2, 48, 32).byte()), ValueError, r"weight has shape .* expected 2 dimensions"),
    (good(scale=None), ValueError, r"weight has dtype uint8, .* needs scale: float16 for int4, uint8 for mxfp4"),
    (good(scale=torch.zeros(48, 2)), TypeError, r"scale has dtype Float, expected float16 \(int4\) or uint8"),
    (good(scale=torch.zeros(48, 3).half()), ValueError, r"scale has shape \[48, 3\], expected \[48, 2\]"),
    (good("int8", scale=None), ValueError, r"weight has dtype int8 and needs scale, a float32 tensor of shape \[48\]"),
    (good("int8", scale=torch.zeros(48, 2)), ValueError, r"scale has shape \[48, 2\], expected \[48\]"),
    (good(torch.float32, scale=torch.zeros(48)), ValueError, r"scale was given, but weight has dtype Float"),
    (good(bias=torch.zeros(48).bfloat16()), TypeError, r"bias has dtype BFloat16, expected float32"),
    (good(bias=torch.zeros(47)), ValueError, r"bias has shape \[47\], expected \[48\]"),
    (good(torch.float32, weight=torch.zeros(64, 48).t()), ValueError, r"rows of weight are not contiguous"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear(**arguments)


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(w_dtype, biased):
    arguments = matrix(24, 40, w_dtype)
    bias = torch.randn(24) if biased else None
    torch.library.opcheck(
        torch.ops.sida.linear.default, (torch.randn(2, 3, 40), arguments["weight"], arguments.get("scale"), bias)
    )


def test_compiles_without_a_graph_break():
    arguments = matrix(32, 64, "int4")

    def step(x):
        return torch.relu(ops.linear(x * 2, **arguments)) + 1

    x = torch.randn(5, 64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))


@pytest.mark.parametrize("wanting", ["x", "bias"])
def test_backward_raises(wanting):
    x, bias = torch.randn(3, 64), torch.randn(48)
    {"x": x, "bias": bias}[wanting].requires_grad_(True)
    out = ops.linear(x, **matrix(48, 64, "int4"), bias=bias)
    with pytest.raises(NotImplementedError, match="linear has no backward"):
        out.sum().backward()


SUBPROCESS = """
import torch
from tests.kernels.test_linear import W_DTYPES, check, matrix
from sida_ext import _C
for seed, w_dtype in enumerate(W_DTYPES * 2):
    columns = 90 + 31 * seed
    check(torch.randn(seed * 5 + 1, columns), matrix(61 + seed, columns, w_dtype))
print(_C.instruction_set())
"""


@pytest.mark.parametrize("instructions", _C.instruction_sets())
def test_every_instruction_set_of_this_machine(instructions: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SUBPROCESS],
        env=os.environ | {"SIDA_CPU": instructions, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == instructions
