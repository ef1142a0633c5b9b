"""What-if: what each eviction policy would read for a model's routing, at every budget, beside the least possible.

The engine's own state machine runs the routing of real text with copies that take no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext._load import _C
from sida_ext.experts.options import EVICTIONS
from sida_ext.experts.runtime import runtime_of
from sida_ext.models.layers import swapped_layers
from sida_ext.prediction.announcing import AnnouncingState
from sida_ext.prediction.lookahead_guard import GuardOptions
from sida_ext.prediction.moe_facts import predicted_stack
from sida_ext.prediction.prefetch import PrefetchPolicy, candidates_of
from sida_ext.prediction.protocol import Predictor

__all__ = [
    "UNTOLD",
    "ClockRow",
    "ModelledTime",
    "PlanRow",
    "Routing",
    "compare",
    "on_the_clock",
    "record_routing",
    "record_steps",
]

UNTOLD = "next_use, no tables"


@dataclass(frozen=True)
class Routing:
    """Which experts each batch used and, where a predictor was given, which were predicted.

    Each batch is a list of (MoE layer, distinct experts), in the order in which the layers run.
    """

    layers: int
    experts: int
    batches: list[list[tuple[int, list[int]]]]
    predicted: list[list[tuple[int, list[int]]]]  # empty without a predictor


@dataclass(frozen=True)
class PlanRow:
    """One budget: the hit rate of each policy, and how many experts it read in all."""

    slots: int
    share: float  # of all experts
    hit_rate: dict[str, float]
    loads: dict[str, int]


@dataclass(frozen=True)
class ModelledTime:
    """What things take on the virtual clock, in seconds.

    Attributes:
        read: one expert, on one lane; lanes do not slow each other down.
        before: what the model computes before each of its MoE layers.
        compute: one expert of a layer, on all of its tokens.
        lanes: reads under way at once.
    """

    read: float
    before: float
    compute: float
    lanes: int = 1


@dataclass(frozen=True)
class ClockRow:
    """One run on the virtual clock.

    Attributes:
        seconds: of the run; stalled: of these, a layer had nothing to compute for want of experts.
        wanted: experts demanded, each once in its batch and layer; loads: experts read.
        misses: demanded and not even on their way; late: on their way; wasted_prefetches: read ahead, evicted unused.
    """

    seconds: float
    stalled: float
    wanted: int
    loads: int
    misses: int
    late: int
    wasted_prefetches: int


def on_the_clock(
    routing: Routing,
    slots: int,
    time: ModelledTime,
    lookahead: int = 4,
    eviction: str = "next_use",
    guard: GuardOptions | None = None,
) -> ClockRow:
    """Run the batches through the engine's own state machine while time is counted, not measured: the same every time.

    Args:
        routing: its predicted tables are announced, or the true ones where there are none.
        lookahead: tables announced ahead of the batch under way; 0: none at all, not even its own. What predicting
            takes is not part of the model.
        guard: announce as ``stream`` does, by a guard with these options; None: announce everything.
    """
    return ClockRow(
        **_C.run_clock(  # type: ignore[arg-type]
            routing.layers,
            routing.experts,
            routing.batches,
            eviction,
            slots,
            lookahead,
            time.read,
            time.before,
            time.compute,
            time.lanes,
            routing.predicted if lookahead else [],
            *_asked(guard, routing.layers * routing.experts, time.lanes),
        )
    )


def _asked(guard: GuardOptions | None, experts: int, lanes: int) -> tuple[Any, ...]:
    """The last arguments of run_clock."""
    if guard is None:
        return ()
    admission = _Admission(guard, experts, lanes)
    return admission.admit, 0.0, admission.in_vain


class _Admission:
    """What ``stream`` asks before each batch, and at each of its layers, on the clock's time."""

    def __init__(self, options: GuardOptions, experts: int, lanes: int) -> None:
        self._experts, self._seconds = experts, 0.0
        self._counts: tuple[int, int, int, int, int, float, float] = (0, 0, 0, 0, 0, 0.0, 0.0)
        self._state = AnnouncingState(None, options, lanes, lambda: self._counts, lambda: self._seconds)

    def admit(self, seconds: float, *counts: Any) -> tuple[int, bool]:
        self._seconds, self._counts = seconds, counts
        return self._state.room(self._experts), self._state.early

    def in_vain(self, seconds: float, *counts: Any) -> bool:
        self._seconds, self._counts = seconds, counts
        return self._state.in_vain()


