"""Predicted beside measured: the model is loaded and run, its routing recorded, and the plan made of the same run."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sida_ext.experts.budget import parse_memory
from sida_ext.experts.folders import default_cache
from sida_ext.planning.capacity import experts_bytes
from sida_ext.planning.counting import count_experts
from sida_ext.planning.headers import read_headers
from sida_ext.planning.layer_time import measure_layer
from sida_ext.planning.rates import layer_rates, measured_rates
from sida_ext.planning.routing import Batches, Recorded
from sida_ext.planning.speed import Speed, decode_speed, prompt_speed

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

    def _tell(self, name: str, expert_index: Any) -> None:
        wanted = expert_index.unique()
        self.batches[-1].append((self._names.index(name), wanted[wanted >= 0].tolist()))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The forward in this block is the next batch."""
        self.batches.append([])
        for layer in self._layers:
            layer.observer = self._tell
        try:
            yield
        finally:
            for layer in self._layers:
                layer.observer = None


def _row(what: str, seconds: list[float], tokens: int, stats: Any, predicted: Speed, unrecorded: Speed) -> Verified:
    count = len(seconds) * tokens
    return Verified(
        what,
        count / sum(seconds),
        predicted.tokens_per_s,
        unrecorded.tokens_per_s,
        stats.hit_rate,
        statistics.fmean(predicted.hit_rate),
        stats.bytes_read / count,
        statistics.fmean(predicted.disk_bytes_per_token),
    )


def verify(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    expert_memory: str | int = "25%",
    prompt_tokens: int | None = None,
    seed: int = 0,
) -> list[Verified]:
    """Load a checkpoint, run random prompts and greedy steps, and predict the same from rates measured around the run.

    Args:
        folder: of the checkpoint; its store is packed if it is not in the cache.
        expert_memory: budget: bytes, ``"2GiB"``, ``"25%"`` of the experts.
        prompt_tokens: None: 128, or 32 for an encoder.

    Returns:
        Rows for prompts and, of a model that decodes, for steps. What is compared are batches of one sequence, without
        a predictor.
    """
    import torch

    import sida_ext
    from sida_ext.experts.runtime import runtime_of

    headers = read_headers(folder)
    facts = count_experts(headers)
    tokens = prompt_tokens or (32 if facts.encoder_only else 128)
    budget = parse_memory(expert_memory, experts_bytes(facts, dtype))
    if layer_rates(facts)[0] is None:
        measure_layer(headers.config, facts)
    model: Any = sida_ext.from_pretrained(
        folder, expert_memory=budget, expert_dtype=dtype, dtype=getattr(torch, facts.dtype)
    )
    routing = _Routing(model)
    runtime: Any = runtime_of(model)
    random = torch.Generator().manual_seed(seed)
    rows: list[tuple[str, list[float], int, Any, Recorded]] = []

    def run(**inputs: Any) -> tuple[float, Any]:
        with routing.batch(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers renames the argument of the cache
            begin = time.perf_counter()
            output = model(**inputs)
            return time.perf_counter() - begin, output

    try:
        with torch.inference_mode():
            more: dict[str, Any] = {} if facts.encoder_only else {"use_cache": True, "logits_to_keep": 1}
            times = []
            for number in range(PROMPTS_BEFORE + PROMPTS):
                if number == PROMPTS_BEFORE:
                    runtime.reset_stats()
                ids = torch.randint(3, facts.vocabulary, (1, tokens), generator=random)
                times.append(run(input_ids=ids, **more)[0])
            rows.append(
                (
                    "prompt",
                    times[PROMPTS_BEFORE:],
                    tokens,
                    runtime.stats(),
                    Recorded(list(routing.batches), PROMPTS_BEFORE),
                )
            )
            if not facts.encoder_only:
                _, output = run(input_ids=torch.randint(3, facts.vocabulary, (1, SHORT), generator=random), **more)
                times = []
                for number in range(STEPS_BEFORE + STEPS):
                    if number == STEPS_BEFORE:
                        runtime.reset_stats()
                    token = output.logits[:, -1:].argmax(-1)
                    taken, output = run(input_ids=token, past_key_values=output.past_key_values, **more)
                    times.append(taken)
                timed = len(routing.batches) - STEPS
                rows.append(("decode", times[STEPS_BEFORE:], 1, runtime.stats(), Recorded(routing.batches, timed)))
    finally:
        runtime.close()
        runtime = model = None  # its memory is measured next
    rates = measured_rates(facts, dtype, default_cache(), again=True)
    found = []
    for what, seconds, count, stats, recorded in rows:
        if what == "decode":
            predicted, unrecorded = (decode_speed(facts, dtype, budget, rates, given) for given in (recorded, None))
        else:
            predicted, unrecorded = (
                prompt_speed(facts, dtype, budget, rates, tokens, given) for given in (recorded, None)
            )
        found.append(_row(what, seconds, count, stats, predicted, unrecorded))
    return found
