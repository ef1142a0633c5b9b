"""Between requests and the driver: jobs are submitted, awaited and cancelled here. Lives in the server's event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from starlette.requests import Request

from sida_ext.serving.driver import Answer, Driver, Job, Work
from sida_ext.serving.metrics import FrontMetrics, ServerMetrics
from sida_ext.serving.model import ModelFacts, ServedModel
from sida_ext.serving.protocol import RequestError
from sida_ext.serving.scheduler import Limits
from sida_ext.serving.settings import ServerSettings

__all__ = ["Answers", "ClientLeftError", "Front", "Service", "until_left"]

SOON = 0.03  # seconds: what takes one step is mostly answered by then

log = logging.getLogger("sida_ext.serving")


class ClientLeftError(Exception):
    """The client has closed the connection."""


class Answers:
    """What the rows of one job answer, in the order in which it comes."""

    def __init__(self, rows: int) -> None:
        self._open = rows
        self.job: Job | None = None  # of this process
        self._queue: asyncio.Queue[tuple[int, Answer | None]] = asyncio.Queue()

    def tell(self, row: int, answer: Answer) -> None:
        self._queue.put_nowait((row, answer))

    def left(self) -> None:
        """The client is gone."""
        self._queue.put_nowait((-1, None))

    def first_token_at(self) -> float:
        """``time.perf_counter()`` of the first token; now, where it was written in another process."""
        written = self.job.first_token if self.job is not None else None
        return time.perf_counter() if written is None else written

    async def each(self) -> AsyncIterator[tuple[int, Any]]:
        """(row, answer) until all rows are over.

        Raises:
            RequestError: what a row ended with. ClientLeftError.
        """
        while self._open:
            row, answer = await self._queue.get()
            if answer is None:
                raise ClientLeftError
            if isinstance(answer, RequestError):
                raise answer
            yield row, answer
            if getattr(answer, "finish", "over") is not None:
                self._open -= 1


class Front(Protocol):
    """What the HTTP application asks of what is behind it: a model of this process, or replicas of one elsewhere."""

    @property
    def model(self) -> ModelFacts: ...

    @property
    def metrics(self) -> FrontMetrics: ...

    limits: Limits
    settings: ServerSettings
    draining: bool

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def standing(self) -> tuple[str, dict[str, Any]]: ...

    def run(
        self, request: Request, work: list[Work], deadline: float, whole: bool = False
    ) -> AbstractAsyncContextManager[Answers]: ...


class Service:
    """One served model in one process.

    Args:
        model: what is served; closed with the service.
        limits: of batching.
        settings: of the server.
    """

    def __init__(self, model: ServedModel, limits: Limits, settings: ServerSettings) -> None:
        self.model, self.limits, self.settings = model, limits, settings
        self.driver = Driver(model, limits, self._deliver)
        self.metrics = ServerMetrics(self.driver)
        self.draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cut: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Called in the event loop, once."""
        self._loop = asyncio.get_running_loop()
        self.driver.start()

    def standing(self) -> tuple[str, dict[str, Any]]:
        """``"ok"`` or what is wrong, and what else ``/health`` says."""
        if not self.driver.alive:
            return "the driver has ended", {}
        return "ok", {"queue": self.driver.waiting, "running": self.driver.running}

    def drain(self) -> None:
        """Take no more requests; those that run are cut off after ``settings.drain`` seconds. Safe in a signal's
        handler."""
        self.draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        assert self._loop is not None
        self.driver.refuse()
        if self._cut is None:
            self._cut = self._loop.call_later(self.settings.drain, self.driver.cut)

    async def stop(self) -> None:
        """End what is left and close the model."""
        self.draining = True
        if self._cut is not None:
            self._cut.cancel()
        self.driver.refuse()
        self.driver.cut()
        await asyncio.to_thread(self.driver.join)
        if self.model.runtime is not None:
            self.model.runtime.close()

    def _deliver(self, answers: Sequence[Callable[[], None]]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_run, answers)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.warning("%d answers came after the server had ended", len(answers))

    @asynccontextmanager
    async def run(
        self, request: Request, work: list[Work], deadline: float, whole: bool = False
    ) -> AsyncIterator[Answers]:
        """Submit a job; inside the block its answers are read; afterwards nothing of it runs any more.

        Args:
            whole: each row answers once, when it is complete.

        Raises:
            RequestError: the queue is full, or the server is shutting down.
        """
        answers = Answers(len(work))
        job = answers.job = Job(work, time.monotonic() + deadline, answers.tell, whole)
        self.driver.submit(job)
        watch = _Watch(request, answers.left, 0.0 if any(part.kind == "generate" for part in work) else SOON)
        try:
            yield answers
        finally:
            watch.cancel()
            self.driver.cancel(job)


def _run(answers: Sequence[Callable[[], None]]) -> None:
    for answer in answers:
        answer()


class _Watch:
    """Tells when the client has left.

    Args:
        after: seconds; what is answered sooner is not watched.
    """

    def __init__(self, request: Request, tell: Callable[[], None], after: float) -> None:
        self._request, self._tell = request, tell
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(after, self._begin) if after else None
        if not after:
            self._begin()

    def _begin(self) -> None:
        self._task = asyncio.create_task(until_left(self._request, self._tell))

    def cancel(self) -> None:
        for part in (self._timer, self._task):
            if part is not None:
                part.cancel()


async def until_left(request: Request, tell: Callable[[], None]) -> None:
    """Call ``tell`` when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    tell()