def record_routing(model: nn.Module, batches: Iterable[dict[str, Any]], predictor: Predictor | None = None) -> Routing:
    """Run the batches through a model with swapped experts and record the routing that its router chose."""
    layers = swapped_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no swapped MoE layers; load it with sida_ext.from_pretrained")
    header = runtime_of(model).header
    names = header.layers
    prefetch = PrefetchPolicy()
    routed: list[tuple[int, list[int]]] = []

    def record(name: str, expert_index: Tensor) -> None:
        index = expert_index.unique()
        routed.append((names.index(name), index[index >= 0].tolist()))

    before = [layer.observer for layer in layers]
    for layer in layers:
        layer.observer = record
    used: list[list[tuple[int, list[int]]]] = []
    predicted: list[list[tuple[int, list[int]]]] = []
    covered = [names.index(layer.name) for layer in layers if layer.table_layer is not None]
    try:
        with torch.no_grad():
            for batch in batches:
                routed = []
                model(**batch)
                used.append(routed)
                if predictor is not None:
                    table = predictor.predict(
                        batch["input_ids"],
                        batch.get("attention_mask"),
                        top_k=candidates_of(predictor, header.num_experts),
                    )
                    predicted.append(list(zip(covered, prefetch.experts_by_layer(table), strict=True)))
    finally:
        for layer, observer in zip(layers, before, strict=True):
            layer.observer = observer
    return Routing(len(names), header.num_experts, used, predicted)


def record_steps(model: nn.Module, batches: Iterable[dict[str, Any]]) -> Routing:
    """The routing of a decoder-only model's batches token by token, each as a step of its own: what decoding the same
    text wants. A forward over a text tells it, since no token's routing depends on a later one.

    Args:
        batches: with ``input_ids`` [B, S] and maybe ``attention_mask``; row after row, padding left out.

    Raises:
        ValueError: the model has no swapped layers of the experts seam.
    """
    layers = swapped_layers(model)
    if not layers or predicted_stack(model) != "causal":
        raise ValueError(f"{type(model).__name__} is no decoder-only model with swapped experts, expected one")
    header = runtime_of(model).header
    names = list(header.layers)
    routed: list[tuple[int, Tensor]] = []

    def record(name: str, expert_index: Tensor) -> None:
        routed.append((names.index(name), expert_index.long()))

    before = [layer.observer for layer in layers]
    for layer in layers:
        layer.observer = record
    steps: list[list[tuple[int, list[int]]]] = []
    try:
        with torch.no_grad():
            for batch in batches:
                routed.clear()
                model(**batch)
                mask = batch.get("attention_mask")
                real = torch.ones_like(batch["input_ids"]) if mask is None else mask
                for token in real.flatten().nonzero()[:, 0].tolist():
                    chosen = ((layer, index[token]) for layer, index in routed)
                    steps.append([(layer, index[index >= 0].tolist()) for layer, index in chosen])
    finally:
        for layer, observer in zip(layers, before, strict=True):
            layer.observer = observer
    return Routing(len(names), header.num_experts, steps, [])


def compare(routing: Routing, shares: Sequence[float], lookahead: int = 4) -> list[PlanRow]:
    """Hit rates of OPT (Belady, the whole future known), next_use and the policies that know nothing of the future.

    Args:
        shares: budgets as shares of all experts, each above 0 and up to 1.
        lookahead: batches whose tables are known ahead; tables are the predicted ones where there are any.

    Returns:
        One row for each share; ``"opt"``, the names of ``Options.eviction`` and ``UNTOLD`` are the keys. ``next_use``
        sees the tables; the others, and ``UNTOLD``, which is next_use as well, run without any.
    """
    rows = []
    total = routing.layers * routing.experts
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}, expected above 0 and up to 1")
        slots = max(1, round(total * share))
        results = {"opt": _C.run_optimal(routing.layers, routing.experts, routing.batches, slots)}
        for policy in (*EVICTIONS, UNTOLD):
            ahead = lookahead if policy == "next_use" else 0
            results[policy] = _C.run_policy(
                routing.layers,
                routing.experts,
                routing.batches,
                "next_use" if policy == UNTOLD else policy,
                slots,
                ahead,
                routing.predicted if ahead else [],
            )
        rows.append(
            PlanRow(
                slots=slots,
                share=share,
                hit_rate={name: 1 - loads / wanted if wanted else 1.0 for name, (wanted, loads, _) in results.items()},
                loads={name: loads for name, (_, loads, _) in results.items()},
            )
        )
    return rows
