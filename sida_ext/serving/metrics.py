"""What the server counts, for Prometheus and for the page; both read the same numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sida_ext.experts.metrics import register
from sida_ext.serving.driver import Driver

__all__ = ["FrontMetrics", "ServerMetrics"]

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_DIGITS = bytes(b"0123"[place] if place < 4 else 63 for place in range(256))


class _DriverCollector(Collector):
    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        driver, counts = self._driver, self._driver.counts
        for name, text, value in (
            ("queue", "Rows that wait", driver.waiting),
            ("running", "Rows that run", driver.running),
            ("cache_bytes", "Memory of keys and values of running rows", driver.model.cache_bytes),
        ):
            yield GaugeMetricFamily(f"sida_server_{name}", text, value=value)
        for name, text, total in (
            ("steps", "Steps of the model", counts.steps),
            ("step_rows", "Rows of all steps together", counts.rows),
            ("step_seconds", "Seconds in steps", counts.step_seconds),
            ("prompt_tokens", "Tokens of prompts", counts.prompt_tokens),
            ("generated_tokens", "Tokens written", counts.tokens),
            ("failed_rows", "Rows that ended with an error of the model", counts.failed_rows),
            ("expired_rows", "Rows whose deadline passed", counts.expired_rows),
        ):
            yield CounterMetricFamily(f"sida_server_{name}", text, value=total)


class FrontMetrics:
    """What every server counts of its requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sida_server_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "sida_server_request_seconds",
            "Seconds from a request to the end of its answer",
            ["endpoint"],
            buckets=_LATENCIES,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "sida_server_first_token_seconds",
            "Seconds from a request to its first token",
            buckets=_LATENCIES,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def snapshot(self) -> dict[str, Any]:
        """What the page shows; totals, from which the page makes rates."""
        raise NotImplementedError


class ServerMetrics(FrontMetrics):
    """The registry of one server."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver
        self.registry.register(_DriverCollector(driver))
        if driver.model.runtime is not None:
            register(driver.model.runtime, driver.model.name, self.registry)

    def snapshot(self) -> dict[str, Any]:
        driver, counts, runtime = self.driver, self.driver.counts, self.driver.model.runtime
        found: dict[str, Any] = {
            "time": time.time(),
            "model": driver.model.name,
            "queue": driver.waiting,
            "running": driver.running,
            "rows": driver.limits.rows,
            "tokens": counts.tokens,
            "prompt_tokens": counts.prompt_tokens,
            "failed": counts.failed_rows,
            "cache_bytes": driver.model.cache_bytes,
        }
        if runtime is None or runtime.closed:
            return found
        stats = runtime.stats()
        record = runtime.header.record_bytes
        found |= {
            "hits": stats.hits,
            "wanted": stats.unique,
            "stall_seconds": stats.stall_seconds,
            "read_bytes": stats.bytes_read,
            "memory_used": stats.committed_slots * record,
            "memory_budget": runtime.expert_memory,
            "experts_bytes": runtime.header.experts_bytes,
            "layers": [
                {"name": layer.name, "places": standing.places.translate(_DIGITS).decode(), "demands": standing.demands}
                for layer, standing in zip(stats.layers, runtime.standings(), strict=True)
            ],
        }
        return found
