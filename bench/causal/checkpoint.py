"""Write a decoder-only MoE checkpoint of real shapes with random weights: ``python -m bench.causal.checkpoint FOLDER``.

Qwen3-MoE's architecture with the shapes of Qwen3-30B-A3B but for depth and vocabulary: d_model 2048, 128 experts of 768
in each layer, 8 for each token, 32 query and 4 key heads of 128, vocabulary 32,000; bfloat16, one matrix for each
expert. 16 layers: 9.66 billion parameters in experts (19.3 GB), 0.60 in the rest. Random routing is spread over all
experts: the hard case for a cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig


def config(layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=2048,
        vocab_size=32000,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        intermediate_size=6144,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def _layer(shape: Qwen3MoeConfig, number: int) -> dict[str, Tensor]:
    width, head, inner = shape.hidden_size, shape.head_dim, shape.moe_intermediate_size

    def normal(*size: int, std: float = 0.02) -> Tensor:
        return (torch.randn(*size) * std).to(torch.bfloat16)

    place = f"model.layers.{number}."
    queries, keys = shape.num_attention_heads * head, shape.num_key_value_heads * head
    tensors = {f"{place}{name}_layernorm.weight": torch.ones(width).bfloat16() for name in ("input", "post_attention")}
    tensors |= {f"{place}self_attn.{name}_norm.weight": torch.ones(head).bfloat16() for name in ("q", "k")}
    tensors[f"{place}self_attn.q_proj.weight"] = normal(queries, width)
    tensors[f"{place}self_attn.k_proj.weight"] = normal(keys, width)
    tensors[f"{place}self_attn.v_proj.weight"] = normal(keys, width)
    tensors[f"{place}self_attn.o_proj.weight"] = normal(width, queries)
    tensors[f"{place}mlp.gate.weight"] = normal(shape.num_experts, width, std=0.05)
    for expert in range(shape.num_experts):
        part = f"{place}mlp.experts.{expert}."
        tensors[f"{part}gate_proj.weight"] = normal(inner, width, std=0.01)
        tensors[f"{part}up_proj.weight"] = normal(inner, width, std=0.01)
        tensors[f"{part}down_proj.weight"] = normal(width, inner, std=0.01)
    return tensors


def write_checkpoint(folder: Path, layers: int = 16, seed: int = 0) -> None:
    """A shard for each layer; at most one of them is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    shape = config(layers)
    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    vocabulary = (shape.vocab_size, shape.hidden_size)
    save(
        "model-head.safetensors",
        {
            "model.embed_tokens.weight": torch.randn(*vocabulary).bfloat16(),
            "lm_head.weight": (torch.randn(*vocabulary) * 0.02).bfloat16(),
            "model.norm.weight": torch.ones(shape.hidden_size).bfloat16(),
        },
    )
    for number in range(layers):
        save(f"model-layer-{number:02d}.safetensors", _layer(shape, number))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shape.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    write_checkpoint(options.folder, options.layers)
