"""Prediction of a prompt: where a decoder-only model runs over several tokens, all layers' experts are named first.

What a whole prompt wants is known before its first layer runs, as with a batch of ``stream``. So the prefill of
``generate``, and a forward of the caller's own over a prompt, are announced as one batch. Single tokens are not: a
predictor of prompts keeps no state from step to step.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.experts.runtime import Runtime
from sida_ext.prediction.prefetch import PrefetchPolicy, candidates_of
from sida_ext.prediction.protocol import check_table

__all__ = ["predict_prompts"]


class _PromptPrediction:
    """The hooks around a model's forward. Holds no module: it would be a cycle."""

    def __init__(self, runtime: Runtime, layers: list[str]) -> None:
        self.runtime, self.layers = runtime, layers
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> _PromptPrediction:
        return self  # copies of a model share its runtime

    def before(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        runtime, predictor = self.runtime, self.runtime.predictor
        input_ids = named.get("input_ids", args[0] if args else None)
        if predictor is None or not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] < 2:
            return
        if runtime.current.number:  # announced by who calls: a batch of stream
            return
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None
        elif mask.shape[1] > input_ids.shape[1]:  # of the cached tokens too
            mask = mask[:, -input_ids.shape[1] :]
        experts = runtime.header.num_experts
        begin = time.perf_counter_ns()
        with torch.no_grad():
            table = predictor.predict(input_ids, mask, top_k=candidates_of(predictor, experts))
        check_table(table, predictor, input_ids, len(self.layers), experts)
        runtime.record_prediction("prompt", begin, time.perf_counter_ns())
        wanted = PrefetchPolicy().experts_by_layer(table, experts)
        number = runtime.announce(dict(zip(self.layers, wanted, strict=True)))
        open_ = ExitStack()
        open_.callback(runtime.retire, number)
        open_.enter_context(runtime.batch(number, table))
        self._thread.open = open_

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward has ended, or has failed."""
        open_: ExitStack | None = getattr(self._thread, "open", None)
        if open_ is not None:
            self._thread.open = None
            open_.close()


def predict_prompts(model: nn.Module, runtime: Runtime, layers: list[str]) -> None:
    """Let each forward over more than one token be predicted by ``runtime.predictor``, while there is one.

    Args:
        model: a decoder-only model with swapped experts.
        layers: names of its MoE layers, in the order of its hash tables.
    """
    hooks = _PromptPrediction(runtime, layers)
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after, always_call=True)
