"""Whether predicting is worth the time that it takes, judged while it runs: a state machine without threads or a clock.

A predictor of a large model takes next to nothing beside it. One of a small model may take as long as the model: then
whoever waits for its tables, or shares the processors with it, loses more than reads that come in time save. For each
batch that was predicted it is told

    cost       seconds that the model was kept waiting, or without a processor, for the prediction
    saved      seconds of reads that came in time, at most: of experts that were read ahead and then wanted

and where they together cost more than they saved, nothing is predicted until a rest is over. A rest is so long that
attempts in vain take no more than a share of the time. Nothing is decided before some time was spent: a cost that
nobody would notice is not worth a decision.
"""

from __future__ import annotations

__all__ = ["PredictionWorth"]

ENOUGH = 0.05  # seconds of cost, before anything is decided
SLIGHT = 0.01  # of the batches' own time: a lower cost is let pass


class PredictionWorth:
    """One predictor's; one caller at a time.

    Args:
        loss: share of the time that attempts in vain may take.
        rest: seconds of the first rest at least; it doubles from one to the next, and begins anew after an attempt that
            was worth it.
        longest_rest: seconds.

    Attributes:
        resting: whether predicting was worth less than it cost when it was tried last.
    """

    def __init__(self, loss: float = 0.02, rest: float = 10.0, longest_rest: float = 300.0) -> None:
        self._loss, self._least, self._longest = loss, rest, longest_rest
        self._rest = rest
        self._cost = self._saved = self._seconds = 0.0  # since the last decision
        self._wake = 0.0
        self.resting = False

    def may(self, now: float) -> bool:
        """Whether the next batch is to be predicted.

        Args:
            now: seconds of any clock that does not run backwards.
        """
        return not self.resting or now >= self._wake

    def observe(self, now: float, cost: float, saved: float, seconds: float) -> None:
        """A predicted batch is done.

        Args:
            seconds: that the batch took, without ``cost``.
        """
        self._cost, self._saved, self._seconds = self._cost + cost, self._saved + saved, self._seconds + seconds
        if self._cost < ENOUGH:
            return
        if self._cost <= max(self._saved, SLIGHT * self._seconds):
            self.resting, self._rest = False, self._least
        elif not self.resting or now >= self._wake:
            self.resting = True
            self._wake = now + min(max(self._rest, self._cost / self._loss), self._longest)
            self._rest = min(2 * self._rest, self._longest)
        self._cost = self._saved = self._seconds = 0.0
