"""Whether what a predictor names of whole batches is worth reading ahead, judged while it runs.

``stream`` and the prefill of ``generate`` ask before each batch. A batch is announced as a whole, so the guard
(:mod:`~sida_ext.prediction.lookahead_guard`) has one step: everything or nothing. What is read ahead of a batch has the
time of a whole batch, unlike what is read one layer ahead. So a read in time saves all of its time while the disk has
slack; where what is read takes r times as long as what is computed meanwhile, one of r such reads is hidden, and with
the share p of useful ones p / r > 1 - p has to hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sida_ext.prediction.lookahead_guard import GuardOptions, LookaheadGuard
from sida_ext.prediction.pace import Pace

__all__ = ["AnnounceStats", "AnnouncingState"]


@dataclass(frozen=True)
class AnnounceStats:
    """How reading whole batches ahead goes at this moment.

    Attributes:
        state: of the guard: "open", "resting" (nothing is announced) or "probing" (a little is, to see).
        useful_share: bytes that were wanted among the latest that were read ahead; None while too few were judged.
        pressure: what the disk takes for all that is read, over what is computed meanwhile; 0 while little was read.
        admitted, refused: batches that were announced, and that were not since it rested.
    """

    state: str
    useful_share: float | None
    pressure: float
    admitted: int
    refused: int


class AnnouncingState:
    """One model's and one predictor's: guard and counters. Thread-safe.

    Args:
        predictor: that is judged; another one has a state of its own.
        options: of the guard.
        record_bytes: of one expert.
        lanes: reads that may be under way at once.
        counts: tells (experts read ahead and then wanted, experts read ahead and evicted unused, reads, seconds of
            reads, seconds of stalls), since any beginning.
        now: seconds.
    """

    def __init__(
        self,
        predictor: Any,
        options: GuardOptions,
        record_bytes: int,
        lanes: int,
        counts: Callable[[], tuple[int, int, int, float, float]],
        now: Callable[[], float],
    ) -> None:
        self.predictor = predictor
        self.guard = LookaheadGuard(1, record_bytes, options)
        self.pace = Pace(lanes)
        self._record_bytes, self._counts, self._now = record_bytes, counts, now
        self._last = counts()
        self._at: float | None = None  # of the last look
        self._lock = threading.Lock()
        self._admitted = self._refused = 0

    def begin(self, shared: bool) -> None:
        """Batches follow one another from now on.

        Args:
            shared: somebody else reads ahead between batches, so that what was counted since the last one is not
                theirs. Otherwise what they left behind is judged yet.
        """
        with self._lock:
            self._last, self._at = self._counts() if shared else self._last, None

    def room(self, most: int) -> int:
        """How many experts of the next batch may be announced, after a look at what came of those before.

        Args:
            most: all that there are.

        Returns:
            ``most``; a window's worth while it tries again; 0 while it rests.
        """
        with self._lock:
            level = self._look()
            self._admitted, self._refused = self._admitted + (level > 0), self._refused + (level == 0)
            if not level:
                return 0
            return min(most, self.guard.options.window) if self.guard.state == "probing" else most

    def judge(self) -> None:
        """A batch is done, and no other follows at once."""
        with self._lock:
            self._look(asked=0)

    def _look(self, asked: int = 1) -> int:
        now, counts = self._now(), self._counts()
        # Counters that were set back begin at 0 again.
        fresh: list[Any] = [n - old if n >= old else n for n, old in zip(counts, self._last, strict=True)]
        useful, wasted, loads, read, stall = fresh
        self.pace.observe(loads, read, stall, None if self._at is None else now - self._at)
        self._last, self._at = counts, now
        pressure = self.pace.pressure
        # The guard takes one off, since a read one layer ahead may take that layer's time for nothing; here it may not.
        slowness = pressure + 1 if pressure > 1 else pressure
        lost = wasted * self.pace.read_seconds
        return self.guard.observe(now, useful * self._record_bytes, wasted * self._record_bytes, asked, slowness, lost)

    def stats(self) -> AnnounceStats:
        with self._lock:
            return AnnounceStats(self.guard.state, self.guard.share, self.pace.pressure, self._admitted, self._refused)
