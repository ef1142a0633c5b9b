"""Typed counters of a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sida_ext._load import _C

__all__ = ["LayerStanding", "LayerStats", "Stats"]


class LayerStanding(NamedTuple):
    """The experts of one MoE layer at a moment.

    Args:
        places: a byte an expert: 0 on disk alone, 1 arriving, 2 in memory, 3 in memory and computed from.
        demands: how often each was wanted since the start.
    """

    places: bytes
    demands: list[int]


@dataclass(frozen=True)
class Counters:
    """What was demanded, and what it took. An expert that a batch wants in a layer counts once, however many of its
    tokens go there.

    The counters are those of ``csrc/experts/stats.h``, which says what each counts (``_C.layer_counters``); they are
    named here for their types, and a list that differs is an error at the first ``stats()``.
    """

    requested: int
    unique: int
    hits: int
    late: int
    misses: int
    evictions: int
    loads: int
    failed_loads: int
    bytes_read: int
    useful_prefetches: int
    wasted_prefetches: int
    cancelled_prefetches: int
    choices: int
    low_bit_choices: int
    named: int
    named_wanted: int
    stall_seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of the wanted experts that were in memory; 1 if none was wanted."""
        return self.hits / self.unique if self.unique else 1.0

    @property
    def low_bit_share(self) -> float:
        """Share of the choices that low-bit copies served; 0 if there was none."""
        return self.low_bit_choices / self.choices if self.choices else 0.0


@dataclass(frozen=True)
class LayerStats(Counters):
    """Counters of one MoE layer, and quantiles of its latest waits (at most 4096), in seconds."""

    name: str
    stall_p50: float
    stall_p95: float
    stall_p99: float


@dataclass(frozen=True)
class Stats(Counters):
    """Counters of all layers together, and those of the engine (``_C.engine_counters``)."""

    peak_slots: int
    committed_slots: int
    lane_restarts: int
    read_seconds: float
    verify_seconds: float
    direct: bool  # reads go past the page cache
    layers: tuple[LayerStats, ...]
    lookahead: Any = None  # of a model with a RouterLookahead, its LookaheadStats
    announcing: Any = None  # where a predictor's batches were announced, an AnnounceStats

    @classmethod
    def from_engine(cls, raw: dict[str, Any], names: Sequence[str]) -> Stats:
        counted = [name for name, _ in _C.layer_counters]
        layers = tuple(
            LayerStats(
                **{name: layer[name] for name in counted},
                name=layer_name,
                stall_p50=_quantile(layer["stalls"], 0.50),
                stall_p95=_quantile(layer["stalls"], 0.95),
                stall_p99=_quantile(layer["stalls"], 0.99),
            )
            for layer_name, layer in zip(names, raw["layers"], strict=True)
        )
        return cls(
            **{name: sum(layer[name] for layer in raw["layers"]) for name in counted},
            **{name: raw[name] for name, _ in _C.engine_counters},
            direct=raw["direct"],
            layers=layers,
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain dictionaries, lists and numbers, with ``hit_rate`` beside the counters, of the whole and
        of each layer: what ``json.dumps`` takes."""
        found = asdict(self)
        found["layers"] = [asdict(layer) | {"hit_rate": layer.hit_rate} for layer in self.layers]
        return found | {"hit_rate": self.hit_rate}


def _quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that is not below ``share`` of them; 0 without samples."""
    if not samples:
        return 0.0
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]
