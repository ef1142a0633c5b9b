"""Experts counted from headers, beside what transformers itself makes of the same checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext import _C
from sida_ext.models import dense
from sida_ext.models.seam_source import expert_facts
from sida_ext.planning import counting
from sida_ext.planning.capacity import (
    DENSE_DTYPES,
    EXPERT_DTYPES,
    experts_bytes,
    kv_cache_bytes,
    other_bytes,
    record_bytes,
    room,
)
from sida_ext.planning.counting import ExpertShape, count_experts
from sida_ext.planning.headers import CheckpointHeaders, TensorHeader, read_headers
from tests.planning.tiny import FAMILIES, experts_of, save_tiny
from tests.support.reference import build, small_config


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_loaded_model(family, tmp_path):
    model = save_tiny(family, tmp_path)
    facts = count_experts(read_headers(tmp_path))
    modules = experts_of(model)
    assert [name.rsplit(".", 1)[0] for name in modules] == [
        layer.removesuffix(".experts").replace(
            "block_sparse_moe", "mlp" if family != "granitemoe" else "block_sparse_moe"
        )
        for layer in facts.layers
    ]
    weights = sum(
        tensor.numel()
        for module in modules.values()
        for name, tensor in module.named_parameters()
        if "bias" not in name
    )
    biases = sum(
        tensor.numel() for module in modules.values() for name, tensor in module.named_parameters() if "bias" in name
    )
    everything = sum(tensor.numel() for tensor in model.state_dict().values())
    assert facts.expert_numbers == weights
    assert facts.shape.biased == (biases > 0)
    assert facts.shape.gated
    assert facts.other_numbers == everything - weights - biases
    assert facts.experts == 4
    assert facts.top_k == 2
    assert other_bytes(facts) == 2 * facts.other_numbers  # saved in bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_packer(family, tmp_path):
    """By transformers' own conversion rules, as sida_ext.models reads a checkpoint."""
    packed = expert_facts(save_tiny(family, tmp_path))
    facts = count_experts(read_headers(tmp_path))
    assert (len(facts.layers), facts.experts) == (len(packed.layers), packed.num_experts)
    assert facts.shape == ExpertShape(packed.d_model, packed.d_ff, packed.gated, packed.biased)
    assert {facts.top_k} == set(packed.top_k)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_cache_is_as_large_as_transformers_makes_it(family, tmp_path):
    model = save_tiny(family, tmp_path)
    facts = count_experts(read_headers(tmp_path))
    tokens = 12  # gpt_oss: more than the window of 8, of which transformers keeps one less
    with torch.no_grad():
        cache = model(torch.arange(3, 3 + tokens)[None], use_cache=True).past_key_values
    made = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 2
    assert made <= kv_cache_bytes(facts, tokens) <= made * 8 / 7
    if family != "gpt_oss":
        assert kv_cache_bytes(facts, tokens) == made
    assert kv_cache_bytes(facts, tokens, batch=3) == 3 * kv_cache_bytes(facts, tokens)


@pytest.mark.parametrize("kind", [SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration])
def test_switch(kind, tmp_path):
    model = build(kind, small_config())
    model.save_pretrained(tmp_path)
    facts = count_experts(read_headers(tmp_path))
    weights = sum(tensor.numel() for name, tensor in model.named_parameters() if ".experts." in name)
    assert facts.expert_numbers == weights
    assert facts.other_numbers == sum(tensor.numel() for tensor in model.parameters()) - weights
    assert (facts.shape.gated, facts.top_k) == (False, 1)
    assert facts.encoder_only == (kind is SwitchTransformersEncoderModel)
    assert (facts.kv_numbers == 0) == facts.encoder_only


def test_layers_that_transformers_ignores_are_not_counted(tmp_path):
    save_tiny("deepseek_v3", tmp_path)
    plain = count_experts(read_headers(tmp_path))
    extra = {
        f"model.layers.3.mlp.experts.{expert}.{matrix}.weight": torch.zeros(shape, dtype=torch.bfloat16)
        for expert in range(4)
        for matrix, shape in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16)))
    }
    extra |= {
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(16, 32),
        "model.mtp.norm.weight": torch.zeros(32),
    }
    save_file(extra, tmp_path / "extra.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = count_experts(read_headers(tmp_path))
    assert (facts.layers, facts.expert_numbers, facts.other_numbers) == (
        plain.layers,
        plain.expert_numbers,
        plain.other_numbers,
    )
    assert facts.ignored_numbers == plain.ignored_numbers + sum(tensor.numel() for tensor in extra.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DENSE_DTYPES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "jamba"])
