"""Prometheus metrics of a runtime. Needs prometheus_client: the optional extra ``metrics``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from sida_ext._load import _C
from sida_ext.experts.runtime import Runtime, runtime_of

try:
    from prometheus_client.core import REGISTRY, CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "sida_ext.experts.metrics needs prometheus_client, which is not installed: pip install 'sida_ext[metrics]'"
    ) from error

__all__ = ["RuntimeCollector", "register"]

# Where Prometheus has another name for a counter of the engine.
RENAMED = {"requested": "layers_computed", "unique": "experts_wanted", "bytes_read": "read_bytes"}
# Counters of each MoE layer and of the engine: name of the metric, of the counter, help.
LAYER_COUNTERS = tuple((RENAMED.get(name, name), name, text) for name, text in _C.layer_counters)
SLOTS = ("peak_slots", "committed_slots")  # shown as bytes
ENGINE_COUNTERS = tuple((name, name, text) for name, text in _C.engine_counters if name not in SLOTS)
QUANTILES = ((0.5, "stall_p50"), (0.95, "stall_p95"), (0.99, "stall_p99"))


class RuntimeCollector(Collector):
    """Reads a runtime's statistics whenever Prometheus asks; nothing is counted twice and nothing runs in between.

    The runtime is held weakly: a model that was dropped or closed has no metrics any more. ``reset_stats()`` sets the
    counters back to 0, which Prometheus takes for a restart.

    Args:
        model: a model with swapped experts, or its runtime.
        name: value of the label ``model``, to tell several models of one process apart.
    """

    def __init__(self, model: Any, name: str = "") -> None:
        self._runtime = weakref.ref(model if isinstance(model, Runtime) else runtime_of(model))
        self._name = name

    def describe(self) -> list[Metric]:
        return []  # names are not fixed at registration: a registry may hold the collectors of several models

    def collect(self) -> Iterator[Metric]:
        runtime = self._runtime()
        if runtime is None or runtime.closed:
            return
        stats = runtime.stats()
        for metric, field, text in LAYER_COUNTERS:
            counter = CounterMetricFamily(f"sida_{metric}", text, labels=["model", "layer"])
            for layer in stats.layers:
                counter.add_metric([self._name, layer.name], getattr(layer, field))
            yield counter
        waits = GaugeMetricFamily(
            "sida_stall_quantile_seconds",
            "Quantiles of a layer's latest waits, at most 4096",
            labels=["model", "layer", "quantile"],
        )
        for layer in stats.layers:
            for share, field in QUANTILES:
                waits.add_metric([self._name, layer.name, str(share)], getattr(layer, field))
        yield waits
        record = runtime.header.record_bytes
        for metric, value, text in (
            ("expert_memory_budget_bytes", runtime.expert_memory, "Budget of the expert memory"),
            ("expert_memory_used_bytes", stats.committed_slots * record, "Expert memory in use, reads under way too"),
            ("expert_memory_peak_bytes", stats.peak_slots * record, "Most expert memory in use at once"),
            ("experts_bytes", runtime.header.experts_bytes, "All experts of the store"),
        ):
            gauge = GaugeMetricFamily(f"sida_{metric}", text, labels=["model"])
            gauge.add_metric([self._name], value)
            yield gauge
        for metric, field, text in ENGINE_COUNTERS:
            counter = CounterMetricFamily(f"sida_{metric}", text, labels=["model"])
            counter.add_metric([self._name], getattr(stats, field))
            yield counter


def register(model: Any, name: str = "", registry: CollectorRegistry = REGISTRY) -> RuntimeCollector:
    """Add a model's metrics to a registry; ``prometheus_client.start_http_server(port)`` then serves the default one.

    Returns:
        The collector, for ``registry.unregister``.
    """
    collector = RuntimeCollector(model, name)
    registry.register(collector)
    return collector
