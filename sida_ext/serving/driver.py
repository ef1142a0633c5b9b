"""The thread that drives a served model: asks the scheduler for the next step, computes it, hands the answers out.

One thread computes; any thread may submit and cancel. Answers of a step are handed over together, through ``deliver``,
so that the server's event loop is woken once a step.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sida_ext._load import _C
from sida_ext.serving.generation import Delta, Sampling, Writer, choose
from sida_ext.serving.model import ServedModel
from sida_ext.serving.protocol import RequestError
from sida_ext.serving.scheduler import Item, Limits, QueueFullError, Scheduler, Step

__all__ = ["Driver", "Job", "Work"]

log = logging.getLogger("sida_ext.serving")

Answer = Delta | list[float] | RequestError


@dataclass
class Work:
    """One row of a request.

    Args:
        kind: ``"generate"``, ``"classify"``, ``"embed"`` or ``"score"``.
        ids: the prompt's tokens.
        sampling: of a generation.
        continuation: the tokens that are scored.
        experts: (MoE layer, expert) that it is predicted to want; None: not asked yet.
    """

    kind: str
    ids: list[int]
    sampling: Sampling | None = None
    continuation: list[int] = field(default_factory=list)
    experts: frozenset[tuple[int, int]] | None = None


@dataclass(eq=False)
class Job:
    """A request: its rows, and who is told what they answer: ``tell(row, answer)``, in the thread of ``deliver``.

    With ``whole`` a row's answer is told at once when it is complete, which spares the event loop a call in each step.
    """

    work: list[Work]
    deadline: float  # time.monotonic()
    tell: Callable[[int, Answer], None]
    whole: bool = False
    first_token: float | None = None  # time.perf_counter() of the first token
    ids: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Running:
    job: Job
    place: int  # of the row in its job
    work: Work
    writer: Writer | None = None
    row: Any = None
    token: int = 0  # the latest, not yet computed
    held: Delta = field(default_factory=Delta)  # what a whole answer is so far


@dataclass
class Counts:
    """What the driver has done since it started; read from any thread."""

    steps: int = 0
    rows: int = 0  # rows of those steps
    prompt_tokens: int = 0
    tokens: int = 0  # written
    step_seconds: float = 0.0
    failed_rows: int = 0
    expired_rows: int = 0


class Driver:
    """See the module.

    Args:
        model: what computes.
        limits: of the scheduler.
        deliver: is given a step's answers as callables, from the driver's thread; runs them where requests live.
    """

    def __init__(self, model: ServedModel, limits: Limits, deliver: Callable[[list[Callable[[], None]]], None]) -> None:
        self.model = model
        self.limits = limits
        self.counts = Counts()
        self._deliver = deliver
        self._scheduler = Scheduler(limits)
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._rows: dict[int, _Running] = {}
        self._left: list[_Running] = []  # cancelled; their caches are dropped at the next step boundary
        self._closing = False
        self._thread = threading.Thread(target=self._drive, name="sida-driver", daemon=True)
        self._answers: list[Callable[[], None]] = []
        self._step_seconds = 0.05  # a running mean, for Retry-After

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def kept(self) -> int:
        """Rows whose keys and values are still held."""
        with self._changed:
            return len(self._rows) + len(self._left)

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        return self._scheduler.running

    def submit(self, job: Job) -> None:
        """Queue all rows of a request.

        Raises:
            RequestError: 429 if the queue is full, 503 if the server is closing.
        """
        experts = [
            self.model.predicted(work.ids) if work.experts is None else work.experts
            for work in (job.work if self.limits.patience else [])
        ]
        with self._changed:
            if self._closing:
                raise RequestError(503, "the server is shutting down", code="shutting_down", retry_after=5)
            items: list[Item] = []
            for place, work in enumerate(job.work):
                number = next(self._numbers)
                new = work.sampling.new_tokens if work.sampling is not None else 0
                tokens, once = len(work.ids) + len(work.continuation), work.kind != "generate"
                request = items[0].id if items else number
                item = Item(number, tokens, new, job.deadline, once, request=request, arrived=time.monotonic())
                if experts:
                    item.experts = experts[place]
                items.append(item)
            try:
                self._scheduler.submit(items)
            except QueueFullError as error:
                wait = max(1, round(self._step_seconds * 64))
                raise RequestError(429, f"{error}; try again later", code="queue_full", retry_after=wait) from error
            for place, (item, work) in enumerate(zip(items, job.work, strict=True)):
                self._rows[item.id] = _Running(job, place, work)
            job.ids = [item.id for item in items]
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for the request any more; its places are free at the next step boundary."""
        with self._changed:
            for number in job.ids:
                running = self._rows.pop(number, None)
                if running is not None:
                    self._scheduler.leave(number)
                    self._left.append(running)

    def refuse(self) -> None:
        """Take no more requests; the thread ends when those that are there have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def cut(self) -> None:
        """End every row that is left with an error."""
        problem = RequestError(503, "the server was shut down before the answer was complete", code="shutting_down")
        with self._changed:
            rows, self._rows = self._rows, {}
            for number, running in rows.items():
                self._scheduler.leave(number)
                self._left.append(running)
                self._answer(running, problem)
            answers, self._answers = self._answers, []
            self._changed.notify()
        if answers:
            self._deliver(answers)

    def join(self, timeout: float = 60.0) -> None:
        """Wait for the thread after :meth:`refuse`.

        Raises:
            TimeoutError: it still computes.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"a step of the model has not ended within {timeout:.0f} s")

    def _drive(self) -> None:
        while True:
            held = self._held()
            with self._changed:
                step = self._scheduler.next_step(time.monotonic(), held)
                if step.empty:
                    if self._closing and self._scheduler.idle:
                        self._drop_left()
                        return
                    if not self._left:
                        _C.release_threads()  # they would wait actively, and take the requests' processors
                        self._changed.wait(None if step.until is None else max(0.0, step.until - time.monotonic()))
                    self._drop_left()
                    continue
                expired = [self._rows.pop(number) for number in step.expired]
                joining = [(number, self._rows[number]) for number in step.join]
                going = [(number, self._rows[number]) for number in step.rows]
                self._drop_left()
            begin = time.perf_counter()
            for running in expired:
                self._over(running, RequestError(504, "the request's deadline has passed", code="deadline"))
            self._decode(going)
            self._join(joining)
            self._count(step, time.perf_counter() - begin)
            if self._answers:  # by this thread; `cut` may have taken them meanwhile
                with self._changed:
                    answers, self._answers = self._answers, []
                if answers:
                    self._deliver(answers)

    def _held(self) -> frozenset[tuple[int, int]]:
        if not self._scheduler.waiting:  # who comes right now is admitted by age alone
            return frozenset()
        runtime = self.model.runtime
        with self._changed:
            wanted = self._scheduler.wants_overlap
        return runtime.held() if wanted and runtime is not None else frozenset()

    def _count(self, step: Step, seconds: float) -> None:
        rows = len(step.join) + len(step.rows)
        if rows:
            self.counts.steps += 1
            self.counts.rows += rows
            self.counts.step_seconds += seconds
            self._step_seconds += 0.1 * (seconds - self._step_seconds)
        self.counts.expired_rows += len(step.expired)

    def _drop_left(self) -> None:
        left, self._left = self._left, []
        for running in left:
            if running.row is not None:
                self.model.drop(running.row)
                running.row = None

    def _answer(self, running: _Running, answer: Answer) -> None:
        job, place = running.job, running.place
        if job.whole and isinstance(answer, Delta):
            answer = running.held.extend(answer)
            if answer.finish is None:
                return
        self._answers.append(lambda: job.tell(place, answer))

    def _over(self, running: _Running, answer: Answer) -> None:
        """A row's last answer."""
        if running.row is not None:
            self.model.drop(running.row)
            running.row = None
        if isinstance(answer, RequestError):
            self.counts.failed_rows += answer.status == 500
        self._answer(running, answer)

    def _leave(self, number: int, answer: Answer) -> None:
        with self._changed:
            running = self._rows.pop(number, None)
            self._scheduler.leave(number)
        if running is not None:  # else cancelled meanwhile
            self._over(running, answer)

    def _fail(self, number: int, error: Exception) -> None:
        log.error("row %d failed", number, exc_info=error)
        self._leave(
            number,
            RequestError(
                500,
                f"the model could not be computed ({type(error).__name__}); the server's log says why (row {number})",
                code="computation_failed",
            ),
        )

    def _join(self, joining: Sequence[tuple[int, _Running]]) -> None:
        if not joining:
            return
        self.counts.prompt_tokens += sum(len(running.work.ids) for _, running in joining)
        by_kind: dict[str, list[tuple[int, _Running]]] = {}
        for pair in joining:
            by_kind.setdefault(pair[1].work.kind, []).append(pair)
        self._classify(by_kind.pop("classify", []))
        self._start(by_kind.pop("generate", []))
        for number, running in itertools.chain.from_iterable(by_kind.values()):
            work = running.work
            try:
                if work.kind == "embed":
                    self._leave(number, self.model.embed([work.ids])[0])
                else:
                    self._leave(number, self.model.score(work.ids, work.continuation))
            except Exception as error:
                self._fail(number, error)

    def _classify(self, once: Sequence[tuple[int, _Running]]) -> None:
        if not once:
            return
        try:
            found = self.model.classify([running.work.ids for _, running in once])
        except Exception as error:
            if len(once) == 1:
                self._fail(once[0][0], error)
            else:  # the texts that the error does not concern are still answered
                for single in once:
                    self._classify([single])
            return
        for (number, _), logits in zip(once, found, strict=True):
            self._leave(number, logits)

    def _start(self, starting: Sequence[tuple[int, _Running]]) -> None:
        if not starting:
            return
        new = [running.work.sampling.new_tokens for _, running in starting if running.work.sampling is not None]
        try:
            found = self.model.start_all([running.work.ids for _, running in starting], new)
        except Exception as error:
            if len(starting) == 1:
                self._fail(starting[0][0], error)
            else:  # the prompts that the error does not concern are still answered
                for single in starting:
                    self._start([single])
            return
        for (number, running), (logits, row) in zip(starting, found, strict=True):
            assert running.work.sampling is not None
            running.writer = Writer(self.model.tokenizer, running.work.sampling, self.model.ends, running.job.whole)
            running.row = row
            self._take(number, running, choose([running.writer], logits[None])[0], logits[None], 0)

    def _take(self, number: int, running: _Running, token: int, logits: Tensor, place: int) -> None:
        """``logits`` [B, vocabulary], of which the row's is at ``place``."""
        assert running.writer is not None
        running.token = token
        delta = running.writer.take(token, logits, place)
        if running.job.first_token is None:
            running.job.first_token = time.perf_counter()
        self.counts.tokens += 1
        if delta is None:
            return
        if delta.finish is not None:
            self._leave(number, delta)
        else:
            self._answer(running, delta)

    def _decode(self, going: Sequence[tuple[int, _Running]]) -> None:
        if not going:
            return
        try:
            logits = self.model.step([running.row for _, running in going], [running.token for _, running in going])
        except Exception as error:
            if len(going) == 1 or not self.model.steps_can_be_repeated:
                for number, _ in going:
                    self._fail(number, error)
            else:  # a step that raises has changed no row: those that the error does not concern go on
                for single in going:
                    self._decode([single])
            return
        writers = [running.writer for _, running in going]
        tokens = choose(writers, logits)  # type: ignore[arg-type]
        for place, ((number, running), token) in enumerate(zip(going, tokens, strict=True)):
            self._take(number, running, token, logits, place)