def test_dense_matrices_are_those_that_are_swapped(family, dtype, tied, tmp_path, monkeypatch):
    """What everything but the experts takes with a ``dense_dtype``, beside the loaded model."""
    assert counting.LARGE == dense.LARGE
    for module in (counting, dense):
        monkeypatch.setattr(module, "LARGE", 300)
    save_tiny(family, tmp_path, tie_word_embeddings=tied)
    facts = count_experts(read_headers(tmp_path))
    served = sida_ext.from_pretrained(tmp_path, dense_dtype=dtype, store_cache=tmp_path / "store")
    served.sida.close()
    linears = [module for module in served.modules() if isinstance(module, dense.DenseLinear)]
    assert sorted(facts.dense) == sorted((module.out_features, module.in_features) for module in linears)
    kept = [tensor for module in served.modules() for tensor in module._parameters.values() if tensor is not None]
    for module in served.modules():
        kept += [part for name, part in module._buffers.items() if name not in module._non_persistent_buffers_set]
    # Of what stays, routers in float32 (deepseek_v3) count as the configuration's type.
    numbers = sum({id(tensor): tensor.numel() for tensor in kept}.values())
    assert other_bytes(facts, dtype) == 2 * numbers + sum(module.matrix.bytes for module in linears)


def headers(config: dict, **tensors: tuple[str, tuple[int, ...]]) -> CheckpointHeaders:
    bits = {"BF16": 16, "U8": 8, "F8_E4M3": 8, "F32": 32}
    found = {
        name.replace("__", "."): TensorHeader(dtype, shape, math.prod(shape) * bits[dtype] // 8)
        for name, (dtype, shape) in tensors.items()
    }
    return CheckpointHeaders("made/up", config, found, None)


def fp8(experts: int = 4, width: int = 32, wide: int = 16, layers: int = 1, **config: object) -> CheckpointHeaders:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for expert in range(experts):
            for matrix, shape in (
                ("gate_proj", (wide, width)),
                ("up_proj", (wide, width)),
                ("down_proj", (width, wide)),
            ):
                name = f"model__layers__{layer}__mlp__experts__{expert}__{matrix}"
                tensors[f"{name}__weight"] = ("F8_E4M3", shape)
                tensors[f"{name}__weight_scale_inv"] = ("F32", (1, 1))
        tensors[f"model__layers__{layer}__self_attn__k_proj__weight"] = ("F8_E4M3", (16, width))
        tensors[f"model__layers__{layer}__self_attn__k_proj__weight_scale_inv"] = ("F32", (1, 1))
    return headers(
        {
            "model_type": "deepseek_v3",
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "hidden_size": 32,
            "moe_intermediate_size": 16,
            "num_hidden_layers": layers,
            "dtype": "bfloat16",
        }
        | config,
        **tensors,
    )


def test_fp8_weights_are_counted_without_their_scales():
    facts = count_experts(fp8(quantization_config={"quant_method": "fp8"}))
    assert facts.expert_numbers == 4 * 3 * 16 * 32
    assert facts.other_numbers == 16 * 32
    assert facts.expert_source_bytes == 4 * 3 * (16 * 32 + 4)
    assert experts_bytes(facts, "bfloat16") == 4 * 4096  # 3 KiB each, in whole records


def test_mxfp4_blocks_are_two_numbers_a_byte():
    config = {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    base = "model__layers__0__mlp__experts__"
    tensors = {
        f"{base}gate_up_proj_blocks": ("U8", (4, 192, 2, 16)),
        f"{base}gate_up_proj_scales": ("U8", (4, 192, 2)),
        f"{base}gate_up_proj_bias": ("BF16", (4, 192)),
        f"{base}down_proj_blocks": ("U8", (4, 64, 3, 16)),
        f"{base}down_proj_scales": ("U8", (4, 64, 3)),
        f"{base}down_proj_bias": ("BF16", (4, 64)),
        "model__layers__0__mlp__router__weight": ("BF16", (4, 64)),
    }
    facts = count_experts(headers(config, **tensors))
    assert facts.shapes == {ExpertShape(64, 96, True, True): 4}
    assert facts.other_numbers == 4 * 64
    assert facts.expert_source_bytes == 4 * (192 * 2 * 17 + 64 * 3 * 17 + 2 * (192 + 64))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": None}, "model_type in config.json is None"),
        ({"model_type": "brand_new_moe"}, "the family brand_new_moe is unknown"),
        ({"model_type": "nllb-moe"}, "nllb-moe is not served: transformers runs only two"),
        ({"model_type": "dbrx"}, "dbrx is not served: its experts are outside the seam"),
        ({"n_routed_experts": 8}, r"holds 4 experts, config\.json says 8"),
        (
            {"hidden_size": 48},
            r"first matrix of \[16, 32\] and a second of \[32, 16\]; config\.json gives a width of 48",
        ),
        ({"moe_intermediate_size": 24}, r"experts are 16 wide, config\.json's moe_intermediate_size is 24"),
        ({"num_hidden_layers": 2}, r"no tensor of layer 1, config\.json says 2 layers"),
        ({"num_experts_per_tok": 9}, "number of experts a token is 9"),
        ({"num_experts_per_tok": None}, "number of experts a token is None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq', expected none, fp8 or mxfp4"),
        ({"hidden_size": None}, "names no width"),
    ],
)
def test_headers_and_config_that_disagree(config, says):
    with pytest.raises(ValueError, match=says) as error:
        count_experts(fp8(**config))
    assert "made/up" in str(error.value)


