"""Quantised checkpoints: the numbers that transformers dequantises, and MXFP4 kept as it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sida_ext.experts.record import stored_expert
from sida_ext.experts.store import open_store
from sida_ext.models.packing import pack, source_of
from tests.support.checkpoints import assert_experts_are, edit_config, edit_weights
from tests.support.families import tiny_model

BLOCK = 16


def to_fp8(weights: dict[str, Tensor]) -> None:
    """Every projection as float8 with a factor for each block of 16 x 16, as DeepSeek-V3 and Qwen3 FP8 come."""
    for key in [key for key, weight in weights.items() if key.endswith("_proj.weight") and weight.dim() == 2]:
        weight = weights[key].float()
        if weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
            continue
        blocks = weight.reshape(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        weights[key] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        weights[f"{key}_scale_inv"] = scale


def to_mxfp4(weights: dict[str, Tensor]) -> None:
    """Experts as random blocks and scales, GPT-OSS's layout."""
    random = torch.Generator().manual_seed(0)
    for key in [key for key in weights if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, outer = weights.pop(key).shape
        shape = (experts, outer, inner // 32)
        weights[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        weights[f"{key}_scales"] = torch.randint(110, 130, shape, dtype=torch.uint8, generator=random)


def saved(folder: Path, family: str, quantise, found: dict, **changes) -> type:
    model = tiny_model(family, **changes)[1].bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    edit_weights(folder, quantise)
    edit_config(folder, quantization_config=found)
    return type(model)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


@pytest.mark.parametrize(("family", "changes"), [("deepseek_v3", {}), ("qwen3_moe", {}), ("mixtral", {})])
def test_block_scaled_fp8_is_dequantised_as_transformers_does(family, changes, tmp_path, monkeypatch):
    quantise = to_fp8

    def to_fp8_w(weights: dict[str, Tensor]) -> None:  # Mixtral's matrices are called w1, w2 and w3
        renamed = {key: key.replace(".weight", "_proj.weight") for key in weights if ".experts." in key}
        for key, other in renamed.items():
            weights[other] = weights.pop(key)
        to_fp8(weights)
        for key in [key for key in weights if "_proj.weight" in key and ".experts." in key]:
            weights[key.replace("_proj.weight", ".weight")] = weights.pop(key)

    if family == "mixtral":
        quantise = to_fp8_w
    sizes = {} if family == "mixtral" else {"moe_intermediate_size": 32}
    model_class = saved(tmp_path, family, quantise, FP8, **sizes, **changes)
    # transformers asks for accelerate before it dequantises, and does not use it then.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    loaded = model_class.from_pretrained(
        tmp_path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    with source_of(tmp_path) as source:
        assert source.layout.endswith("block-scaled")
        assert source.expert(0, 0).wi.dtype == torch.bfloat16
        assert_experts_are(source, loaded)


def test_a_factor_that_is_missing_is_an_error(tmp_path):
    saved(tmp_path, "qwen3_moe", to_fp8, FP8, moe_intermediate_size=32)
    edit_weights(tmp_path, lambda w: w.pop("model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"))
    with pytest.raises(ValueError, match=r"has 7 tensors .*weight_scale_inv\$?, .* expert 3 is missing"):
        pack(tmp_path, tmp_path / "x.sida")


@pytest.fixture
def gpt_oss(tmp_path) -> Path:
    saved(tmp_path, "gpt_oss", to_mxfp4, {"quant_method": "mxfp4"}, hidden_size=64, intermediate_size=96)
    return tmp_path


def test_mxfp4_is_dequantised_as_transformers_does(gpt_oss):
    loaded = transformers.GptOssForCausalLM.from_pretrained(
        gpt_oss, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    with source_of(gpt_oss) as source:
        assert source.layout.endswith("transposed, gate and up in turns, MXFP4")
        assert_experts_are(source, loaded)
        blocks = source.files.tensor("model.layers.0.mlp.experts.down_proj_blocks")
        scales = source.files.tensor("model.layers.0.mlp.experts.down_proj_scales")
        assert torch.equal(source.expert(0, 3).wo, convert_moe_packed_tensors(blocks, scales)[3].T)


def test_mxfp4_is_kept_bit_for_bit_in_a_store_of_that_type(gpt_oss):
    header = pack(gpt_oss, gpt_oss / "x.sida", "mxfp4")
    assert header.rounding == (0.0, 0.0, 0.0)
    store, _ = open_store(gpt_oss / "x.sida")
    with source_of(gpt_oss) as source:
        for layer, name in enumerate(source.layers):
            for index in range(source.num_experts):
                record = np.asarray(store.read(layer, index))[: header.record_bytes].copy()
                stored, exact = stored_expert(memoryview(record), header), source.expert(layer, index)
                for found, expected in ((stored.wi, exact.wi), (stored.wo, exact.wo)):
                    assert torch.equal(found.dequantise(), expected.float())
                assert torch.equal(stored.wi_bias, exact.wi_bias.float())
                assert torch.equal(stored.wo_bias, exact.wo_bias.float())
                # The bytes of the file: the gate's rows, then the other ones.
                blocks = source.files.tensor(f"{name}.gate_up_proj_blocks")[index]
                assert torch.equal(stored.wi.values, torch.cat([blocks[::2], blocks[1::2]]).flatten(1))
        assert source.expert(0, 0, "int4").wi.dtype == torch.bfloat16


def test_int4_of_mxfp4_says_what_it_moved(gpt_oss):
    assert all(0 < error < 0.2 for error in pack(gpt_oss, gpt_oss / "x.sida", "int4").rounding)
