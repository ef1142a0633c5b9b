"""A tiny random model of every family that uses transformers' experts seam, made from its configuration class.

Nothing is downloaded. A model has few layers and experts, but every kind of layer that its family has; families with
parts for images or sound have tiny ones of those too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "Family", "MissingFamilyError", "tiny_config", "tiny_model"]


class MissingFamilyError(LookupError):
    """The installed transformers has no such family, or none that is made as this one is."""


VOCABULARY = 128
# What the configuration classes call the same things; each class takes those of its own fields.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "router_hidden_size": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The same for the parts that see or hear.
SMALL_SENSES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 32,
    "output_proj_dims": 32,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "output_dim": 32,
    "image_size": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 64,
    "mlp_dim": 48,
    "output_channels": 16,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "downsample_hidden_size": 16,
    "num_local_experts": 4,
    "deepstack_visual_indexes": [0],
}
SENSES = ("vision", "visual", "audio", "sam", "encoder")


@dataclass(frozen=True)
class Family:
    """How a family's tiny model is made.

    Attributes:
        model: name of its class in transformers.
        changes: fields of the configuration other than :data:`SMALL`; a dictionary changes a sub-configuration.
        note: what is odd about it, if anything.
        folder: of ``transformers/models``, where it is not the family's name.
        since: of transformers, from which release on it can be made so, where its class is older.
    """

    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    folder: str = ""
    since: str = ""


MLA = {"num_key_value_heads": 4, "head_dim": 8}


def mrope(sections: list[int]) -> dict[str, Any]:
    """Rotary positions in three axes, of which each has some of the frequencies."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}


FULL_THEN_LINEAR = ["linear_attention", "full_attention", "linear_attention"]

QWEN4 = {
    **{"layer_types": FULL_THEN_LINEAR, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1},
    **{"indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 2},
}

FAMILIES: dict[str, Family] = {
    "afmoe": Family("AfmoeForCausalLM"),
    "aria": Family("AriaForConditionalGeneration", {"image_token_index": 9}),
    "aria_text": Family("AriaTextForCausalLM", folder="aria"),
    "axk1": Family("AXK1ForCausalLM", MLA),
    "axk2": Family("AXK2ForCausalLM", MLA),
    "bailing_hybrid": Family("BailingHybridForCausalLM", {**MLA, "layer_types": FULL_THEN_LINEAR}),
    "beam": Family("BeamForCausalLM", {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "cohere2_moe": Family("Cohere2MoeForCausalLM"),
    "deepseek_ocr2": Family(
        "DeepseekOcr2ForConditionalGeneration", {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}}
    ),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", MLA),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", MLA),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", MLA),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8}),
    "diffusion_gemma": Family(
        "DiffusionGemmaForBlockDiffusion", note="two modules of each layer share parameters", since="5.20"
    ),
    "dots1": Family("Dots1ForCausalLM"),
    "dots3_note": Family(
        "Dots3NoteForCausalLM",
        {**MLA, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16}
        | {"swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    ),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {"text_config": {"moe_intermediate_size": [24, 16], "rope_parameters": mrope([1, 1, 2])}},
        "two modules in each layer, for text and images",
    ),
    "exaone_moe": Family("ExaoneMoeForCausalLM"),
    "flex_olmo": Family("FlexOlmoForCausalLM"),
    "flint": Family("FlintForCausalLM", {"num_hidden_layers": 4}),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "hidden_size_per_layer_input": 8},
    ),
    "gemma4_vl": Family(
        "Gemma4ForConditionalGeneration",
        {"text_config": {"enable_moe_block": True, "hidden_size_per_layer_input": 8}},
        folder="gemma4",
    ),
    "glm4_moe": Family("Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", MLA),
    "glm4v_moe": Family("Glm4vMoeForConditionalGeneration", {"text_config": {"rope_parameters": mrope([1, 1, 0])}}),
    "glm5_next": Family(
        "Glm5NextForConditionalGeneration",
        {
            "text_config": {**MLA, "qk_rope_head_dim": 0, "head_dim": 0, "layer_types": FULL_THEN_LINEAR}
            | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
        },
    ),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", MLA),
    "gpt_oss": Family("GptOssForCausalLM"),
    "granitemoe": Family("GraniteMoeForCausalLM"),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {"mamba_n_heads": 8, "mamba_d_state": 8, "layer_types": FULL_THEN_LINEAR},
    ),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", {"moe_topk": [2, 1, 3]}, "top-k differs by layer"),
    "hy_v3": Family("HYV3ForCausalLM"),
    "hy_v4": Family("HYV4ForCausalLM"),
    "hy_v4_vl": Family("HYV4VLForConditionalGeneration", {"text_config": {"rope_parameters": mrope([2, 1, 1])}}),
    "inkling": Family("InklingForCausalLM"),
    "inkling2": Family("Inkling2ForCausalLM"),
    "inkling2_loop": Family(
        "Inkling2LoopForCausalLM",
        {"num_hidden_layers": 6, "loop_layer_index_start": 2, "loop_layer_index_end": 4, "loop_gate_rank": 4}
        | {"n_layers_per_attn_res_block": 2},
        "layers run several times",
    ),
    "jamba": Family(
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
        | {"use_mamba_kernels": False},
    ),
    "kimi_linear": Family("KimiLinearForCausalLM", {**MLA, "layer_types": FULL_THEN_LINEAR}),
    "kolibri1": Family("Kolibri1ForCausalLM"),
    "laguna": Family("LagunaForCausalLM"),
    "lara_mini": Family("LaraMiniForCausalLM"),
    "lfm2_moe": Family("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "mellum": Family("MellumForCausalLM"),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM"),
    "minimax": Family("MiniMaxForCausalLM"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Family("MiniMaxM3SparseForConditionalGeneration"),
    "minimax_m3_vl_text": Family("MiniMaxM3VLForCausalLM", folder="minimax_m3_vl"),
    "mistral4": Family("Mistral4ForCausalLM", {"num_key_value_heads": 4}),
    "mistral_large4": Family("MistralLarge4ForConditionalGeneration", {"text_config": MLA}),
    "mixtral": Family("MixtralForCausalLM"),
    "muse_spark": Family(
        "MuseSparkForConditionalGeneration",
        {"out_hidden_size": 32, "projector_hidden_size": 32, "text_config": {"moe_hidden_size": 16}}
        | {"audio_config": {"num_hidden_layers": 2, "patch_sizes": [4, 2], "hidden_sizes": [8, 32], "depths": [1, 1]}},
        "a norm behind each expert",
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "moe", "attention", "moe"], "moe_latent_size": 16, "mamba_num_heads": 8}
        | {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "use_mamba_kernels": False},
        "no gate; experts narrower than the model",
    ),
    "olmoe": Family("OlmoeForCausalLM"),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": Family("PhimoeForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", {"layer_types": FULL_THEN_LINEAR}),
    "qwen3_5_moe_vl": Family(
        "Qwen3_5MoeForConditionalGeneration", {"text_config": {"layer_types": FULL_THEN_LINEAR}}, folder="qwen3_5_moe"
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "qwen3_next": Family("Qwen3NextForCausalLM", {"layer_types": FULL_THEN_LINEAR}),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration"),
    "qwen4_exp_vl": Family("Qwen4ExpForConditionalGeneration", {"text_config": QWEN4}, folder="qwen4_exp"),
    "qwen4_exp": Family("Qwen4ExpForCausalLM", QWEN4),
    "solar_open": Family("SolarOpenForCausalLM"),
    "unlimited_ocr": Family("UnlimitedOcrForConditionalGeneration"),
    "zaya": Family("ZayaForCausalLM", {"num_experts_per_tok": 1}, "a skipped token comes as expert 0 of weight 0"),
}