def test_a_missing_expert_is_named():
    found = fp8()
    tensors = {name: tensor for name, tensor in found.tensors.items() if ".experts.2." not in name}
    with pytest.raises(ValueError, match=r"mlp\.experts has experts up to 3, but none of number 2"):
        count_experts(CheckpointHeaders("made/up", found.config, tensors, None))
    tensors = {name: tensor for name, tensor in found.tensors.items() if "experts.2.up" not in name}
    with pytest.raises(ValueError, match=r"experts\.2 has .*, expected up and down"):
        count_experts(CheckpointHeaders("made/up", found.config, tensors, None))


def test_a_model_without_experts():
    plain = headers({"model_type": "llama", "hidden_size": 8}, model__layers__0__mlp__up_proj__weight=("BF16", (8, 8)))
    with pytest.raises(ValueError, match=r"llama names no experts .* no Mixture of Experts"):
        count_experts(plain)
    with pytest.raises(ValueError, match="says 4 experts, but no tensor of the headers is an expert's"):
        count_experts(headers(fp8().config, model__layers__0__mlp__up_proj__weight=("BF16", (8, 8))))


def test_records_are_the_engines():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = ExpertShape(
            int(rng.integers(1, 3000)), int(rng.integers(1, 3000)), bool(rng.integers(2)), bool(rng.integers(2))
        )
        for dtype in EXPERT_DTYPES:
            try:
                expected = _C.ExpertFormat(shape.d_model, shape.d_ff, dtype, shape.gated, shape.biased).record_bytes
            except ValueError:
                assert dtype in ("int4", "mxfp4"), dtype  # a build without 4-bit kernels
                continue
            assert record_bytes(shape, dtype) == expected, (shape, dtype)


@pytest.mark.parametrize(("dtype", "bits"), EXPERT_DTYPES.items())
def test_a_large_record_has_the_bits_of_its_type(dtype, bits):
    numbers = 3 * 2048 * 768
    found = record_bytes(ExpertShape(2048, 768, True, False), dtype)
    assert numbers * bits / 8 <= found <= numbers * bits / 8 + (20 << 10)


def test_what_fits():
    facts = count_experts(fp8(layers=3))
    total, record = experts_bytes(facts, "bfloat16"), record_bytes(facts.shape, "bfloat16")
    options = {"kv": 1000, "process": 10_000}
    plenty = room(facts, "bfloat16", 10**9, **options)
    assert (plenty.budget, plenty.resident_share, plenty.fits) == (total, 1.0, True)
    least = plenty.needed + record
    assert room(facts, "bfloat16", least - 1, **options).fits is False
    assert room(facts, "bfloat16", least, budget=record, **options).budget == record
    part = room(facts, "bfloat16", plenty.needed + 6 * record, **options)
    assert part.fits
    assert part.budget == 5 * record  # a tenth of what is left is left to others
    assert part.needed + part.budget <= plenty.needed + 6 * record
    with pytest.raises(ValueError, match="smallest that works is one expert, 4096 bytes"):
        room(facts, "bfloat16", 10**9, budget=record - 1, **options)
    with pytest.raises(ValueError, match="dtype is 'int3', expected one of"):
        room(facts, "int3", 10**9, **options)
    sizes = [other_bytes(replace(facts, dense=((32, 32),)), dtype) for dtype in ("bfloat16", "int8", "int4")]
    assert sizes == [other_bytes(facts), sizes[0] - 1024 + 128, sizes[0] - 2048 + 18 * 32]
