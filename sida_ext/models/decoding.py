"""Prediction inside ``generate``: before each step of the decoder its experts are predicted and announced.

``generate`` tells nobody but its cache which row goes on as which: a beam that is copied or dropped shows in
``cache.reorder_cache`` alone. So the predictor's state lives in the cache: at its first step a cache becomes an
instance of a subclass of its own class whose methods move the state along with the keys and values.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from sida_ext.errors import PredictorError
from sida_ext.experts.runtime import Runtime
from sida_ext.models.guards import BoundMethod
from sida_ext.prediction.cache_names import cache_of
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.protocol import check_table, is_decoder_predictor

__all__ = ["DecoderSteps", "PredictedCache", "hand_over", "predict_decoder", "steps_of"]

# The order of the stack's arguments; its callers in transformers pass all by name.
_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "inputs_embeds",
    "cache",
)
KEPT = 256  # tokens whose experts a state can be built from again: what lies further back has faded


class DecoderSteps:
    """A DecoderPredictor's state over the steps of one generation, and the tokens that it has seen.

    The tokens serve to build the state again when it cannot be moved along: after ``crop``, which takes back tokens
    that a speculation got wrong, and when the model is given another predictor between two steps. A predictor with
    ``observe`` is told the experts of each step too, and of a state that is built again those of the latest tokens.
    """

    def __init__(self) -> None:
        self._predictor: Any = None
        self._state: Any = None
        self._seen: Tensor | None = None  # [B, n]
        self._unseen = 0  # tokens of the cache that came before the first seen one
        self._chosen: Tensor | None = None  # [B, up to KEPT, layers, choices] of the latest tokens that were observed

    def step(
        self,
        predictor: Any,
        input_ids: Tensor,
        encoder_output: Tensor | None,
        mask: Tensor | None,
        cached: int,
        ask: Callable[[Any, Any, Tensor], tuple[Any, Any]] | None = None,
    ) -> Any:
        """The predictor's table for this step's tokens.

        Args:
            predictor: a DecoderPredictor.
            input_ids: [B, T] the new tokens.
            encoder_output, mask: [B, S, d_model] and [B, S], of the rows as they now are.
            cached: tokens whose keys and values are in the cache. If they are not those that were seen here (the cache
                was filled elsewhere), prediction begins anew with the new tokens.
            ask: what is asked of the predictor, given it, its state and the tokens; gives an answer and the state after
                it. None: its ``step``.
        """
        self._align(cached)
        state = self._state
        if self._predictor is not predictor:
            if encoder_output is None:
                encoder_output = torch.zeros(input_ids.shape[0], 0, 0)
            state = predictor.start(encoder_output, mask)
            if self._seen is not None and self._seen.shape[1] and getattr(predictor, "state_of_tokens", True):
                _, state = _take_step(predictor, state, self._seen)
            if self._chosen is not None and callable(getattr(predictor, "observe", None)):
                state = predictor.observe(state, self._chosen)
        answer, state = (ask or _take_step)(predictor, state, input_ids)
        # Kept only now: a step that failed has not been.
        self._predictor, self._state = predictor, state
        self._see(input_ids)
        return answer

    def skip(self, input_ids: Tensor, cached: int) -> None:
        """A step runs that nobody predicts; the state is built again when the next one is."""
        self._align(cached)
        self._predictor, self._state = None, None
        self._see(input_ids)

    def observe(self, chosen: Tensor) -> None:
        """Take the experts of the step that has just run, [B, T, layers, choices]; -1: none."""
        known = chosen if self._chosen is None else torch.cat([self._chosen, chosen], dim=1)
        self._chosen = known[:, -KEPT:]
        if self._predictor is not None and callable(getattr(self._predictor, "observe", None)):
            self._state = self._predictor.observe(self._state, chosen)

    def _align(self, cached: int) -> None:
        length = 0 if self._seen is None else self._seen.shape[1]
        if cached != self._unseen + length:
            self._predictor, self._state, self._seen, self._chosen, self._unseen = None, None, None, None, cached

    def _see(self, input_ids: Tensor) -> None:
        self._seen = input_ids if self._seen is None else torch.cat([self._seen, input_ids], dim=1)

    def reorder(self, index: Tensor) -> None:
        """Row i goes on as row index[i] did; index [n]."""
        if self._predictor is not None:
            with torch.no_grad():
                self._state = self._predictor.reorder(self._state, index)
        if self._seen is not None:
            self._seen = self._seen.index_select(0, index.to(self._seen.device))
        if self._chosen is not None:
            self._chosen = self._chosen.index_select(0, index.to(self._chosen.device))

    def repeat(self, repeats: int) -> None:
        """Every row becomes ``repeats`` rows, one after the other."""
        if self._seen is not None:
            self.reorder(torch.arange(self._seen.shape[0]).repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """The last ``tokens`` tokens were never there; the state is built again at the next step."""
        if self._seen is not None:
            self._predictor, self._state = None, None
            self._seen = self._seen[:, : max(self._seen.shape[1] - tokens, 0)]
        if self._chosen is not None:
            self._chosen = self._chosen[:, : max(self._chosen.shape[1] - tokens, 0)]

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderSteps:
        # A copy of a cache goes on from the same state with the same predictor.
        twin = DecoderSteps()
        twin._predictor, twin._unseen = self._predictor, self._unseen
        twin._state, twin._seen = copy.deepcopy(self._state, memo), copy.deepcopy(self._seen, memo)
        twin._chosen = copy.deepcopy(self._chosen, memo)
        return twin


def _take_step(predictor: Any, state: Any, input_ids: Tensor) -> tuple[HashTable, Any]:
    answer = predictor.step(state, input_ids)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise PredictorError(
            f"{type(predictor).__name__}.step returned {type(answer).__name__}, expected a pair of a "
            "sida_ext.HashTable and the state after it"
        )
    return answer


class _WithSteps:
    """What the subclass of a cache adds: every event that moves rows or tokens moves the predictor's state too."""

    sida_steps: DecoderSteps

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.sida_steps.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.sida_steps.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.sida_steps.reorder(indices)

    def crop(self, tokens_to_remove: int) -> None:
        before = int(self.get_seq_length())  # type: ignore[attr-defined]
        super().crop(tokens_to_remove)  # type: ignore[misc]
        # Counted, since transformers has changed what the argument means.
        self.sida_steps.crop(before - int(self.get_seq_length()))  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.sida_steps.reset()


