"""Tiny checkpoints of many families, written as their classes write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# model_type: (class, what its configuration needs besides SMALL)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [1]}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": 8}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "granitemoe": ("GraniteMoeForCausalLM", {"num_local_experts": 4}),
    "phimoe": ("PhimoeForCausalLM", {"num_local_experts": 4}),
    "jamba": (
        "JambaForCausalLM",
        {
            "num_experts": 4,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_state": 4,
        },
    ),
}


def save_tiny(family: str, folder: Path, **changes: Any) -> Any:
    """A model of the family with random weights, saved in bfloat16 shards; returned as well."""
    torch.manual_seed(0)
    name, needs = FAMILIES[family]
    config = AutoConfig.for_model(family, **{**SMALL, **needs, **changes})
    model = getattr(transformers, name)(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def experts_of(model: Any) -> dict[str, Any]:
    """The experts modules, by path: what transformers itself calls so."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "num_experts") and hasattr(module, "has_gate")
    }
