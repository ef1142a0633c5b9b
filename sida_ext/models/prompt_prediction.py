"""Prediction of a prompt: where a decoder-only model runs over several tokens, all layers' experts are named first.

What a whole prompt wants is known before its first layer runs, as with a batch of ``stream``. So the prefill of
``generate``, and a forward of the caller's own over a prompt, are announced as one batch. Single tokens are for
:mod:`sida_ext.models.causal_steps`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.experts.runtime import Runtime
from sida_ext.prediction.announcing import AnnouncingState
from sida_ext.prediction.lookahead_guard import GuardOptions
from sida_ext.prediction.prefetch import PrefetchPolicy, candidates_of
from sida_ext.prediction.protocol import check_table
from sida_ext.prediction.router_lookahead import within_room

__all__ = ["announcing_of", "forward_prompt"]


def announcing_of(runtime: Runtime, predictor: Any) -> AnnouncingState:
    """What judges whether this predictor's batches are worth announcing: made at first use, kept from batch to batch
    while the predictor is the same."""
    if runtime.announcing is None or runtime.announcing.predictor is not predictor:
        lanes = runtime.read_plan.lanes
        runtime.announcing = AnnouncingState(predictor, GuardOptions(), lanes, runtime.announcing_pace, time.monotonic)
    return runtime.announcing


def forward_prompt(runtime: Runtime, layers: list[str], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's forward; over more than one token predicted by ``runtime.predictor``, while there is one.

    Args:
        model: a decoder-only model with swapped experts.
        layers: names of its MoE layers, in the order of its hash tables.
    """
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if runtime.predictor is None or not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] < 2:
        return type(model).forward(model, *args, **kwargs)
    if runtime.current.number:  # announced by who calls: a batch of stream
        return type(model).forward(model, *args, **kwargs)
    announcing = announcing_of(runtime, runtime.predictor)
    announcing.begin(shared=runtime.ahead is not None)
    announcing.predicts_ahead(0)
    begin = time.monotonic()
    worth = announcing.may_predict()
    room = announcing.room(runtime.header.total_experts) if worth else 0
    if not room:  # predictions were worth nothing of late: not even asked
        try:
            return type(model).forward(model, *args, **kwargs)
        finally:
            if not worth:  # else it is for other reasons that none was predicted, and is compared with nothing
                announcing.done(time.monotonic() - begin, input_ids.numel(), None)
    number, table = _announce(runtime, layers, input_ids, kwargs.get("attention_mask"), room)
    predicted = time.monotonic()

    def judge() -> None:
        if announcing.in_vain():
            runtime.retire(number)

    try:
        with runtime.batch(number, table, runtime.current.chosen, judge=judge):
            return type(model).forward(model, *args, **kwargs)
    finally:
        runtime.retire(number)
        announcing.judge()
        announcing.done(time.monotonic() - begin, input_ids.numel(), predicted - begin)


def _announce(runtime: Runtime, layers: list[str], input_ids: Tensor, mask: Any, room: int) -> tuple[int, Any]:
    """Predict a prompt and announce what it will want: the batch's number and its hash table."""
    predictor, experts = runtime.predictor, runtime.header.num_experts
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None
    elif mask.shape[1] > input_ids.shape[1]:  # of the cached tokens too
        mask = mask[:, -input_ids.shape[1] :]
    begin = time.perf_counter_ns()
    with torch.no_grad():
        table = predictor.predict(input_ids, mask, top_k=candidates_of(predictor, experts))
    check_table(table, predictor, input_ids, len(layers), experts)
    runtime.record_prediction("prompt", begin, time.perf_counter_ns())
    wanted = PrefetchPolicy().experts_by_layer(table, experts)
    kept = within_room(list(zip(layers, wanted, strict=True)), room)
    runtime.read_early(announcing_of(runtime, predictor).early)
    return runtime.announce(dict(kept)), table
