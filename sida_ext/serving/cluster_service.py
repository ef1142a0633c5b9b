"""Behind the HTTP application of a cluster: requests go to replicas, and again where a replica dies under them.

A request that is sent again is computed from its beginning, and what its client has already is held against it: a row's
tokens do not depend on where or beside what they are computed (machines of one instruction set), so the answer goes on
where it broke off.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import Request

from sida_ext.serving.driver import Answer, Work
from sida_ext.serving.expert_routing import RoutedRequest, mask_of, reports
from sida_ext.serving.metrics import FrontMetrics
from sida_ext.serving.model import ModelFacts, predicted_experts
from sida_ext.serving.predicting import load_predictor
from sida_ext.serving.protocol import RequestError
from sida_ext.serving.replica import ReplicaArguments
from sida_ext.serving.scheduler import Limits
from sida_ext.serving.service import Answers, until_left
from sida_ext.serving.settings import ServerSettings

__all__ = ["ClusterService"]

log = logging.getLogger("sida_ext.serving")

TOTALS = ("hits", "wanted", "stall_seconds", "read_bytes", "tokens", "prompt_tokens", "failed")
GAUGES = ("queue", "running", "cache_bytes", "memory_used", "memory_budget")


class ClusterService:
    """One ingress.

    Args:
        arguments: of the replicas.
        settings: of the server.
        application: Ray Serve's name of the application.
        connect: makes the handle of the replicas' deployment.
        attempts: replicas that may die under one request before it ends with an error.
    """

    def __init__(
        self,
        arguments: ReplicaArguments,
        settings: ServerSettings,
        application: str,
        connect: Callable[[], Any],
        attempts: int = 4,
    ) -> None:
        self.settings, self.limits = settings, arguments.limits
        self.draining = False
        self.metrics = ClusterMetrics(arguments.name, self.standings, arguments.limits)
        self._arguments, self._attempts = arguments, attempts
        self._application, self._connect = application, connect
        self._handle: Any = None
        self._predictor: Any = None
        self._facts: ModelFacts | None = None

    @property
    def model(self) -> ModelFacts:
        assert self._facts is not None
        return self._facts

    async def start(self) -> None:
        """Wait for the first replica, which says what is served."""
        from sida_ext.texts import tokenizer_of

        self._handle = self._connect()
        if self._arguments.predictor is not None:
            self._predictor = await asyncio.to_thread(
                load_predictor, self._arguments.model, self._arguments.predictor, self._arguments.options
            )
        self._facts = await self._handle.facts.remote()
        self._facts.tokenizer = await asyncio.to_thread(tokenizer_of, self._arguments.model)

    async def stop(self) -> None:
        self.draining = True

    def standings(self) -> dict[str, dict[str, Any]]:
        """What each replica last reported."""
        return reports(self._application)

    def standing(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~sida_ext.serving.service.Front`."""
        found = self.standings()
        if not found:
            return "no replica runs", {}
        return "ok", {"replicas": len(found)} | {
            key: sum(each.get(key, 0) for each in found.values()) for key in ("queue", "running")
        }

    @asynccontextmanager
    async def run(
        self, request: Request, work: list[Work], deadline: float, whole: bool = False
    ) -> AsyncIterator[Answers]:
        """Send a job to a replica; inside the block its answers are read; afterwards nothing of it runs any more."""
        if self._predictor is not None:
            await asyncio.to_thread(_predict, self._predictor, work)
        answers = Answers(len(work))
        task = asyncio.create_task(self._send(work, time.monotonic() + deadline, whole, answers))
        watch = asyncio.create_task(until_left(request, answers.left))
        try:
            yield answers
        finally:
            watch.cancel()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _send(self, work: list[Work], deadline: float, whole: bool, answers: Answers) -> None:
        """Tell ``answers`` what a replica answers; every row ends, if need be with an error."""
        try:
            problem = await asyncio.wait_for(
                self._until_answered(work, deadline, whole, answers), deadline - time.monotonic()
            )
        except asyncio.TimeoutError:
            problem = RequestError(504, "the request's deadline has passed", code="deadline")
        except BackPressureError:
            problem = RequestError(429, "the queue is full; try again later", code="queue_full", retry_after=1)
        except (DeploymentUnavailableError, RayTaskError):
            log.exception("a request failed")
            problem = RequestError(500, "the replica failed; its log says why", code="computation_failed")
        if problem is not None:
            answers.tell(0, problem)

    async def _until_answered(
        self, work: list[Work], deadline: float, whole: bool, answers: Answers
    ) -> RequestError | None:
        wanted = frozenset[tuple[int, int]]().union(*(each.experts or () for each in work))
        weight = sum(
            len(each.ids) + len(each.continuation) + (each.sampling.new_tokens if each.sampling is not None else 0)
            for each in work
        )
        routed = RoutedRequest(mask_of(wanted, self.model.experts), weight)
        told: list[list[Answer]] = [[] for _ in work]
        for attempt in range(1, self._attempts + 1):
            again = [0] * len(work)  # answers of this attempt, by row
            call = self._handle.options(stream=True).compute.remote(routed, work, deadline - time.monotonic(), whole)
            try:
                async for step in call:
                    for row, answer in step:
                        if again[row] < len(told[row]):
                            if answer != told[row][again[row]]:
                                return _differs(row)
                        else:
                            told[row].append(answer)
                            answers.tell(row, answer)
                        again[row] += 1
                return None
            except RayActorError as error:
                self.metrics.retries.inc()
                log.warning("a replica died under a request (attempt %d of %d): %s", attempt, self._attempts, error)
            finally:
                call.cancel()
        return RequestError(
            503,
            f"{self._attempts} replicas died under this request, one after the other",
            code="replicas_died",
            retry_after=10,
        )


