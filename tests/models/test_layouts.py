"""Every layout that transformers converts, read one expert at a time: the bits of the model's own parameters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from bench.causal.tiny_families import FAMILIES, tiny_config
from sida_ext.experts.store import open_store
from sida_ext.models.layouts import EXPERTWISE
from sida_ext.models.packing import pack, source_of
from sida_ext.models.seam_source import SeamModules
from tests.support.checkpoints import assert_experts_are, edit_config, edit_weights, expected_expert
from tests.support.families import tiny_model

# One of each way to lie in a file.
LAYOUTS = [
    *("olmoe", "mixtral", "gpt_oss", "nemotron_h", "aria", "granitemoe", "deepseek_v3", "deepseek_v4", "qwen3_vl_moe"),
    *("ernie4_5_vl_moe", "gemma4", "diffusion_gemma", "jamba", "lfm2_moe", "muse_spark", "zaya", "phimoe", "inkling"),
    *("mistral_large4", "minimax_m3_vl", "openai_privacy_filter"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_its_published_layout_and_many_shards(family, tmp_path):
    _, model = tiny_model(family)
    # So small that the tensors of a layer, and of an expert, lie in different files.
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with source_of(tmp_path) as source:
        assert_experts_are(source, model)
        memory = SeamModules(model)
    assert_experts_are(memory, model)
    for fact in (
        "layers",
        "num_experts",
        "d_model",
        "d_ff",
        "gated",
        "biased",
        "family",
        "top_k",
        "activation",
        "gate",
    ):
        assert getattr(source, fact) == getattr(memory, fact), fact
    assert source.top_k


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_modules_own_layout_and_the_published_one_in_one_file(family, tmp_path):
    _, model = tiny_model(family)
    for folder, original in ((tmp_path / "published", True), (tmp_path / "own", False)):
        model.save_pretrained(folder, save_original_format=original)
        with source_of(folder) as source:
            assert_experts_are(source, model)


def test_the_reader_is_compared_with_the_forward_pass():
    """What the tests above compare with is itself held against eager experts."""
    for family in ("gpt_oss", "nemotron_h", "aria_text", "olmoe"):
        module = next(iter(SeamModules(tiny_model(family)[1])._modules.values()))
        parts = expected_expert(module, 3)
        x = torch.randn(5, parts["wi"].shape[1])
        up = torch.nn.functional.linear(x, parts["wi"], parts.get("wi_bias"))
        if module.has_gate and not module.is_concatenated:
            up = torch.stack(up.chunk(2, -1), -1).flatten(-2)
        middle = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        found = torch.nn.functional.linear(middle, parts["wo"], parts.get("wo_bias"))
        module.config._experts_implementation = "eager"
        with torch.no_grad():
            expected = module(x, torch.full((5, 1), 3), torch.ones(5, 1))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_facts_that_a_store_tells(tmp_path):
    model = tiny_model("hunyuan_v1_moe")[1]
    model.save_pretrained(tmp_path)
    header = pack(tmp_path, tmp_path / "x.sida", "float32")
    assert open_store(tmp_path / "x.sida")[1] == header
    assert (header.family, header.top_k, header.activation) == ("hunyuan_v1_moe", (2, 1, 3), "silu")
    assert header.gate == "act(gate) * up"
    assert header.layout == "one matrix for each expert (*.gate_proj.weight, *.up_proj.weight)"
    assert header.layers == tuple(f"model.layers.{i}.mlp.experts" for i in range(3))


@pytest.mark.parametrize(
    ("family", "says", "gate", "activation"),
    [
        ("gpt_oss", "all experts fused (gate_up_proj), transposed, gate and up in turns", "GptOssExperts", ""),
        ("aria", "all experts fused (fc1.weight), transposed", "act(gate) * up", "silu"),
        ("inkling2", "all experts fused (w13_weight), gate and up in turns", "Inkling2Experts", None),
        ("nemotron_h", "one matrix for each expert (*.up_proj.weight)", "", "relu2"),
        (
            "ernie4_5_vl_moe",
            "text and vision experts in one list; experts of width 16 padded with zeros to 24",
            "",
            None,
        ),
        ("gemma4", "all experts fused (gate_up_proj)", "act(gate) * up", "gelu_pytorch_tanh"),
    ],
)
def test_what_a_layout_is_called(family, says, gate, activation, tmp_path):
    tiny_model(family)[1].save_pretrained(tmp_path)
    with source_of(tmp_path) as source:
        assert says in source.layout
        assert gate in source.gate
        assert activation is None or source.activation == activation


def test_modules_that_share_parameters_are_packed_once(tmp_path):
    _, model = tiny_model("diffusion_gemma")
    model.save_pretrained(tmp_path)
    with source_of(tmp_path) as source:
        assert len(source.layers) == 3
        assert source.facts.shared == {
            f"model.decoder.layers.{i}.experts": f"model.encoder.language_model.layers.{i}.experts" for i in range(3)
        }


def test_layers_that_run_several_times_are_packed_once(tmp_path):
    _, model = tiny_model("inkling2_loop")
    model.save_pretrained(tmp_path)
    with source_of(tmp_path) as source:
        assert source.layers == tuple(f"model.layers.{i}.mlp.experts" for i in range(6))


def test_layers_for_multi_token_prediction_are_not_packed(tmp_path):
    _, model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    layers = {}

    def add(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if key.startswith("model.layers.2.")]:
            for other in ("model.layers.61.", "mtp.layers.0."):
                layers[key.replace("model.layers.2.", other)] = weights[key] + 1
        weights.update(layers)

    edit_weights(tmp_path, add)
    assert layers
    with source_of(tmp_path) as source:
        assert source.layers == ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts")
        assert_experts_are(source, model)


@pytest.mark.parametrize("width", [16, 24])
def test_qwen3_vl_moe_is_turned_as_transformers_turns_it(width, tmp_path):
    """Its rule turns a matrix whose shape is not the parameter's, so a square one is taken as it lies."""
    _, model = tiny_model("qwen3_vl_moe", text_config={"moe_intermediate_size": width, "hidden_size": 32})
    model.save_pretrained(tmp_path)

    def turn(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            weights[key] = weights[key].transpose(1, 2)

    edit_weights(tmp_path, turn)
    loaded = type(model).from_pretrained(tmp_path)
    with source_of(tmp_path) as source:
        assert_experts_are(source, loaded)
    same = torch.equal(
        loaded.model.language_model.layers[0].mlp.experts.gate_up_proj,
        model.model.language_model.layers[0].mlp.experts.gate_up_proj,
    )
    assert same == (width != 16)


def test_a_text_model_of_a_checkpoint_for_more(tmp_path):
    _, model = tiny_model("qwen3_5_moe_vl")
    model.save_pretrained(tmp_path)
    text_class = transformers.Qwen3_5MoeForCausalLM
    with source_of(tmp_path, model_class=text_class) as text, source_of(tmp_path) as whole:
        assert text.layers[0] == "model.layers.0.mlp.experts"
        assert whole.layers[0] == "model.language_model.layers.0.mlp.experts"
        assert text.fingerprint != whole.fingerprint
        assert_experts_are(whole, model)
        assert_experts_are(text, text_class.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype, tmp_path):
    model = tiny_model("mixtral")[1].to(dtype)
    model.save_pretrained(tmp_path)
    with source_of(tmp_path) as source:
        expert = source.expert(1, 5)
        assert expert.wi.dtype == expert.wo.dtype == dtype
        assert torch.equal(expert.wo, model.model.layers[1].mlp.experts.down_proj[5])


def test_a_rule_that_is_not_known_is_refused(tmp_path, monkeypatch):
    tiny_model("olmoe")[1].save_pretrained(tmp_path)
    monkeypatch.delitem(EXPERTWISE, "Concatenate")
    with pytest.raises(ValueError, match=r"by Concatenate\(dim=1\), which cannot be applied to one expert"):
        pack(tmp_path, tmp_path / "x.sida")


# What must not be packed: nothing is left behind.


@pytest.fixture
def refused(tmp_path):
    def check(folder: Path, message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            pack(folder, tmp_path / "stores" / "x.sida", "float32")
        assert not (tmp_path / "stores").exists()

    return check


FIRST = "model.layers.1.mlp.experts.3."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop(f"{FIRST}up_proj.weight"),
            r"has 7 tensors .*up_proj.weight, .* 8 experts; expert 3 is missing",
        ),
        (lambda w: w.pop(f"{FIRST}down_proj.weight"), r"down_proj: the checkpoint has 7 .*; expert 3 is missing"),
        (
            lambda w: w.update({FIRST.replace("3.", "8.") + "down_proj.weight": w[f"{FIRST}down_proj.weight"].clone()}),
            "has 9 tensors .*; expert 8 is too many",
        ),
        (
            lambda w: w.update({f"{FIRST}gate_proj.weight": torch.zeros(48, 31)}),
            r"experts\.3\.gate_proj\.weight is torch\.float32 of shape \(48, 31\), expected .*\(48, 32\)",
        ),
        (
            lambda w: w.update({f"{FIRST}gate_proj.weight": torch.zeros(48, 32, dtype=torch.int64)}),
            r"is torch\.int64 of shape .*, expected torch\.float32",
        ),
        (
            lambda w: w.update({k: v.to(torch.float8_e4m3fn) for k, v in w.items() if ".experts." in k}),
            "are torch.float8_e4m3fn, expected float32, .* names no quantisation",
        ),
        (
            lambda w: w.update({k: v[:, :16] for k, v in w.items() if "down_proj" in k}),
            r"give an expert of shape \(32, 16\), expected 8 experts of shape \(32, 48\)",
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.gate.weight": torch.zeros(9, 32)}),
            r"mlp\.gate\.weight has shape \(9, 32\), expected \(8, 32\) by config\.json, beside the 8 experts",
        ),
        (
            lambda w: [w.pop(k) for k in list(w) if k.startswith("model.layers.1.mlp.experts")],
            r"holds nothing that transformers would load as model\.layers\.1\.mlp\.experts\.gate_up_proj",
        ),
        (lambda w: w.update({f"{FIRST}down_proj.weight": torch.full((32, 48), torch.nan)}), "expert 3: wo holds NaN"),
    ],
)
def test_damaged_checkpoints(change, message, tmp_path, refused):
    tiny_model("olmoe")[1].save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    if "NaN" in message:
        with pytest.raises(ValueError, match=message):
            pack(tmp_path, tmp_path / "x.sida", "float32")
        assert not list(tmp_path.glob("*x.sida*"))
    else:
        refused(tmp_path, message)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt_oss", {"num_local_experts": 4}, r"expected 4 experts|shape .*, expected \(4, "),
        ("olmoe", {"num_experts": 4}, "config.json says 4 experts; expert 4 is too many"),
        ("olmoe", {"num_experts": 16}, "config.json says 16 experts; expert 8 is missing"),
        ("olmoe", {"num_experts_per_tok": 9}, "the router picks 9 experts of 8; config.json is wrong"),
        ("olmoe", {"intermediate_size": 40}, r"expected 8 experts of shape \(80, 32\)"),
        ("olmoe", {"hidden_size": 64}, r"expected 8 experts of shape \(96, 64\)"),
        (
            "olmoe",
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            r"would load as model\.layers\.0\.mlp\.experts\..* \(model_type mixtral\); it has .*\.experts\.0\.",
        ),
        ("olmoe", {"model_type": "nonesuch"}, "no model that transformers knows"),
        (
            "olmoe",
            {"architectures": ["NonesuchForCausalLM"]},
            r"architectures \['NonesuchForCausalLM'\], none of which",
        ),
    ],
)
def test_a_configuration_of_another_model(family, changes, message, tmp_path, refused):
    tiny_model(family)[1].save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "hqq", "torchao", "fbgemm_fp8"]
)
def test_other_quantisations_are_refused_by_name(method, tmp_path, refused):
    tiny_model("mixtral")[1].save_pretrained(tmp_path)
    found = {"load_in_4bit": True} if method == "bitsandbytes" else {"quant_method": method, "bits": 4}
    edit_config(tmp_path, quantization_config=found)
    refused(tmp_path, f"quantised by '{re.escape(method)}'; fp8, mxfp8, mxfp4 .* sida pack --dtype")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("NllbMoeForConditionalGeneration", "runs only two of its experts"),
        ("DbrxForCausalLM", "do not go through transformers' experts interface"),
        ("JetMoeForCausalLM", "do not go through"),
        ("Llama4ForCausalLM", "all of its experts run for every token"),
        ("LongcatFlashForCausalLM", "do not go through"),
        ("Step3p7ForConditionalGeneration", "do not go through"),
        ("LlamaForCausalLM", "there are no experts to serve"),
    ],
)
def test_families_outside_the_seam_are_refused_by_name(model, reason, tmp_path, refused):
    model_class = getattr(transformers, model)
    config = tiny_config(model_class.config_class)
    config.architectures = [model]
    config.save_pretrained(tmp_path)
    if model == "LlamaForCausalLM":  # whose weights are looked for, but not opened
        (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, rf"{model} \(model_type [a-z0-9_-]+\) .*{reason}")
