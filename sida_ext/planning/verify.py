"""Predicted beside measured: the model is loaded and run, its routing recorded, and the plan made of the same run."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sida_ext.experts.budget import parse_memory
from sida_ext.experts.folders import default_cache
from sida_ext.planning.capacity import experts_bytes
from sida_ext.planning.counting import ModelFacts, count_experts
from sida_ext.planning.headers import read_headers
from sida_ext.planning.layer_time import measure_layer
from sida_ext.planning.rates import Rates, measured_rates
from sida_ext.planning.routing import Batches, Recorded, Tokens
from sida_ext.planning.speed import decode_speed, prompt_speed
from sida_ext.prediction.cache_names import cache_argument, cache_of

__all__ = ["Verified", "verify"]

PROMPTS_BEFORE, PROMPTS = 3, 4
STEPS_BEFORE, STEPS = 24, 32
SHORT = 16  # tokens of the prompt before the steps


@dataclass(frozen=True)
class Verified:
    """One kind of run. Ranges are (low, high), tokens a second.

    Attributes:
        what: ``decode`` or ``prompt``.
        measured: tokens a second of the whole timed part, not of its fastest call.
        predicted: from the routing that this run had; unrecorded: from the least and the most local plausible one.
        hit_rate: measured; predicted_hit_rate: what the virtual clock made of the same routing.
        disk_bytes_per_token: measured; predicted_disk_bytes: the same of the clock.
    """

    what: str
    measured: float
    predicted: tuple[float, float]
    unrecorded: tuple[float, float]
    hit_rate: float
    predicted_hit_rate: float
    disk_bytes_per_token: float
    predicted_disk_bytes: float

    @property
    def inside(self) -> bool:
        return self.predicted[0] <= self.measured <= self.predicted[1]

    @property
    def inside_unrecorded(self) -> bool:
        return self.unrecorded[0] <= self.measured <= self.unrecorded[1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"inside": self.inside, "inside_unrecorded": self.inside_unrecorded}


class _Routing:
    """What the routers of a model with swapped experts choose, batch by batch."""

    def __init__(self, model: Any) -> None:
        from sida_ext.experts.runtime import runtime_of
        from sida_ext.models.layers import swapped_layers

        self._names = list(runtime_of(model).header.layers)
        self._layers = swapped_layers(model)
        self.batches: Batches = []
        self.tokens: Tokens = []

    def _tell(self, name: str, expert_index: Any) -> None:
        wanted, counts = expert_index[expert_index >= 0].unique(return_counts=True)
        self.batches[-1].append((self._names.index(name), wanted.tolist()))
        self.tokens[-1].append(counts.tolist())

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The forward in this block is the next batch."""
        self.batches.append([])
        self.tokens.append([])
        for layer in self._layers:
            layer.observer = self._tell
        try:
            yield
        finally:
            for layer in self._layers:
                layer.observer = None


@dataclass(frozen=True)
class _Timed:
    """A run: seconds of each batch that counts, tokens of one, the engine's counters over them, and its routing."""

    what: str
    seconds: list[float]
    tokens: int
    stats: Any
    routing: Recorded


