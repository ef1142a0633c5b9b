"""Steps of a decoder-only model, predicted: before a token runs, the experts of the first layers are announced, and at
each layer those of the layers that follow.

What is known of the tokens so far lies in the cache, where beams and taken-back tokens move it along
(:mod:`sida_ext.models.decoding`). How many layers ahead are announced, and from which probability on, is for the guard
to say that watches what is read in vain (:mod:`sida_ext.models.router_lookahead`). While it rests, nobody predicts.
"""

from __future__ import annotations

import functools
import inspect
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sida_ext.errors import PredictorError
from sida_ext.experts.runtime import Runtime
from sida_ext.models.decoding import DecoderSteps, hand_over, steps_of
from sida_ext.models.guards import BoundMethod
from sida_ext.models.layers import swapped_layers
from sida_ext.models.prompt_prediction import forward_prompt
from sida_ext.models.router_lookahead import StepOdds, attach_steps
from sida_ext.prediction.drift import DriftWatch
from sida_ext.prediction.learned_steps import LearnedSteps, learned_steps_of, odds_of_table
from sida_ext.prediction.protocol import check_table
from sida_ext.prediction.router_lookahead import within_room

__all__ = ["predict_causal"]

WATCHED = 4  # one step of so many is compared with what its routers chose


def predict_causal(model: nn.Module, runtime: Runtime, layers: list[str]) -> None:
    """Let each forward be predicted: prompts by ``runtime.predictor``, steps by ``runtime.decoder_predictor`` or by the
    steps that ``runtime.predictor`` has learned, while there are such.

    Args:
        model: a decoder-only model with swapped experts.
        layers: names of its MoE layers, in the order of its hash tables.
    """
    # transformers looks at the signature of a model's forward for what generate() may hand on.
    signature = inspect.signature(model.forward)
    model.forward = BoundMethod(model, functools.partial(_forward, runtime, layers), signature)


def _forward(runtime: Runtime, layers: list[str], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands before the model's forward. What it adds is announced to the engine and changes no result."""
    predictor = learned_steps_of((runtime.decoder_predictor, runtime.predictor))
    input_ids: Any = kwargs.get("input_ids", args[0] if args else None)
    given = isinstance(input_ids, Tensor) and input_ids.dim() == 2 and input_ids.numel() > 0
    # Announced by who calls: a batch of stream. The two tiers of a GPU machine take no announcement between layers.
    if predictor is None or not given or runtime.current.number or runtime.device.type != "cpu":
        return forward_prompt(runtime, layers, model, *args, **kwargs)
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    cache = cache if isinstance(cache, Cache) else None
    steps = DecoderSteps() if cache is None else steps_of(cache)
    cached = 0 if cache is None else int(cache.get_seq_length())
    chosen: dict[int, Tensor] = {}
    if input_ids.shape[1] > 1 and not cached:
        steps.skip(input_ids, cached)
        with runtime.batch(0, None, chosen):
            output = forward_prompt(runtime, layers, model, *args, **kwargs)
        step = None
    else:
        ahead = _ahead_of(runtime, model)
        step = _announce(runtime, layers, predictor, steps, input_ids, cached, ahead)
        try:
            with runtime.batch(0, None, chosen):
                output = type(model).forward(model, *args, **kwargs)
        finally:
            ahead.standing.forget()
    experts = _experts(chosen, input_ids, len(layers), kwargs.get("attention_mask"))
    if experts is not None:
        steps.observe(experts)
        if step is not None and cached % WATCHED == 0:
            _watch(runtime, predictor, step.odds, experts)
    hand_over(cache, output, steps)
    return output


def _ahead_of(runtime: Runtime, model: Any) -> Any:
    """What the model's layers share that announce ahead; found once, for the modules of a model are many."""
    found = model.__dict__.get("_sida_ahead")
    if found is None:
        found = model._sida_ahead = attach_steps(runtime, swapped_layers(model))
    return found


def _announce(
    runtime: Runtime, layers: list[str], predictor: Any, steps: DecoderSteps, input_ids: Tensor, cached: int, ahead: Any
) -> StepOdds | None:
    """Predict a step and announce the first layers; None where the guard lets nothing be read ahead."""
    standing, state = ahead.standing, ahead.state
    standing.forget()
    level = min(state.guard.level, len(layers))
    if not level:
        steps.skip(input_ids, cached)
        return None
    begin = time.perf_counter_ns()
    with torch.no_grad():
        step = _step(runtime, layers, predictor, steps, input_ids, cached)
        least = state.least if step.least is None else step.least
        wanted = [(name, step.named(at, at + 1, None, least)) for at, name in enumerate(layers[:level])]
    runtime.record_prediction(f"step {cached}", begin, time.perf_counter_ns())
    standing.named.update({(name, at + 1): experts for at, (name, experts) in enumerate(wanted)})
    standing.step = step
    kept = within_room(wanted, runtime.slots)
    if kept:
        standing.number = runtime.announce(dict(kept))
    return step


def _step(
    runtime: Runtime, layers: list[str], predictor: Any, steps: DecoderSteps, input_ids: Tensor, cached: int
) -> StepOdds:
    experts = runtime.header.num_experts
    if isinstance(predictor, LearnedSteps):
        if (predictor.layers, predictor.experts) != (len(layers), experts):
            raise PredictorError(
                f"the learned steps are of {predictor.layers} layers of {predictor.experts} experts, expected this "
                f"model's {len(layers)} of {experts}"
            )
        return StepOdds(steps.step(predictor, input_ids, None, None, cached, ask=_odds), predictor)
    table = steps.step(predictor, input_ids, None, None, cached)
    check_table(table, predictor, input_ids, len(layers), experts, "step")
    # A predictor whose probabilities can be trusted says from which on an expert is worth reading ahead.
    return StepOdds(odds_of_table(table, experts), None, float(getattr(predictor, "min_need", 0.0)))


def _odds(predictor: LearnedSteps, state: Any, input_ids: Tensor) -> tuple[Tensor, Any]:
    return predictor.odds(state, input_ids), state


def _experts(chosen: dict[int, Tensor], input_ids: Tensor, layers: int, mask: Any) -> Tensor | None:
    """What the step's tokens were given to, [B, T, layers, choices] int16, -1 at padding; None where not every layer
    ran once over them, or layers choose different numbers."""
    rows, tokens = input_ids.shape
    each = [chosen[at] for at in range(layers) if at in chosen]
    if len(each) != layers or len({tuple(index.shape) for index in each}) != 1 or len(each[0]) != rows * tokens:
        return None
    experts = torch.stack(each, dim=1).to(torch.int16).unflatten(0, (rows, tokens))
    if tokens > 1 and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= tokens:
        experts = experts.masked_fill((mask[:, -tokens:] == 0)[:, :, None, None], -1)
    return experts


def _watch(runtime: Runtime, predictor: Any, odds: Tensor, experts: Tensor) -> None:
    """Compare the most probable expert of each layer with what its router chose, as the predictor's report does."""
    expected = getattr(predictor, "held_out_top1", None)
    if not isinstance(predictor, LearnedSteps) or not expected:
        return
    if runtime.step_drift is None or runtime.step_drift[0] is not predictor:
        runtime.step_drift = (predictor, DriftWatch(expected))
    hit = (experts.flatten(0, 1) == odds.argmax(-1, keepdim=True)).any(-1)
    runtime.step_drift[1].count(float(hit.sum()) / predictor.layers, hit.shape[0])