class PredictedCache(_WithSteps, EncoderDecoderCache):
    """transformers' cache of an encoder-decoder, with the state of the model's DecoderPredictor in it."""


@functools.cache
def _with_steps(kind: type[Cache]) -> type[Cache]:
    """The class that a cache of class ``kind`` becomes."""
    return PredictedCache if kind is EncoderDecoderCache else type(f"Predicted{kind.__name__}", (_WithSteps, kind), {})


def steps_of(cache: Cache) -> DecoderSteps:
    """The state in a cache, which becomes one that has a state."""
    if not isinstance(cache, _WithSteps):
        cache.__class__ = _with_steps(type(cache))  # type: ignore[arg-type]
        cast(PredictedCache, cache).sida_steps = DecoderSteps()
    return cast(PredictedCache, cache).sida_steps


def predict_decoder(model: nn.Module, runtime: Runtime, layers: list[str]) -> None:
    """Let each step of ``model.decoder`` be predicted by ``runtime.decoder_predictor``, while there is one.

    Args:
        model: holds a Switch decoder with swapped experts.
        layers: names of the decoder's MoE layers, in the order in which they run.
    """
    decoder = model.get_submodule("decoder")
    decoder.forward = BoundMethod(decoder, functools.partial(_forward, runtime, layers))


def _forward(runtime: Runtime, layers: list[str], decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands before the decoder's forward. What it adds is announced to the engine and changes no result."""
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    input_ids = given.get("input_ids")
    predictor = runtime.decoder_predictor
    if predictor is None or input_ids is None:  # embeddings of the caller's own are no tokens
        return type(decoder).forward(decoder, *args, **kwargs)
    cache = given.get("cache", given.get("past_key_values"))
    steps = DecoderSteps() if cache is None else steps_of(cache)
    table = _predict(runtime, predictor, layers, steps, given, 0 if cache is None else int(cache.get_seq_length()))
    # A predictor whose probabilities can be trusted says from which on an expert is worth reading ahead.
    least = getattr(predictor, "min_need", 0.0)
    wanted = table.experts_by_layer(runtime.header.num_experts, least)
    number = runtime.announce(dict(zip(layers, wanted, strict=True)))
    try:
        with runtime.batch(number):
            output = type(decoder).forward(decoder, *args, **kwargs)
    finally:
        runtime.retire(number)
    hand_over(cache, output, steps)
    return output


def hand_over(cache: Cache | None, output: Any, steps: DecoderSteps) -> None:
    """Put the state into a cache that the stack made itself, with which a caller may go on."""
    if cache is None and not isinstance(output, tuple):
        made = cache_of(output)
        if isinstance(made, Cache):
            steps_of(made)
            cast(PredictedCache, made).sida_steps = steps


def _predict(
    runtime: Runtime, predictor: Any, layers: list[str], steps: DecoderSteps, given: dict[str, Any], cached: int
) -> HashTable:
    if not is_decoder_predictor(predictor):
        raise PredictorError(
            f"decoder_predictor is {type(predictor).__name__}, expected an object with start, step and reorder"
        )
    begin = time.perf_counter_ns()
    input_ids = given["input_ids"]
    with torch.no_grad():
        table = steps.step(
            predictor, input_ids, given.get("encoder_hidden_states"), given.get("encoder_attention_mask"), cached
        )
    check_table(table, predictor, input_ids, len(layers), runtime.header.num_experts, "step")
    runtime.record_prediction(f"decoder step {cached}", begin, time.perf_counter_ns())
    return table