def _predict(predictor: Any, work: list[Work]) -> None:
    """Name each row's experts, for the router and for the replica's own order of admission; rows of one prompt once."""
    found: dict[tuple[int, ...], frozenset[tuple[int, int]]] = {}
    for each in work:
        ids = tuple(each.ids)
        if ids not in found:
            found[ids] = predicted_experts(predictor, ids)
        each.experts = found[ids]


def _differs(row: int) -> RequestError:
    log.error("row %d: a second replica answers otherwise than the first; are their instruction sets the same?", row)
    return RequestError(
        500, "the replica died, and another one's answer differs from what was sent already", code="replicas_differ"
    )


class ClusterMetrics(FrontMetrics):
    """The registry of one ingress: its own requests, and what its replicas last reported."""

    def __init__(self, name: str, standings: Callable[[], dict[str, dict[str, Any]]], limits: Limits) -> None:
        super().__init__()
        self._name, self._standings, self._limits = name, standings, limits
        self.retries = Counter(
            "sida_server_retries", "Requests sent again because a replica died under them", registry=self.registry
        )
        self.registry.register(_ReplicaCollector(standings))

    def snapshot(self) -> dict[str, Any]:
        """What the page shows: all replicas together. What a replica that is gone had counted goes with it."""
        found = self._standings()
        sums = {key: sum(each.get(key, 0) for each in found.values()) for key in (*TOTALS, *GAUGES)}
        experts = max((each.get("experts_bytes", 0) for each in found.values()), default=0)
        return {
            "time": time.time(),
            "model": f"{self._name} on {len(found)} replicas",
            "rows": self._limits.rows * len(found),
            "experts_bytes": experts,
            **sums,
        }


class _ReplicaCollector(Collector):
    def __init__(self, standings: Callable[[], dict[str, dict[str, Any]]]) -> None:
        self._standings = standings

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        found = self._standings()
        yield GaugeMetricFamily("sida_replicas", "Replicas that run", value=len(found))
        for names, kind in ((TOTALS, CounterMetricFamily), (GAUGES, GaugeMetricFamily)):
            for name in names:
                metric = kind(f"sida_replica_{name}", f"See the page: {name}, by replica", labels=["replica"])
                for replica, said in found.items():
                    metric.add_metric([replica], said.get(name, 0))
                yield metric
