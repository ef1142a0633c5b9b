"""What a layer of a model takes without its experts, measured: transformers' own class at the model's shape.

The model is made with a few layers, its experts replaced by nothing, and run. This needs torch and transformers, some
seconds, and is remembered; a plan uses what is remembered.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

from sida_ext.planning.counting import ModelFacts
from sida_ext.planning.rates import Measured, Pair, cache_bytes, layer_key, remember, walked_bytes

__all__ = ["measure_layer"]

FEW, MANY = 2, 6  # layers; the difference is that of layers alone
TOKENS = (1, 128)
SECONDS = 1.2  # of each of the four measurements at the most
VOCABULARY = 1024
# Whose lists go by layer, and what says how many there are.
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers")


def _shortened(config: Any, layers: int) -> Any:
    """The configuration with fewer layers and words; lists that go by layer are cut."""
    inner = config.get_text_config()
    full = inner.num_hidden_layers
    changes: dict[str, Any] = {name: layers for name in DEPTHS if getattr(inner, name, None) is not None}
    for name, value in inner.to_dict().items():
        if isinstance(value, list) and len(value) == full:
            # From the middle: the first layers are often unlike the rest.
            start = min(full // 2, max(0, full - layers))
            changes[name] = value[start : start + layers]
    changes["vocab_size"] = VOCABULARY
    for name in ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"):
        if getattr(inner, name, None) is not None:
            changes[name] = 0
    for name in ("num_sparse_encoder_layers", "num_sparse_decoder_layers"):
        if getattr(inner, name, None) is not None:
            changes[name] = max(1, round(layers * getattr(inner, name) / full))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(inner, name, None) is not None:
            changes[name] = 0
    return type(inner)(**{**inner.to_dict(), **changes})


def _made(config: Any, dtype: Any) -> Any:
    """The model in evaluation mode, every parameter 0.01, its experts a function that hands its input back."""
    import torch
    import transformers
    from torch import nn

    class NoExperts(nn.Module):
        def forward(self, hidden_states: Any, *choices: Any, **more: Any) -> Any:
            return hidden_states

    if config.model_type == "switch_transformers":
        kind: Any = transformers.SwitchTransformersEncoderModel
    else:
        kind = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = (
            kind(config) if isinstance(kind, type) and hasattr(kind, "base_model_prefix") else kind.from_config(config)
        )
    for name, _module in list(model.named_modules()):
        if name.rpartition(".")[2] == "experts":
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.experts = NoExperts()
    model = model.to_empty(device="cpu").to(dtype).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return model


def _times(model: Any, tokens: int, decodes: bool, walk: Any = None) -> list[float]:
    """Seconds of calls on ``tokens`` tokens; a single one with a cache that others stand in.

    Args:
        walk: called before each, untimed.
    """
    import torch

    found: list[float] = []
    ids = torch.ones((1, tokens), dtype=torch.int64)
    with torch.inference_mode():
        cache = None
        if tokens == 1 and decodes:
            cache = model(input_ids=torch.ones((1, 16), dtype=torch.int64), use_cache=True).past_key_values
        start = time.perf_counter()
        while len(found) < 4 or (time.perf_counter() - start < SECONDS and len(found) < 60):
            if walk is not None:
                walk()
            begin = time.perf_counter()
            if cache is not None:
                cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
            elif decodes:
                model(input_ids=ids, use_cache=True, logits_to_keep=1)
            else:
                model(input_ids=ids)
            found.append(time.perf_counter() - begin)
    return found[1:]


def _of_the_rest(times: dict[int, list[float]], layer: Pair) -> Pair:
    """What a call takes beside its layers: masks, embedding, positions, the last norm."""
    few = times[FEW]
    return max(0.0, min(few) - FEW * layer[0]), max(0.0, statistics.median(few) - FEW * layer[1])


def _of_one_layer(times: dict[int, list[float]]) -> Pair:
    """From the calls of models of FEW and of MANY layers, (fastest, median)."""
    few, many = times[FEW], times[MANY]
    fast = (min(many) - min(few)) / (MANY - FEW)
    middle = (statistics.median(many) - statistics.median(few)) / (MANY - FEW)
    fast = max(fast, min(many) / MANY / 2)  # a busy moment in the shorter run must not make layers free
    return fast, max(fast, middle)


def measure_layer(config: dict[str, Any], facts: ModelFacts) -> tuple[Measured, Measured]:
    """Seconds of one layer by tokens, and of what a call takes beside its layers, remembered for plans of the same
    shape on this machine: with weights that are read from memory, for other bytes than the last-level cache holds pass
    between two calls, and of one token with weights that stayed where the last call left them.

    Args:
        config: of config.json.

    Raises:
        ValueError: transformers cannot make the model from its configuration alone; the message says why.
    """
    import torch
    from transformers import AutoConfig

    dtype = getattr(torch, facts.dtype, torch.float32)
    decodes = not facts.encoder_only
    others = torch.ones(-(-walked_bytes(facts, "bfloat16", cache_bytes()) // 4))
    streamed: dict[int, dict[int, list[float]]] = {tokens: {} for tokens in TOKENS}
    cached: dict[int, list[float]] = {}
    try:
        whole = AutoConfig.for_model(**config)
        for layers in (FEW, MANY):
            model = _made(_shortened(whole, layers), dtype)
            for tokens in TOKENS:
                streamed[tokens][layers] = _times(model, tokens, decodes, others.sum)
            cached[layers] = _times(model, 1, decodes)
            del model
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(
            f"a {facts.family} of {FEW} layers without experts cannot be made or run here ({type(error).__name__}: "
            f"{error}); plan without --measure"
        ) from error
    layer = Measured({tokens: _of_one_layer(times) for tokens, times in streamed.items()}, {1: _of_one_layer(cached)})
    rest = Measured({tokens: _of_the_rest(times, layer.streamed[tokens]) for tokens, times in streamed.items()})
    remember(layer_key(facts), {"layer": asdict(layer), "rest": asdict(rest)})
    return layer, rest
