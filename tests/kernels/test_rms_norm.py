"""``torch.ops.sida.rms_norm``: values against float64, a row's bits in any company, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersLayerNorm

from sida_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def case(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator) + 0.5
    return x.to(dtype), (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 96, 100, 2048])
def test_the_norm_is_the_formula(dtype, columns):
    x, weight = case(dtype, 5, 2, columns)
    factor = (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    # Two roundings: before the weight and after it.
    allowed = 2.01 * torch.finfo(dtype).eps + (1e-6 if dtype == torch.float32 else 0)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, EPS).double(), x.double() * factor * weight.double(), rtol=allowed, atol=1e-12
    )


@pytest.mark.parametrize("kind", [SwitchTransformersLayerNorm, Qwen3MoeRMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_where_the_models_round(kind, dtype):
    x, weight = case(dtype, 400, 64)
    norm = kind(64, eps=EPS).to(dtype)
    norm.weight.data.copy_(weight)
    with torch.no_grad():
        expected, found = norm(x), ops.rms_norm(x, weight, EPS)
    # Sums in another order move few roundings; one rounding in all would move a quarter of them.
    assert (found != expected).float().mean() < 0.01


def test_no_more_than_the_row_and_eps_count():
    x, weight = case(torch.float32, 40, 33)
    alone = torch.cat([ops.rms_norm(x[row : row + 1], weight, EPS) for row in range(40)])
    x[7], x[8, 3] = float("inf"), float("nan")
    found = ops.rms_norm(x, weight, EPS)
    others = [row for row in range(40) if row not in (7, 8)]
    assert torch.equal(found[others], alone[others])
    assert found[7].isnan().all()  # inf times 1 / inf
    assert found[8].isnan().all()
    assert torch.equal(ops.rms_norm(torch.zeros(2, 8), torch.ones(8), EPS), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company_and_with_any_threads(dtype):
    x, weight = case(dtype, 600, 100)  # enough for several threads
    whole = ops.rms_norm(x, weight, EPS)
    for first, last in ((0, 1), (3, 20), (599, 600), (100, 500)):
        assert torch.equal(ops.rms_norm(x[first:last], weight, EPS), whole[first:last])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.rms_norm(x, weight, EPS), whole)
    finally:
        torch.set_num_threads(threads)
    strided = torch.stack([x, x], dim=1)[:, 1]
    assert not strided.is_contiguous()
    assert torch.equal(ops.rms_norm(strided, weight, EPS), whole)
    assert ops.rms_norm(x[:0], weight, EPS).shape == (0, 100)


PRINT = """
import hashlib, torch
from sida_ext import ops
from tests.kernels.test_rms_norm import DTYPES, EPS, case
for dtype in DTYPES:
    for columns in (7, 64, 100):
        print(hashlib.sha256(ops.rms_norm(*case(dtype, 9, columns), EPS).float().numpy().tobytes()).hexdigest())
"""


def test_every_instruction_set_has_the_same_bits():
    found = {}
    for name in ("scalar", None):
        environment = dict(os.environ) | ({} if name is None else {"SIDA_CPU": name})
        done = subprocess.run(
            [sys.executable, "-c", PRINT], capture_output=True, text=True, env=environment, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout.split()
    assert len(found["scalar"]) == 9
    assert found["scalar"] == found[None]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "x has dtype Int"),
        ({"x": torch.zeros(())}, ValueError, "x has 0 dimensions"),
        ({"weight": torch.zeros(7)}, ValueError, "weight has"),
        ({"weight": torch.zeros(1, 8)}, ValueError, "weight has"),
        ({"weight": torch.zeros(8, dtype=torch.bfloat16)}, TypeError, "weight has dtype .*expected .*that of x"),
        ({"eps": -1.0}, ValueError, "eps is -1"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "eps": EPS} | change
    with pytest.raises(error, match=message):
        ops.rms_norm(**given)


def test_the_op_is_as_torch_wants_it():
    x, weight = case(torch.float32, 2, 3, 8)
    torch.library.opcheck(torch.ops.sida.rms_norm.default, (x, weight, EPS))
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match="rms_norm has no backward"):
        ops.rms_norm(x, weight, EPS).sum().backward()
