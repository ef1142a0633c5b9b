"""Tiny models of real families with random weights, and a tokenizer, made at once."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

__all__ = ["VOCABULARY", "tiny_causal", "tiny_tokenizer"]

VOCABULARY = 300
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> Any:
    """Bytes as tokens: 0 is padding, 1 the end, byte b is b + 2; the rest of the vocabulary is two letters each."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: place + 2 for place, letter in enumerate(letters)}
    plain = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [(left, right) for left in plain for right in plain][: VOCABULARY - len(vocabulary)]
    vocabulary |= {left + right: len(vocabulary) + place for place, (left, right) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    if chat:
        made.chat_template = CHAT
    return made


def tiny_causal(family: str = "olmoe", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **sizes: Any) -> Any:
    """A decoder-only model of ``family``: ``olmoe`` or ``qwen3_moe``; it never ends a text by itself."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "num_hidden_layers": 3,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "olmoe":
        config: Any = OlmoeConfig(
            **common | {"hidden_size": 64, "intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2} | sizes
        )
        model: Any = OlmoeForCausalLM(config)
    else:
        config = Qwen3MoeConfig(
            **common
            | {
                "hidden_size": 96,
                "intermediate_size": 96,
                "moe_intermediate_size": 48,
                "head_dim": 32,
                "num_experts": 8,
                "num_experts_per_tok": 3,
            }
            | sizes
        )
        model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # larger than at the start of a training, so that logits are far apart
                parameter.mul_(3.0)
    return model.to(dtype).eval()
