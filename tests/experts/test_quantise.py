"""Quantised weights: formats, errors against brute force, and GPT-OSS's blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sida_ext.experts.quantise import Quantised, quantise
from tests.support.reference import unpacked

INT4 = torch.arange(-8.0, 8)
E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Largest relative error on normal weights; int4 by its largest value alone, unsearched, makes 0.088.
NORMAL_ERROR = {"int8": 0.0095, "int4": 0.083, "mxfp4": 0.113}


def relative(weight: torch.Tensor, quantised: Quantised) -> float:
    return float((quantised.dequantise() - weight).norm() / weight.norm())


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4"])
def test_error_on_normal_weights(dtype):
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    quantised = quantise(weight, dtype)
    assert quantised.dtype == dtype
    assert relative(weight, quantised) < NORMAL_ERROR[dtype]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 100),
    dtype=st.sampled_from(["int4", "mxfp4"]),
    scale=st.sampled_from([1.0, 1e-30, 1e-6, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_stored_is_what_the_format_says_and_no_worse_than_by_a_plain_factor(rows, columns, dtype, scale, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    quantised = quantise(weight, dtype)
    stored = quantised.dequantise()
    assert torch.equal(stored.double(), unpacked(quantised.values, quantised.scale, columns))
    # mxfp4: no power of two is better. int4: never worse than by the factor that puts the largest value at -8.
    padded = torch.nn.functional.pad(weight, (0, -columns % 32)).double().unflatten(1, (-1, 32))
    end = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    if dtype == "mxfp4":
        powers = torch.floor(torch.log2(end.abs().clamp(min=2.0**-120))) + torch.tensor([-3.0, -2, -1, 0])
        factors, values = 2.0 ** powers.clamp(-127, 127), E2M1
    else:
        factors, values = (end / -8).float().half().double(), INT4
    grid = factors[..., None] * values.double()  # [rows, groups, factors, 16]
    nearest = (padded[:, :, None, :, None] - grid[:, :, :, None, :]).abs().amin(-1)
    best = nearest.square().sum(-1).amin(-1)
    found = (
        (torch.nn.functional.pad(stored, (0, -columns % 32)).double().unflatten(1, (-1, 32)) - padded).square().sum(-1)
    )
    assert (found <= (1 + 1e-4) * best + 1e-6 * padded.square().sum(-1)).all()


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4"])
def test_zeros_stay_zeros(dtype):
    weight = torch.zeros(3, 70)
    weight[1, 40] = 1.0
    stored = quantise(weight, dtype).dequantise()
    assert torch.equal(stored, weight)


def test_a_matrix_on_the_grid_stays_as_it_is():
    """Also with factors among the denormal ones of float16, and with powers of two at both ends."""
    random = torch.Generator().manual_seed(3)
    scale = torch.rand(200, 2, generator=random).mul(20).sub(18).exp2().half()
    codes = torch.randint(0, 256, (200, 32), dtype=torch.uint8, generator=random)
    codes[:, ::16] = 0x88  # each group has a value at the end of its range
    weight = Quantised(codes, scale, 64).dequantise()
    found = quantise(weight, "int4")
    assert torch.equal(found.dequantise(), weight)
    assert torch.equal(found.scale, scale)
    codes[:, ::16] = 0x77
    weight = Quantised(codes, torch.randint(1, 250, (200, 2), dtype=torch.uint8, generator=random), 64).dequantise()
    assert torch.equal(quantise(weight, "mxfp4").dequantise(), weight)


def test_every_factor_is_read_exactly():
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)[:, None]
    ones = torch.full((2**16, 16), 0x11, dtype=torch.uint8)
    assert torch.equal(Quantised(ones, halves, 1).dequantise().isnan(), halves.isnan())
    assert torch.equal(Quantised(ones, halves, 1).dequantise().nan_to_num(), halves.float().nan_to_num())
    powers = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = [2.0 ** (exponent - 127) for exponent in range(255)]
    found = Quantised(torch.full((256, 16), 0x22, dtype=torch.uint8), powers, 1).dequantise()[:, 0]
    assert found[:-1].tolist() == expected
    assert bool(found[-1].isnan())


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4"])
def test_a_matrix_without_rows_has_none(dtype):
    assert quantise(torch.zeros(0, 70), dtype).dequantise().shape == (0, 70)


def test_what_counts_more_is_rounded_better():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(256)
    importance[::8] = 50.0
    for dtype in ("int4", "mxfp4"):
        plain, weighted = (quantise(weight, dtype, i).dequantise() - weight for i in (None, importance))
        assert weighted[:, ::8].norm() < (0.95 if dtype == "int4" else 1.0) * plain[:, ::8].norm()
        assert (weighted.square() * importance).sum() < (plain.square() * importance).sum()


def test_gpt_oss_blocks_are_these_bits():
    """Blocks [experts, rows, groups, 16] and scales [experts, rows, groups] of a checkpoint, flattened."""
    random = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(110, 130, (2, 6, 3), dtype=torch.uint8, generator=random)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(Quantised(blocks.flatten(-2), scales, 96).dequantise(), expected)


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="dtype is 'int3', expected one of int8, int4, mxfp4"):
        quantise(torch.zeros(2, 2), "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(torch.tensor([[float("nan")]]), "int4")
    with pytest.raises(ValueError, match="a weight is 1e\\+06, expected at most 524032 for int4"):
        quantise(torch.tensor([[1e6]]), "int4")
