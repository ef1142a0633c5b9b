"""Typed counters of a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

__all__ = ["LayerStanding", "LayerStats", "Stats"]


class LayerStanding(NamedTuple):
    """The experts of one MoE layer at a moment.

    Args:
        places: a byte an expert: 0 on disk alone, 1 arriving, 2 in memory, 3 in memory and computed from.
        demands: how often each was wanted since the start.
    """

    places: bytes
    demands: list[int]


def counts(text: str, metric: str | None = None) -> dict[str, Any]:
    """Of a counter of the engine: what it counts, and its name for Prometheus where that is another."""
    return {"text": text, "metric": metric}


@dataclass(frozen=True)
class Counters:
    """What was demanded, and what it took. An expert that a batch wants in a layer counts once, however many of its
    tokens go there.

    This is the one list of counters in Python: statistics and metrics follow from it.
    """

    requested: int = field(metadata=counts("MoE layers computed", "layers_computed"))
    unique: int = field(metadata=counts("Distinct experts wanted: hits + late + misses", "experts_wanted"))
    hits: int = field(metadata=counts("Experts that were in memory when they were wanted"))
    late: int = field(metadata=counts("Experts wanted while they were being read"))
    misses: int = field(metadata=counts("Experts wanted that nobody was reading"))
    evictions: int = field(metadata=counts("Experts evicted"))
    loads: int = field(metadata=counts("Reads of an expert that ended well"))
    failed_loads: int = field(metadata=counts("Reads of an expert that failed"))
    bytes_read: int = field(metadata=counts("Bytes read from the expert store", "read_bytes"))
    useful_prefetches: int = field(metadata=counts("Experts read ahead and then wanted"))
    wasted_prefetches: int = field(metadata=counts("Experts read ahead and evicted unused"))
    cancelled_prefetches: int = field(metadata=counts("Predicted experts whose read never began"))
    stall_seconds: float = field(metadata=counts("Seconds in which the computation waited with nothing to do"))

    @property
    def hit_rate(self) -> float:
        """Share of the wanted experts that were in memory; 1 if none was wanted."""
        return self.hits / self.unique if self.unique else 1.0


@dataclass(frozen=True)
class LayerStats(Counters):
    """Counters of one MoE layer, and quantiles of its latest waits (at most 4096), in seconds."""

    name: str
    stall_p50: float
    stall_p95: float
    stall_p99: float


@dataclass(frozen=True)
class Stats(Counters):
    """Counters of all layers together."""

    layers: tuple[LayerStats, ...]
    committed_slots: int  # experts in memory now, reads under way included
    peak_slots: int  # experts in memory at once, reads under way included
    read_seconds: float  # of all lanes together, checks included
    direct: bool  # reads go past the page cache
    lookahead: Any = None  # of a model with a RouterLookahead, its LookaheadStats

    @classmethod
    def from_engine(cls, raw: dict[str, Any], names: Sequence[str]) -> Stats:
        counters = [each.name for each in fields(Counters)]
        layers = tuple(
            LayerStats(
                **{name: layer[name] for name in counters},
                name=layer_name,
                stall_p50=_quantile(layer["stalls"], 0.50),
                stall_p95=_quantile(layer["stalls"], 0.95),
                stall_p99=_quantile(layer["stalls"], 0.99),
            )
            for layer_name, layer in zip(names, raw["layers"], strict=True)
        )
        return cls(
            **{name: sum(layer[name] for layer in raw["layers"]) for name in counters},
            layers=layers,
            committed_slots=raw["committed_slots"],
            peak_slots=raw["peak_slots"],
            read_seconds=raw["read_seconds"],
            direct=raw["direct"],
        )


def _quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that is not below ``share`` of them; 0 without samples."""
    if not samples:
        return 0.0
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]
