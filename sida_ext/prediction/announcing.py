"""Whether what a predictor names of whole batches is worth reading ahead, judged while it runs.

``stream`` and the prefill of ``generate`` ask before each batch; one is announced as a whole, or not at all, and taken
back at the layer at which it is known to be in vain. Two guards (:mod:`~sida_ext.prediction.lookahead_guard`) have to
agree:

- Of the experts that are *named*, at least half have to be wanted (a third where the disk rests most of the time).
  Those that are not are read in vain or keep a place, and what is wanted is evicted for them.
- Of the experts that are *read* ahead, likewise; and where the disk never rests, more. What is read ahead of a batch
  has the time of a whole batch. Where what is read takes r times as long as what is computed meanwhile, one of r such
  reads is hidden, and with the share p of useful ones p / r > 1 - p has to hold.

What predicting itself takes is judged as well (:mod:`~sida_ext.prediction.worth`).

And how early the next layer's experts are read. At the last moment, what goes for them is chosen best, and the fewest
reads are needed, but a layer then waits for all of them at once. Early, they are hidden behind what is computed, for up
to a third more reads. Where the disk rests nearly all of the time, layers hardly wait, and the fewest reads are better.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sida_ext.prediction.lookahead_guard import GuardOptions, LookaheadGuard
from sida_ext.prediction.pace import Pace
from sida_ext.prediction.worth import PredictionWorth

__all__ = ["AnnounceStats", "AnnouncingState"]


# Of the pressure: from which on the next layer is read early, and below which it no longer is.
EARLY_FROM, EARLY_UNTIL = 0.35, 0.25
# Of a batch's time that its layers waited for, below which there is nothing to win by reading early.
WAITED = 0.05


@dataclass(frozen=True)
class AnnounceStats:
    """How reading whole batches ahead goes at this moment.

    Attributes:
        state: of the guards: "open", "resting" (nothing is announced) or "probing" (a little is, to see).
        named_share: experts that were wanted among the latest that were named; None while too few were judged.
        read_share: experts that were wanted among the latest that were read ahead; None likewise.
        pressure: what the disk takes for all that is read, over what is computed meanwhile; 0 while little was read.
        admitted, refused: batches that were announced, and that were not since it rested.
        early: whether the next layer's experts are read as early as can be.
        worth: whether predictions save more time than they take: "on"; "trying", with and without them by turns;
            "resting": they did not, and nothing is predicted.
    """

    state: str
    named_share: float | None
    read_share: float | None
    pressure: float
    admitted: int
    refused: int
    early: bool
    worth: str


class AnnouncingState:
    """One model's and one predictor's: guards and counters. Thread-safe.

    Args:
        predictor: that is judged; another one has a state of its own.
        options: of the guards.
        lanes: reads that may be under way at once.
        counts: tells (named experts that were wanted, named ones that were not, experts read ahead and then wanted,
            experts read ahead and evicted unused, reads, seconds of reads, seconds of stalls), since any beginning.
        now: seconds.

    Attributes:
        early: whether the next layer's experts are to be read as early as can be, by the latest look.
    """

    def __init__(
        self,
        predictor: Any,
        options: GuardOptions,
        lanes: int,
        counts: Callable[[], tuple[int, int, int, int, int, float, float]],
        now: Callable[[], float],
    ) -> None:
        self.predictor = predictor
        self.names, self.reads = LookaheadGuard(1, 1, options), LookaheadGuard(1, 1, options)
        self.pace = Pace(lanes)
        self._counts, self._now = counts, now
        self._worth = PredictionWorth(options.loss, options.rest, options.longest_rest)
        self._last = counts()
        self._at: float | None = None  # of the last look
        self._lock = threading.Lock()
        self._admitted = self._refused = 0
        self.early = False

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
            self._look()
            state = self._state()
            self._admitted, self._refused = self._admitted + (state != "resting"), self._refused + (state == "resting")
            return {"open": most, "probing": min(most, self.names.options.window), "resting": 0}[state]

    def predicts_ahead(self, batches: int) -> None:
        """So many batches may be predicted before one is done that is computed; 0: each is predicted when it begins."""
        with self._lock:
            self._worth.ahead = batches

    def may_predict(self) -> bool:
        """Whether the next batch is to be predicted, going by what predicting took before."""
        with self._lock:
            return self._worth.may(self._now())

    def done(self, seconds: float, tokens: int, predicting: float | None) -> None:
        """A batch is done; as :meth:`~sida_ext.prediction.worth.PredictionWorth.observe` takes it."""
        with self._lock:
            self._worth.observe(self._now(), seconds, tokens, predicting)

    def in_vain(self) -> bool:
        """Whether what has come of the batch under way is enough to rest at once; then it rests, and who asks takes
        back what is announced. To be asked at each of its MoE layers: a batch of a large model that is announced for
        nothing reads as much as it computes."""
        with self._lock:
            right, wrong, useful, wasted = self._fresh(self._counts())[:4]
            of_names, of_reads = self._slownesses()
            if not (self.names.is_hopeless(right, wrong, of_names) or self.reads.is_hopeless(useful, wasted, of_reads)):
                return False
            self._look(asked=0)
            return self._state() == "resting"

    def judge(self) -> None:
        """A batch is done, and no other follows at once."""
        with self._lock:
            self._look(asked=0)

    def _state(self) -> str:
        states = {self.names.state, self.reads.state}
        return next(state for state in ("resting", "probing", "open") if state in states)

    def _look(self, asked: int = 1) -> None:
        now, counts = self._now(), self._counts()
        right, wrong, useful, wasted, loads, read, stall = self._fresh(counts)
        self.pace.observe(loads, read, stall, None if self._at is None else now - self._at)
        waited = 0.0 if self._at is None or now <= self._at else stall / (now - self._at)
        self._last, self._at = counts, now
        pressure, each = self.pace.pressure, self.pace.read_seconds
        of_names, of_reads = self._slownesses()
        if pressure:
            # Once it is read early layers wait no more, so that their waiting tells nothing of whether to go on.
            self.early = pressure >= EARLY_UNTIL if self.early else pressure >= EARLY_FROM and waited >= WAITED
        # What was named in vain costs a read at the most: here, or where what was evicted for it is wanted.
        self.names.observe(now, right, wrong, 0, of_names, wrong * each)
        self.reads.observe(now, useful, wasted, asked, of_reads, wasted * each)

    def _fresh(self, counts: tuple[Any, ...]) -> list[Any]:
        """What was counted since the last look; counters that were set back begin at 0 again."""
        return [n - old if n >= old else n for n, old in zip(counts, self._last, strict=True)]

    def _slownesses(self) -> tuple[float, float]:
        """As the two guards take it. The guard takes one off, since a read one layer ahead may take that layer's time
        for nothing; here it may not."""
        pressure = self.pace.pressure
        return min(pressure, 1.0), pressure + 1 if pressure > 1 else pressure

    def stats(self) -> AnnounceStats:
        with self._lock:
            return AnnounceStats(
                self._state(),
                self.names.share,
                self.reads.share,
                self.pace.pressure,
                self._admitted,
                self._refused,
                self.early,
                self._worth.state,
            )
