"""Who runs next: admission and leaving of rows at step boundaries. A deterministic state machine without threads, clock
or model: it is told events and the time, and answers steps.

Rows wait in the order of their arrival. When places are free, the waiting row whose predicted experts are held already,
by the expert memory or by rows that run, goes first; but a row is passed over ``patience`` times at the most, after
which nobody overtakes it, also when it is too large for what is free and has to wait for room.

Clients that wait for an answer before they ask again ask again together. So when rows of several requests have ended
and nothing runs, the first request that comes is held for a moment, until as many have come as ended, at the longest
for a part of the time that those took. A single client is never held. While rows run they wait for every start, of one
row or of many; so one that comes is held for further ones as long as places are free and the next boundary comes soon.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

__all__ = ["Item", "Limits", "QueueFullError", "Scheduler", "Step"]

# Of the time that a batch of rows took, the part that the next one is held for at the longest.
GATHERING = 0.5
# Batches that are not held in a row at the most, after others did not come back in time.
LONGEST_PASS = 63

Experts = frozenset[tuple[int, int]]  # (MoE layer, expert)


@dataclass(frozen=True)
class Limits:
    """What a scheduler may take on.

    Args:
        rows: rows that run at once.
        queue: rows that wait at the most.
        tokens: of all rows that run, prompt and what they may yet write: bounds the memory of their keys and values.
        prompt_tokens: of prompts that are started in one step, so that running rows wait no longer than for these; a
            longer prompt is started alone.
        patience: how often others may be admitted before a waiting row.
        gather: seconds for which a row is held at the longest for others to come; 0: it is not.
        shared: whether rows share every call by kernels of ours; see :mod:`sida_ext.serving.shared`.
    """

    rows: int = 16
    queue: int = 256
    tokens: int = 65_536
    prompt_tokens: int = 2048
    patience: int = 8
    gather: float = 0.05
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "tokens", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.patience < 0:
            raise ValueError(f"patience is {self.patience}, expected 0 (first come, first served) or more")
        if not self.gather >= 0:
            raise ValueError(f"gather is {self.gather}, expected seconds, 0 or more")


@dataclass
class Item:
    """A row that waits or runs."""

    id: int
    prompt: int  # tokens
    new: int  # tokens that it may write at the most
    deadline: float  # on the clock of ``now``
    once: bool = False  # done after one step: a classification, an embedding, a score
    experts: Experts = frozenset()
    request: int = 0  # rows of one request come together
    arrived: float = float("-inf")  # on the clock of ``now``; it is not held for others for long after that
    passed: int = 0  # how often others were admitted before it

    @property
    def tokens(self) -> int:
        return self.prompt + self.new


@dataclass
class Step:
    """What the driver does next."""

    expired: list[int] = field(default_factory=list)  # over their deadline: they have left
    join: list[int] = field(default_factory=list)  # start these prompts, in this order
    rows: list[int] = field(default_factory=list)  # these take one more token
    until: float | None = None  # nothing of that, though rows wait: ask again when one has come, or at this time

    @property
    def empty(self) -> bool:
        return not (self.expired or self.join or self.rows)


class QueueFullError(RuntimeError):
    """As many rows wait as may."""


class Scheduler:
    """See the module."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: dict[int, Item] = {}  # in the order of arrival
        self._running: dict[int, Item] = {}  # in the order of admission
        self._began = 0.0  # when the first of the rows that run, or ran last, was admitted
        self._ended: set[int] = set()  # requests whose rows have ended since others were last admitted
        self._until: float | None = None  # so long others may follow those
        self._waited: set[int] = set()  # requests that waited when those had ended
        self._in_vain = self._pass = 0  # batches that will not be held after the next hold in vain, and now
        self._boundary = float("-inf")  # when the last step was asked for

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def wants_overlap(self) -> bool:
        """Whether the next step's admission depends on which experts are held."""
        return len(self._running) < self.limits.rows and any(item.experts for item in self._waiting.values())

    def submit(self, items: Collection[Item]) -> None:
        """Rows that wait from now on: all of them or, with QueueFullError, none.

        Raises:
            QueueFullError: the queue has no room for all.
            ValueError: one can never run.
        """
        for item in items:
            if item.tokens > self.limits.tokens:
                raise ValueError(f"a row of {item.tokens} tokens, expected at most {self.limits.tokens}")
            if item.id in self._waiting or item.id in self._running:
                raise ValueError(f"row {item.id} is there already")
        if len(self._waiting) + len(items) > self.limits.queue:
            raise QueueFullError(f"{len(self._waiting)} rows wait, {len(items)} more exceed {self.limits.queue}")
        for item in items:
            self._waiting[item.id] = item

    def leave(self, id: int) -> bool:
        """The row is done, has failed, or nobody wants it any more; False if it was not there."""
        if self._waiting.pop(id, None) is not None:
            return True
        item = self._running.pop(id, None)
        if item is not None:
            self._ended.add(item.request)
        return item is not None

    def next_step(self, now: float, held: Experts = frozenset()) -> Step:
        """Take expired rows out, admit waiting ones, and say which rows go on.

        Args:
            now: seconds, on the clock of the deadlines.
            held: experts in memory, for the order of admission.
        """
        expired = [item.id for part in (self._running, self._waiting) for item in part.values() if item.deadline <= now]
        for id in expired:
            self.leave(id)
        rows = [item.id for item in self._running.values() if not item.once]
        until = self._held_until(now)
        if until is not None:
            return Step(expired, [], rows, until if self._waiting else None)
        if self._gathers(now):
            return Step(expired, [], rows)
        if not self._running and self._waiting:
            self._began = now
        joined = self._admit(held) if self._waiting else []
        if joined:
            self._ended.clear()
            self._until = None  # of those that end next
        return Step(expired, joined, rows)

    def _gathers(self, now: float) -> bool:
        """Whether rows that wait are held beside running ones: others may come that start together with them, and the
        next boundary will not be too late for the one that waits longest."""
        step, self._boundary = now - self._boundary, now
        if not self._running or not self._waiting or len(self._waiting) >= self.limits.rows - len(self._running):
            return False
        first = next(iter(self._waiting.values()))
        return now + step <= first.arrived + self.limits.gather

    def _held_until(self, now: float) -> float | None:
        """Until when rows that wait are held for others, if they are."""
        if self._running or len(self._ended) < 2:
            self._until = None
            return None
        if self._until is None:
            longest = 0.0 if self._pass else min(self.limits.gather, GATHERING * (now - self._began))
            self._pass = max(self._pass - 1, 0)
            self._until = now + longest
            self._waited = {item.request for item in self._waiting.values()}
            if not longest:
                return None
        # Whoever waits already would run while the others come back, and these would wait for him in turn: two halves
        # would take turns for good, where all of them are computed in little more time than one half.
        come = len({item.request for item in self._waiting.values()} - self._waited)
        if come >= len(self._ended) or len(self._waiting) >= self.limits.rows:
            self._in_vain = 0
            return None
        if now < self._until:
            return self._until
        if self._waiting and 2 * come < len(self._ended):  # they were no clients that ask again at once
            self._in_vain = min(2 * self._in_vain + 1, LONGEST_PASS)
            self._pass = self._in_vain
        return None

    def _admit(self, held: Experts) -> list[int]:
        admitted: list[int] = []
        tokens = sum(item.tokens for item in self._running.values())
        prompts = 0
        wanted = set(held).union(*(item.experts for item in self._running.values()))
        while self._waiting and len(self._running) < self.limits.rows:
            item = self._choose(wanted, self.limits.tokens - tokens, self.limits.prompt_tokens - prompts, not admitted)
            if item is None:
                break
            for other in self._waiting.values():
                if other is item:
                    break
                other.passed += 1
            del self._waiting[item.id]
            self._running[item.id] = item
            admitted.append(item.id)
            tokens += item.tokens
            prompts += item.prompt
            wanted |= item.experts
        return admitted

    def _choose(self, wanted: set[tuple[int, int]], tokens: int, prompts: int, first: bool) -> Item | None:
        best: Item | None = None
        best_share = -1.0
        for item in self._waiting.values():
            if item.tokens <= tokens and (item.prompt <= prompts or first):
                share = len(item.experts & wanted) / len(item.experts) if item.experts else 0.0
                if share > best_share:
                    best, best_share = item, share
            if item.passed >= self.limits.patience:
                # Nobody behind it goes first any more: either one before it, or it, or nobody.
                return best
        return best
