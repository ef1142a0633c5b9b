"""Whether predicting is worth the time that it takes, found by trying: a state machine without threads or a clock.

A predictor of a large model takes next to nothing beside it. One of a small model may take as long as the model: then
who waits for its tables, or shares processors and interpreter with it, may lose more than reads that come in time save.
What that costs cannot be told from the predictor's own time. So where that time is not negligible, batches go without a
prediction by turns, and the time of a token is compared. By turns, a few batches each way, since a machine's own speed
changes from second to second; and the longer, the less the two ways differ. Where batches are predicted while others
before them are computed, what a prediction costs falls upon those. So turns are then longer than batches are predicted
ahead, and only batches count beside which nothing of the other way was predicted:

    on --it takes time--> trying, by turns --without is faster--> resting --time is up--> trying
     ^                          |
     +--------not faster--------+
"""

from __future__ import annotations

__all__ = ["PredictionWorth"]

ENOUGH = 0.05  # seconds of predictions, before anything is tried
SLIGHT = 0.01  # of the batches' time: predictions that take less are never in question
TRIED = 4  # batches of a trial either way, by default
CLEAR = 1.25  # times as fast: no more batches are tried then
LONGEST = 4  # times as many batches, where it is not clear
AGAIN = 50.0  # after a trial nothing is tried for that many times its time


class _Sum:
    """Time of batches, by token."""

    def __init__(self) -> None:
        self.seconds = self.predicting = 0.0
        self.tokens = self.batches = 0

    def add(self, seconds: float, predicting: float, tokens: int) -> None:
        self.seconds, self.predicting = self.seconds + seconds, self.predicting + predicting
        self.tokens, self.batches = self.tokens + tokens, self.batches + 1

    @property
    def rate(self) -> float:
        return self.seconds / max(self.tokens, 1)


class PredictionWorth:
    """One predictor's; one caller at a time.

    Args:
        loss: share of the time that attempts in vain may take.
        rest: seconds of the first rest at least; it doubles from one to the next, and begins anew after an attempt that
            was worth it.
        longest_rest: seconds.
        tried: batches of a trial either way, at the least.

    Attributes:
        state: "on", "trying" or "resting".
        ahead: batches that may be predicted before one is done that is computed; set by who knows.
    """

    def __init__(self, loss: float = 0.02, rest: float = 10.0, longest_rest: float = 300.0, tried: int = TRIED) -> None:
        self._loss, self._least, self._longest, self._tried = loss, rest, longest_rest, tried
        self._rest = rest
        self.state = "on"
        self.ahead = 0
        self._beside: set[bool] = set()  # which ways were asked for since a batch was done
        self._on, self._off = _Sum(), _Sum()
        self._asked = 0  # batches of the trial
        self._until = float("-inf")  # on: nothing is tried before; resting: its end

    def may(self, now: float) -> bool:
        """Whether the next batch is to be predicted.

        Args:
            now: seconds of any clock that does not run backwards.
        """
        if self.state == "resting" and now >= self._until:
            self._try()
        if self.state == "trying":
            turn = self.ahead + self._tried if self.ahead else max(self._tried // 2, 1)
            predicts = self._asked // turn % 2 == 1
            self._asked += 1
        else:
            predicts = self.state == "on"
        self._beside.add(predicts)
        return predicts

    def observe(self, now: float, seconds: float, tokens: int, predicting: float | None) -> None:
        """A batch is done.

        Args:
            seconds: that it took, with those that the model waited for its prediction.
            predicting: seconds of its prediction; None: it had none.
        """
        alike = self._beside <= {predicting is not None}
        self._beside.clear()
        if self.state == "trying":
            if not alike:
                return
            if predicting is None:
                self._off.add(seconds, 0.0, tokens)
            else:
                self._on.add(seconds, predicting, tokens)
            least = min(self._on.batches, self._off.batches)
            if least >= self._tried and self._on.predicting >= ENOUGH:
                slower, faster = max(self._on.rate, self._off.rate), min(self._on.rate, self._off.rate)
                if slower >= CLEAR * faster or least >= LONGEST * self._tried:
                    self._decide(now)
        elif self.state == "on" and predicting is not None:
            self._on.add(seconds, predicting, tokens)
            if self._on.predicting < ENOUGH or self._on.batches < self._tried:
                return
            if self._on.predicting > SLIGHT * self._on.seconds and now >= self._until:
                self._try()
            elif self._on.batches >= 16 * self._tried:
                self._on = _Sum()  # of late, not of ever

    def _try(self) -> None:
        self.state, self._on, self._off, self._asked = "trying", _Sum(), _Sum(), 0

    def _decide(self, now: float) -> None:
        on, off = self._on, self._off
        self._on = _Sum()
        if on.rate <= off.rate:
            self.state, self._rest = "on", self._least
            self._until = now + AGAIN * off.seconds
            return
        lost = on.seconds - off.rate * on.tokens
        self.state = "resting"
        self._until = now + min(max(self._rest, lost / self._loss), self._longest)
        self._rest = min(2 * self._rest, self._longest)
