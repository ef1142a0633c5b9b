"""Published models from their configurations alone: what ``sida plan`` prints beside what a pencil counts.

The tensors of each checkpoint are listed by transformers' own module on the meta device, so nothing is downloaded and
no weight exists; the numbers that are expected are written out from the published shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from sida_ext.planning.capacity import experts_bytes, kv_cache_bytes, other_bytes
from sida_ext.planning.counting import ModelFacts, count_experts
from sida_ext.planning.headers import CheckpointHeaders, TensorHeader


@dataclass(frozen=True)
class Published:
    """A model as its card describes it.

    Attributes:
        kind: the class; config: what its configuration says besides the family's defaults.
        layers: with experts; one: numbers of an expert's matrices; rows: of both of its matrices, each with a scale in
            int8; biased: and with a bias.
        attention: numbers of a layer's attention, its norms among them; every: of a layer's other parts that all have
            (two norms); moe: router and shared experts of an MoE layer; plain: a dense layer's feed-forward.
        kv: numbers that one token adds to a layer's cache; window: tokens of every second layer, 0: none.
        billions: of parameters, as published.
    """

    family: str
    kind: str
    config: dict[str, Any]
    depth: int
    layers: int
    experts: int
    width: int
    vocabulary: int
    one: int
    rows: int
    attention: int
    moe: int
    kv: int
    billions: float
    plain: int = 0
    tied: bool = False
    biased: bool = False
    window: int = 0


MODELS = {
    "Qwen3-30B-A3B": Published(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
        depth=48,
        layers=48,
        experts=128,
        width=2048,
        vocabulary=151936,
        one=3 * 2048 * 768,
        rows=2 * 768 + 2048,
        attention=2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128,
        moe=128 * 2048,
        kv=2 * 4 * 128,
        billions=30.5,
    ),
    "gpt-oss-20b": Published(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "hidden_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "intermediate_size": 2880,
            "vocab_size": 201088,
            "sliding_window": 128,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
        },
        depth=24,
        layers=24,
        experts=32,
        width=2880,
        vocabulary=201088,
        one=3 * 2880 * 2880,
        rows=2 * 2880 + 2880,
        # Queries, keys and values with their biases, the output with its own, a sink for each head.
        attention=(2880 + 1) * (64 + 2 * 8) * 64 + (64 * 64 + 1) * 2880 + 64,
        moe=32 * (2880 + 1),
        kv=2 * 8 * 64,
        billions=20.9,
        biased=True,
        window=128,
    ),
    "Mixtral-8x7B": Published(
        "mixtral",
        "MixtralForCausalLM",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
        depth=32,
        layers=32,
        experts=8,
        width=4096,
        vocabulary=32000,
        one=3 * 4096 * 14336,
        rows=2 * 14336 + 4096,
        attention=2 * 4096 * 4096 + 2 * 4096 * 1024,
        moe=8 * 4096,
        kv=2 * 8 * 128,
        billions=46.7,
    ),
    "OLMoE-1B-7B": Published(
        "olmoe",
        "OlmoeForCausalLM",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "intermediate_size": 1024,
            "vocab_size": 50304,
            "tie_word_embeddings": False,
        },
        depth=16,
        layers=16,
        experts=64,
        width=2048,
        vocabulary=50304,
        one=3 * 2048 * 1024,
        rows=2 * 1024 + 2048,
        attention=4 * 2048 * 2048 + 2 * 2048,  # queries and keys are normed over all heads
        moe=64 * 2048,
        kv=2 * 16 * 128,
        billions=6.9,
    ),
    "DeepSeek-V2-Lite": Published(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "intermediate_size": 10944,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "vocab_size": 102400,
            "tie_word_embeddings": False,
        },
        depth=27,
        layers=26,
        experts=64,
        width=2048,
        vocabulary=102400,
        one=3 * 2048 * 1408,
        rows=2 * 1408 + 2048,
        # Queries, the latent with its rotary part and norm, what unfolds it to keys and values, the output.
        attention=2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048,
        moe=64 * 2048 + 3 * 2048 * 2 * 1408,
        kv=512 + 64,
        billions=15.7,
        plain=3 * 2048 * 10944,
    ),
    "GLM-4.5-Air": Published(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "use_qk_norm": False,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "intermediate_size": 10944,
            "first_k_dense_replace": 1,
            "vocab_size": 151552,
            "tie_word_embeddings": False,
        },
        depth=46,
        layers=45,
        experts=128,
        width=4096,
        vocabulary=151552,
        one=3 * 4096 * 1408,
        rows=2 * 1408 + 4096,
        attention=(4096 + 1) * (96 + 2 * 8) * 128 + 96 * 128 * 4096,
        moe=128 * 4096 + 128 + 3 * 4096 * 1408,  # the router's bias of each expert among them
        kv=2 * 8 * 128,
        billions=106.9,
        plain=3 * 4096 * 10944,
    ),
}


@cache
def published(name: str) -> ModelFacts:
    """Counted from the headers that the model's checkpoint would have in bfloat16."""
    model = MODELS[name]
    config = AutoConfig.for_model(model.family, **model.config, dtype="bfloat16")
    with torch.device("meta"):
        made = getattr(transformers, model.kind)(config)
    tensors = {
        name: TensorHeader("BF16", tuple(tensor.shape), 2 * tensor.numel())
        for name, tensor in made.state_dict().items()
    }
    whole = config.to_dict() | {"architectures": [model.kind]}
    return count_experts(CheckpointHeaders("made/up", whole, tensors, None))


def blocks(count: int, size: int) -> int:
    return -(-count // size) * size


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_a_pencil(name):
    model = MODELS[name]
    facts = published(name)
    assert (len(facts.layers), facts.experts, facts.depth) == (model.layers, model.experts, model.depth)
    assert facts.top_k == model.config["num_experts_per_tok"]
    # Everything else: a table and a head of the vocabulary, a norm behind all layers and two in each.
    other = (
        2 * model.vocabulary * model.width
        + model.width
        + model.depth * (model.attention + 2 * model.width)
        + model.layers * model.moe
        + (model.depth - model.layers) * model.plain
    )
    assert facts.other_numbers == other
    assert other_bytes(facts) == 2 * other
    biases = model.rows if model.biased else 0
    everything = other + model.layers * model.experts * (model.one + biases)
    assert everything / 1e9 == pytest.approx(model.billions, abs=0.06)
    # Of experts: whole pages of weights, with a float32 for each row's scale in int8 and for each bias.
    count = model.layers * model.experts
    for dtype, bits, scales in (("bfloat16", 16, 0), ("int8", 8, model.rows), ("int4", 4.5, 0), ("mxfp4", 4.25, 0)):
        # Every matrix here has parts of whole 64 bytes and rows of whole groups of 32.
        assert experts_bytes(facts, dtype) == count * blocks(int(model.one * bits / 8) + 4 * (scales + biases), 4096)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [100, 32768])
def test_the_cache_is_that_of_a_pencil(name, context):
    model = MODELS[name]
    windowed = model.depth // 2 if model.window else 0
    tokens = (model.depth - windowed) * context + windowed * min(context, model.window)
    assert kv_cache_bytes(published(name), context) == 2 * model.kv * tokens