class _Runner:
    """Random prompts and greedy steps, timed one by one while their routing is recorded."""

    def __init__(self, model: Any, facts: ModelFacts, seed: int) -> None:
        import torch

        from sida_ext.experts.runtime import runtime_of

        self.routing = _Routing(model)
        self._model, self._facts = model, facts
        self._runtime = runtime_of(model)
        self._random = torch.Generator().manual_seed(seed)
        self._more: dict[str, Any] = {} if facts.encoder_only else {"use_cache": True, "logits_to_keep": 1}

    def _call(self, **inputs: Any) -> tuple[float, Any]:
        with self.routing.batch(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers renames the argument of the cache
            begin = time.perf_counter()
            output = self._model(**inputs, **self._more)
            return time.perf_counter() - begin, output

    def _ids(self, tokens: int) -> Any:
        import torch

        return torch.randint(3, self._facts.vocabulary, (1, tokens), generator=self._random)

    def _finished(self, what: str, seconds: list[float], tokens: int) -> _Timed:
        batches = list(self.routing.batches)
        recorded = Recorded(batches, len(batches) - len(seconds), list(self.routing.tokens))
        return _Timed(what, seconds, tokens, self._runtime.stats(), recorded)

    def prompts(self, tokens: int) -> _Timed:
        for _ in range(PROMPTS_BEFORE):
            self._call(input_ids=self._ids(tokens))
        self._runtime.reset_stats()
        seconds = [self._call(input_ids=self._ids(tokens))[0] for _ in range(PROMPTS)]
        return self._finished("prompt", seconds, tokens)

    def steps(self) -> _Timed:
        _, output = self._call(input_ids=self._ids(SHORT))
        seconds, cache = [], cache_argument(self._model)
        for number in range(STEPS_BEFORE + STEPS):
            if number == STEPS_BEFORE:
                self._runtime.reset_stats()
            token = output.logits[:, -1:].argmax(-1)
            taken, output = self._call(input_ids=token, **{cache: cache_of(output)})
            seconds.append(taken)
        return self._finished("decode", seconds[STEPS_BEFORE:], 1)


def _compared(
    timed: _Timed, facts: ModelFacts, dtype: str, budget: int, rates: Rates, dense_dtype: str | None
) -> Verified:
    if timed.what == "decode":
        predicted, unrecorded = (
            decode_speed(facts, dtype, budget, rates, given, dense_dtype) for given in (timed.routing, None)
        )
    else:
        tokens = timed.tokens
        predicted, unrecorded = (
            prompt_speed(facts, dtype, budget, rates, tokens, given, dense_dtype) for given in (timed.routing, None)
        )
    count = len(timed.seconds) * timed.tokens
    return Verified(
        what=timed.what,
        measured=count / sum(timed.seconds),
        predicted=predicted.tokens_per_s,
        unrecorded=unrecorded.tokens_per_s,
        hit_rate=timed.stats.hit_rate,
        predicted_hit_rate=statistics.fmean(predicted.hit_rate),
        disk_bytes_per_token=timed.stats.bytes_read / count,
        predicted_disk_bytes=statistics.fmean(predicted.disk_bytes_per_token),
    )


def verify(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    dense_dtype: str | None = None,
    expert_memory: str | int = "25%",
    prompt_tokens: int | None = None,
    seed: int = 0,
) -> list[Verified]:
    """Load a checkpoint, run random prompts and greedy steps, and predict the same from rates measured before the load
    and after the run.

    Args:
        folder: of the checkpoint, or a hub id; its store is packed if it is not in the cache.
        dtype, dense_dtype: of the experts and of every other large matrix.
        expert_memory: budget: bytes, ``"2GiB"``, ``"25%"`` of the experts.
        prompt_tokens: None: 128, or 32 for an encoder.

    Returns:
        Rows for prompts and, of a model that decodes, for steps. What is compared are batches of one sequence, without
        a predictor.
    """
    import torch

    import sida_ext

    headers = read_headers(folder)
    facts = count_experts(headers)
    budget = parse_memory(expert_memory, experts_bytes(facts, dtype))
    measure_layer(headers.config, facts)
    before = measured_rates(facts, dtype, default_cache(), again=True, dense_dtype=dense_dtype)
    model: Any = sida_ext.from_pretrained(
        folder, expert_memory=budget, expert_dtype=dtype, dense_dtype=dense_dtype, dtype=getattr(torch, facts.dtype)
    )
    try:
        with torch.inference_mode():
            runner = _Runner(model, facts, seed)
            timed = [runner.prompts(prompt_tokens or (32 if facts.encoder_only else 128))]
            if not facts.encoder_only:
                timed.append(runner.steps())
    finally:
        model.sida.close()
    model = runner = None  # type: ignore[assignment]  # their memory is measured next
    rates = before.joined(measured_rates(facts, dtype, default_cache(), again=True, dense_dtype=dense_dtype))
    return [_compared(one, facts, dtype, budget, rates, dense_dtype) for one in timed]