def _fields(config_class: type[PretrainedConfig]) -> set[str]:
    own = {name for kind in config_class.__mro__ for name in vars(kind).get("__annotations__", {})}
    return own | set(inspect.signature(config_class.__init__).parameters)


def tiny_config(config_class: type[PretrainedConfig], sense: bool = False, **changes: Any) -> PretrainedConfig:
    """A configuration with the small sizes that ``config_class`` knows.

    Args:
        sense: it is of a part that sees or hears.
        changes: other values; of a sub-configuration, a dictionary of its changes.
    """
    fields = _fields(config_class)
    values = {name: value for name, value in (SMALL_SENSES if sense else SMALL).items() if name in fields}
    for name, kind in (getattr(config_class, "sub_configs", None) or {}).items():
        if kind is transformers.AutoConfig:
            kind = type(getattr(config_class(), name))
        if issubclass(kind, PretrainedConfig):
            sees = sense or name.startswith(SENSES)
            values[name] = tiny_config(kind, sees, **changes.get(name, {}))
    made = {name for name, value in values.items() if isinstance(value, PretrainedConfig)}
    return config_class(**{**values, **{name: value for name, value in changes.items() if name not in made}})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> tuple[PretrainedConfig, PreTrainedModel]:
    """The tiny model of a family with random weights, float32, in evaluation mode.

    Args:
        family: a key of :data:`FAMILIES`: a folder of ``transformers/models``, or another class of one.
        changes: changes of the configuration beside the family's own.

    Raises:
        MissingFamilyError: transformers is too old for it.
    """
    chosen = FAMILIES[family]
    model_class: type[PreTrainedModel] | None = getattr(transformers, chosen.model, None)
    if model_class is None:
        raise MissingFamilyError(f"transformers {transformers.__version__} has no {chosen.model}")
    if chosen.since and Version(transformers.__version__) < Version(chosen.since):
        raise MissingFamilyError(f"{chosen.model} of transformers before {chosen.since} is made otherwise")
    config = tiny_config(model_class.config_class, **{**chosen.changes, **changes})
    torch.manual_seed(seed)
    return config, model_class(config).eval()
