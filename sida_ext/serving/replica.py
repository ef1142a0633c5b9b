"""One replica of a served model: its own experts, budget and driver, without HTTP. A plain class; Ray makes an actor of
it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sida_ext.files import placed
from sida_ext.serving.command import load
from sida_ext.serving.driver import Answer, Driver, Job, Work
from sida_ext.serving.expert_routing import mask_of
from sida_ext.serving.model import ModelFacts
from sida_ext.serving.protocol import RequestError
from sida_ext.serving.scheduler import Limits

__all__ = ["Replica", "ReplicaArguments"]


@dataclass(frozen=True)
class ReplicaArguments:
    """What a replica is made of.

    Args:
        model: checkpoint folder or hub id; every machine must reach it under this name.
        name: what clients call it.
        context, predictor: see ``sida serve``.
        options: of :func:`sida_ext.from_pretrained`.
        limits: of the replica's own batches.
        drain: seconds that running rows get when the replica is to end.
    """

    model: str
    name: str
    context: int | None = None
    predictor: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    drain: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", placed(self.model))
        if self.predictor is not None:
            object.__setattr__(self, "predictor", placed(self.predictor))
        if self.options.get("store") is not None:
            object.__setattr__(self, "options", {**self.options, "store": placed(str(self.options["store"]))})


class Replica:
    """See the module."""

    def __init__(self, arguments: ReplicaArguments) -> None:
        self._arguments = arguments
        self._served = load(
            arguments.model,
            name=arguments.name,
            context=arguments.context,
            rows=arguments.limits.rows,
            shared=arguments.limits.shared,
            predictor=arguments.predictor,
            **arguments.options,
        )
        self._driver = Driver(self._served, arguments.limits, self._deliver)
        self._driver.start()
        self._loop: asyncio.AbstractEventLoop | None = None

    def facts(self) -> ModelFacts:
        """What the ingress must know of the model."""
        return self._served.facts

    async def compute(
        self, routed: Any, work: list[Work], seconds: float, whole: bool
    ) -> AsyncIterator[list[tuple[int, Answer]]]:
        """The answers (row, answer) of a job, those of one step together; the last of a row is its last.

        Args:
            routed: was read by the request router.
            work: the rows.
            seconds: after which the job is given up.
            whole: each row answers once, when it is complete.
        """
        self._loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Answer]] = asyncio.Queue()
        job = Job(work, time.monotonic() + seconds, lambda row, answer: queue.put_nowait((row, answer)), whole)
        try:
            self._driver.submit(job)
        except RequestError as problem:
            yield [(0, problem)]
            return
        left = len(work)
        try:
            while left:
                answers = [await queue.get()]
                while not queue.empty():
                    answers.append(queue.get_nowait())
                left -= sum(getattr(answer, "finish", "over") is not None for _, answer in answers)
                yield answers
        finally:
            self._driver.cancel(job)

    def _deliver(self, answers: Sequence[Callable[[], None]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: [answer() for answer in answers])

    def record_routing_stats(self) -> dict[str, Any]:
        """What Ray asks for now and then and gives to every router: the experts that are held, as bits in hexadecimal,
        and totals."""
        driver, runtime = self._driver, self._served.runtime
        counts = driver.counts
        found: dict[str, Any] = {
            "queue": driver.waiting,
            "running": driver.running,
            "tokens": counts.tokens,
            "prompt_tokens": counts.prompt_tokens,
            "failed": counts.failed_rows,
            "cache_bytes": self._served.cache_bytes,
        }
        if runtime is not None and not runtime.closed:
            stats = runtime.stats()
            found |= {
                "held": f"{mask_of(runtime.held(), runtime.header.num_experts):x}",
                "hits": stats.hits,
                "wanted": stats.unique,
                "stall_seconds": stats.stall_seconds,
                "read_bytes": stats.bytes_read,
                "memory_used": stats.committed_slots * runtime.header.record_bytes,
                "memory_budget": runtime.expert_memory,
                "experts_bytes": runtime.header.experts_bytes,
            }
        return found

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self._driver.alive:
            raise RuntimeError("the driver has ended")

    async def __del__(self) -> None:  # Ray calls it once the replica has drained
        self._driver.refuse()
        self._driver.cut()
        await asyncio.to_thread(self._driver.join)
        if self._served.runtime is not None:
            self._served.runtime.close()
