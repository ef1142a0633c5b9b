"""Whether reading ahead is worth it, judged while it runs: a deterministic state machine without threads or a clock.

It is told what came of the experts that were read ahead, in bytes, and the time; it answers for how many layers ahead
experts may be announced (with whole batches there is but one step: all of them or none):

    open(depth) --too much in vain--> open(depth - 1) --> ... --> resting --time is up--> probing --worth it--> open(1)
         ^                                                           ^                       |
         +------ worth it for a whole window: one more layer         +--- in vain: rest twice as long

An expert that is read in vain costs what a missed one costs where the disk is always reading, so that the default asks
for more useful bytes than wasted ones. It costs more where a read takes longer than the layer beside which it runs:
read in time it saves no more than that layer's time, and in vain it keeps the next layer's own reads waiting for the
rest. With reads of r layers' time the share p of them has to be right for which p * 1 > (1 - p) * (r - 1). Where reads
are faster than layers the disk has slack, and waste costs less, down to half: it still evicts and takes the processor.

An attempt in vain costs the time of its reads. After one that took s seconds it rests s / loss seconds at least, so
that attempts together take no more than that share of the time, however slow the disk is.

Where nothing is read ahead at all, since everything is in memory already, there is nothing to gain: it rests as well,
so that the routers are not asked in vain.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

__all__ = ["GuardOptions", "LookaheadGuard"]

# Of waste_cost, where reads take next to no time beside the layers.
LEAST_COST = 0.5
# Standard deviations that what is useful may lie below the least share before its window is full: with half at the
# least, ten in vain at the beginning.
SURE = 3.0


@dataclass(frozen=True)
class GuardOptions:
    """When the guard backs off, and for how long.

    Args:
        waste_cost: cost of a byte read in vain as a share of that of a byte read in time, where a read takes a
            layer's time; the least share of useful bytes is ``cost / (1 + cost)``. 0: waste never counts.
        margin: by how much the share must be above the least before it goes one layer further.
        window: experts read ahead that the share is taken over. It backs off before where that many can be no chance.
        rest: seconds of the first rest. It doubles with each fall, and halves with each step up.
        longest_rest: seconds.
        loss: share of the time that reads in vain may take. A rest lasts longer than the others say where the attempt
            before it needs that.
        idle: askings in a row after which nothing was read ahead that begin a rest.

    Raises:
        ValueError: an argument that cannot work.
    """

    waste_cost: float = 1.0
    margin: float = 0.15
    window: int = 64
    rest: float = 10.0
    longest_rest: float = 300.0
    loss: float = 0.02
    idle: int = 512

    def __post_init__(self) -> None:
        for name in ("waste_cost", "margin"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value!r}, expected a number of at least 0")
        for name in ("window", "idle"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected at least 1")
        if not 0 < self.loss <= 1:
            raise ValueError(f"loss is {self.loss!r}, expected a share above 0 and up to 1")
        if not 0 < self.rest <= self.longest_rest < float("inf"):
            raise ValueError(
                f"rest is {self.rest!r}, expected seconds above 0 and not above longest_rest, {self.longest_rest!r}"
            )

    def least_share(self, slowness: float = 0.0) -> float:
        """Of useful bytes among those read ahead, below which reading ahead costs more than it saves.

        Args:
            slowness: as ``observe`` takes it; 0: not known.
        """
        if not self.waste_cost:
            return 0.0
        slack = min(1.0, max(slowness, LEAST_COST)) if slowness else 1.0
        cost = max(self.waste_cost * slack, slowness - 1)
        return cost / (1 + cost)

    def rising_share(self, slowness: float = 0.0) -> float:
        """From which it goes one layer further; below 1 whatever the cost of waste."""
        least = self.least_share(slowness)
        return min(least + self.margin, (least + 1) / 2)


class LookaheadGuard:
    """The state machine; one caller at a time.

    Args:
        depth: the most layers ahead, at least 1. It begins with one.
        record_bytes: of one expert: what ``window`` is counted in.

    Attributes:
        level: layers ahead for which experts may be announced now; 0: none.
        state: "open", "resting" or "probing".
    """

    def __init__(self, depth: int, record_bytes: int, options: GuardOptions | None = None) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}, expected at least 1 layer")
        if record_bytes < 1:
            raise ValueError(f"record_bytes is {record_bytes}, expected at least 1")
        self.options = options or GuardOptions()
        self.depth = depth
        self.level, self.state = 1, "open"
        self._window_bytes = self.options.window * record_bytes
        self._judged: deque[tuple[int, int, float]] = deque()  # useful, wasted bytes, lost seconds; the latest last
        self._useful = self._wasted = 0  # of the window
        self._lost = 0.0
        self._rest = self.options.rest  # seconds of the next
        self._wake = 0.0  # end of the rest
        self._no_rise = float("-inf")  # it goes no further before this time
        self._idle = 0

    @property
    def share(self) -> float | None:
        """Useful bytes among those of the window; None while nothing was judged."""
        judged = self._useful + self._wasted
        return self._useful / judged if judged else None

    def observe(
        self, now: float, useful: int, wasted: int, asked: int = 1, slowness: float = 0.0, lost: float = 0.0
    ) -> int:
        """What came of reading ahead since the last call; the level from now on.

        Args:
            now: seconds of any clock that does not run backwards.
            useful: bytes of experts that were read ahead and then wanted.
            wasted: bytes of experts that were read ahead and evicted unused.
            asked: how often routers were asked meanwhile.
            slowness: time of a read over that of a layer's computation (:class:`~sida_ext.prediction.pace.Pace`).
            lost: seconds that the wasted reads took; 0: not known.
        """
        if useful < 0 or wasted < 0 or asked < 0:
            raise ValueError(
                f"observed {useful} useful and {wasted} wasted bytes in {asked} askings, expected none below 0"
            )
        if self.state == "resting":
            # What is judged now was read before the rest, and is a part of what that attempt cost.
            self._wake += lost / self.options.loss
            if now >= self._wake:
                self._enter(1, "probing")
            return self.level
        self._idle = 0 if useful or wasted else self._idle + asked
        self._add(useful, wasted, lost)
        if self._idle >= self.options.idle:
            self._rest_until(now + self.options.rest)  # nobody is to blame: the next rest is not longer
        elif self._useful + self._wasted >= self._window_bytes:
            self._decide(now, self._useful / (self._useful + self._wasted), slowness)
        elif self.is_hopeless(0, 0, slowness):
            self._back_off(now)
        return self.level

    def is_hopeless(self, useful: int, wasted: int, slowness: float = 0.0) -> bool:
        """Whether with these bytes the share is below the least whatever the rest of the window brings, or too far for
        chance, so that :meth:`observe` would back off; False while it rests."""
        if self.state == "resting":
            return False
        least = self.options.least_share(slowness)
        useful, wasted = self._useful + useful, self._wasted + wasted
        if wasted > (1 - least) * self._window_bytes:
            return True
        record = self._window_bytes / self.options.window
        judged = (useful + wasted) / record
        return judged * least - useful / record > SURE * math.sqrt(judged * least * (1 - least))

    def _add(self, useful: int, wasted: int, lost: float) -> None:
        if not useful and not wasted:
            return
        self._judged.append((useful, wasted, lost))
        self._useful, self._wasted, self._lost = self._useful + useful, self._wasted + wasted, self._lost + lost
        while self._useful + self._wasted - sum(self._judged[0][:2]) >= self._window_bytes:
            old_useful, old_wasted, old_lost = self._judged.popleft()
            self._useful, self._wasted = self._useful - old_useful, self._wasted - old_wasted
            self._lost -= old_lost

    def _decide(self, now: float, share: float, slowness: float) -> None:
        if share < self.options.least_share(slowness):
            self._back_off(now)
            return
        if self.state == "probing":
            self._enter(1, "open")
        elif self.level < self.depth and now >= self._no_rise and share >= self.options.rising_share(slowness):
            self._enter(self.level + 1, "open")
        else:
            return
        self._rest = max(self._rest / 2, self.options.rest)

    def _back_off(self, now: float) -> None:
        self._no_rise = now + self._rest
        if self.level > 1:
            self._enter(self.level - 1, "open")
        else:
            self._rest_until(now + max(self._rest, self._lost / self.options.loss))
        self._rest = min(2 * self._rest, self.options.longest_rest)

    def _rest_until(self, time: float) -> None:
        self._wake = time
        self._enter(0, "resting")

    def _enter(self, level: int, state: str) -> None:
        """Another level is judged by what it does itself."""
        self.level, self.state = level, state
        self._judged.clear()
        self._useful = self._wasted = self._idle = 0
        self._lost = 0.0
