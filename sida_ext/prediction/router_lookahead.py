"""RouterLookahead: the next layers' own routers, asked early. What is named, how much of it, and what came of it.

No training and no files: at MoE layer l the routers of the layers l+1, l+2, ... are asked on the hidden state that
layer l sees. Between two layers the residual stream changes little, so that a router answers much as it will. This file
knows tensors and numbers alone; ``sida_ext/prediction/router_asking.py`` knows where a model's routers are.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sida_ext.prediction.lookahead_guard import GuardOptions, LookaheadGuard
from sida_ext.prediction.pace import Pace
from sida_ext.prediction.prefetch import WASTE_COST
from sida_ext.prediction.worth import TRIED, PredictionWorth

__all__ = [
    "LookaheadState",
    "LookaheadStats",
    "RouterLookahead",
    "in_time",
    "most_wanted",
    "split_lookahead",
    "within_room",
]

DEEPEST = 3  # layers ahead that depth=None lets the guard go to
FEW = 128  # choices that are counted in Python
LATEST = 256  # predictions of each layer and distance that recall looks back on


class RouterLookahead:
    """A predictor without training, for models of transformers' experts seam: ``predictor=RouterLookahead()``.

    It only prefetches: the output's bits are those without it. It measures what it reads in vain, backs off by itself
    down to nothing, and tries again rarely (:class:`~sida_ext.prediction.lookahead_guard.LookaheadGuard`); its state is
    ``model.sida.stats().lookahead``. One object may be given to several models.

    Args:
        depth: the most layers ahead; it begins with 1 and goes further while that pays. None: at most 3.
        waste_cost: cost of an expert that is read in vain as a share of that of a missed one; 0: never back off for
            waste.
        guard: further numbers of the guard; None: its own.
        prompts_only: ask only where a layer's tokens make at least as many choices as it has experts, and announce no
            more than can be read before the next layer runs. A decoder's steps then cost nothing. What a model is
            served with where nothing else is said (``Options.read_ahead``), one layer ahead.

    Raises:
        ValueError, TypeError: an argument that cannot work.
    """

    def __init__(
        self,
        depth: int | None = None,
        waste_cost: float = WASTE_COST,
        guard: GuardOptions | None = None,
        *,
        prompts_only: bool = False,
    ) -> None:
        if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int)):
            raise TypeError(f"depth is {depth!r}, expected a number of layers of at least 1, or None")
        if depth is not None and depth < 1:
            raise ValueError(f"depth is {depth}, expected a number of layers of at least 1, or None")
        if guard is not None and not isinstance(guard, GuardOptions):
            raise TypeError(f"guard is {type(guard).__name__}, expected a GuardOptions or None")
        if guard is not None and waste_cost != WASTE_COST:
            raise ValueError(f"waste_cost is {waste_cost!r} beside guard=, expected it in the guard's options alone")
        self.depth = DEEPEST if depth is None else depth
        if not isinstance(prompts_only, bool):
            raise TypeError(f"prompts_only is {prompts_only!r}, expected True or False")
        self.guard = guard or GuardOptions(waste_cost=waste_cost)
        self.prompts_only = prompts_only

    def __repr__(self) -> str:
        prompts = ", prompts_only=True" if self.prompts_only else ""
        return f"RouterLookahead(depth={self.depth}, waste_cost={self.guard.waste_cost:g}{prompts})"


def split_lookahead(given: Any) -> tuple[Any, RouterLookahead | None]:
    """The RouterLookahead among the predictors that a user gave, or None, and the others as they were given.

    Raises:
        TypeError: there are two.
    """
    if isinstance(given, RouterLookahead):
        return None, given
    if not isinstance(given, (tuple, list)):
        return given, None
    found = [each for each in given if isinstance(each, RouterLookahead)]
    if len(found) > 1:
        raise TypeError(f"predictor holds {len(found)} RouterLookahead, expected at most one")
    rest = [each for each in given if not isinstance(each, RouterLookahead)]
    return rest or None, found[0] if found else None


def most_wanted(index: Tensor, weights: Tensor | None, num_experts: int) -> list[int]:
    """Distinct experts that a router chose, most wanted first: by the sum of their weights, or of their choices.

    Args:
        index: [tokens, top_k] integers; what is below 0 or not below ``num_experts`` stands for no expert.
        weights: [tokens, top_k], or None.
    """
    flat = index.reshape(-1)
    if flat.numel() <= FEW:
        return _of_few(flat.tolist(), None if weights is None else weights.reshape(-1).tolist(), num_experts)
    worth = torch.ones(flat.shape) if weights is None else weights.reshape(-1).float().abs()
    named = (flat >= 0) & (flat < num_experts) & (worth > 0)
    total = torch.zeros(num_experts).index_add_(0, flat.clamp(0, num_experts - 1).long(), worth * named)
    order = total.argsort(descending=True, stable=True)
    return order[: int((total > 0).sum())].tolist()


def _of_few(chosen: list[int], weights: list[float] | None, num_experts: int) -> list[int]:
    """The same for a step's few choices, where each of torch's calls costs more than all of this."""
    total: dict[int, float] = {}
    for at, expert in enumerate(chosen):
        worth = 1.0 if weights is None else abs(weights[at])
        if 0 <= expert < num_experts and worth > 0:
            total[expert] = total.get(expert, 0.0) + worth
    return sorted(total, key=lambda expert: (-total[expert], expert))


def within_room(wanted: Sequence[tuple[Any, list[int]]], room: int) -> list[tuple[Any, list[int]]]:
    """As much of ``wanted`` as ``room`` slots hold: nearer layers first, in each the most wanted first."""
    kept = []
    for layer, experts in wanted:
        some = experts[: max(room, 0)]
        room -= len(some)
        if some:
            kept.append((layer, some))
    return kept


def in_time(experts: Sequence[int], here: Container[int], slowness: float) -> list[int]:
    """What of a layer's experts, most wanted first, is there or can be read while one layer computes. More would only
    evict earlier than need be what is used again after it.

    Args:
        here: experts of that layer that are in memory or on their way.
        slowness: what a read takes, over what a layer computes; 0: not known, all are named.
    """
    if not slowness:
        return list(experts)
    left = math.ceil(1 / slowness)
    named = []
    for expert in experts:
        if expert not in here:
            if not left:
                continue
            left -= 1
        named.append(expert)
    return named


@dataclass(frozen=True)
class LookaheadStats:
    """How reading ahead goes at this moment.

    Attributes:
        depth: the most layers ahead.
        level: layers ahead that are announced now; 0: the guard has stopped it.
        state: of the guard: "open", "resting" or "probing".
        worth: whether asking saves more time than it takes: "on"; "trying", with and without by turns; "resting": it
            did not, and no router is asked.
        slowness: what a read takes, over what a layer computes; 0 while too little was read.
        useful_share: bytes that were wanted among the latest that were read ahead; None while too few were judged.
        asked: layers at which routers were asked.
        announced: experts that were announced, those in memory already included.
        recall: distance -> share of the experts that a layer wanted which were named so many layers before, of the
            latest predictions. Counted only while predictions are made.
        recall_of_layer: distance -> {layer's name -> the same}.
        not_asked: layers whose router is not asked, and why not.
    """

    depth: int
    level: int
    state: str
    worth: str
    slowness: float
    useful_share: float | None
    asked: int
    announced: int
    recall: dict[int, float]
    recall_of_layer: dict[int, dict[str, float]]
    not_asked: dict[str, str]


class LookaheadState:
    """One model's: guard, counters and recall. Thread-safe; several threads may compute at once.

    Args:
        lookahead: what the user gave.
        record_bytes: of one expert.
        lanes: reads that may be under way at once.
        counts: tells (experts read ahead and then wanted, experts read ahead and evicted unused, reads, seconds of
            reads, seconds of stalls), since any beginning.
        now: seconds.
        not_asked: layer's name -> why its router is not asked.
        layers: of the model: how many are compared when it is tried without.
    """

    def __init__(
        self,
        lookahead: RouterLookahead,
        record_bytes: int,
        lanes: int,
        counts: Callable[[], tuple[int, int, int, float, float]],
        now: Callable[[], float],
        not_asked: Mapping[str, str],
        layers: int = 1,
    ) -> None:
        options = lookahead.guard
        self._worth = PredictionWorth(options.loss, options.rest, options.longest_rest, TRIED * layers)
        self.guard = LookaheadGuard(lookahead.depth, record_bytes, lookahead.guard)
        self.pace = Pace(lanes)
        self.not_asked = dict(not_asked)
        self._record_bytes, self._counts, self.now = record_bytes, counts, now
        self._last = counts()
        self._lock = threading.Lock()
        self._asked = self._announced = 0
        self._recall: dict[tuple[int, str], deque[tuple[int, int]]] = {}  # (distance, layer) -> (found, wanted)

    def level(self, passed: float | None, asked: int = 1) -> int:
        """Layers ahead to announce for now, after a look at what came of the ones before.

        Args:
            passed: seconds since the layer before began; None: this is a forward's first.
            asked: how often routers were asked since the last call.
        """
        with self._lock:
            counts = self._counts()
            # Counters that were set back begin at 0 again.
            fresh: list[Any] = [n - old if n >= old else n for n, old in zip(counts, self._last, strict=True)]
            self._last = counts
            useful, wasted, loads, read, stall = fresh
            self.pace.observe(loads, read, stall, passed)
            record = self._record_bytes
            return self.guard.observe(self.now(), useful * record, wasted * record, asked, self.pace.slowness)

    def may_ask(self) -> bool:
        """Whether asking is worth the time that it takes."""
        with self._lock:
            return self._worth.may(self.now())

    def took(self, seconds: float, tokens: int, asking: float | None) -> None:
        """From one layer's beginning to the next one's.

        Args:
            asking: seconds of them in which routers were asked; None: none was.
        """
        with self._lock:
            self._worth.observe(self.now(), seconds, tokens, asking)

    @property
    def least(self) -> float:
        """The probability from which on an expert is worth reading ahead, by what reads and layers take now."""
        return self.guard.options.least_share(self.pace.slowness)

    def deepen(self, depth: int) -> None:
        """Let the guard go so many layers ahead, if it may not already."""
        with self._lock:
            self.guard.depth = max(self.guard.depth, depth)

    def pass_by(self) -> None:
        """A layer ran whose experts somebody else has announced: what came of that is not for this guard."""
        with self._lock:
            self._last = self._counts()

    def announced(self, experts: int) -> None:
        """Routers were asked at a layer, and so many experts announced."""
        with self._lock:
            self._asked += 1
            self._announced += experts

    def compare(self, layer: str, distance: int, named: Sequence[int], wanted: Sequence[int]) -> None:
        """A layer wants ``wanted``; so many layers before, ``named`` had been named."""
        if not wanted:
            return
        found = len(set(named) & set(wanted))
        with self._lock:
            self._recall.setdefault((distance, layer), deque(maxlen=LATEST)).append((found, len(wanted)))

    def stats(self) -> LookaheadStats:
        with self._lock:
            guard = self.guard
            sums = {key: tuple(map(sum, zip(*rows, strict=True))) for key, rows in self._recall.items()}
            totals: dict[int, list[int]] = {}
            by_layer: dict[int, dict[str, float]] = {}
            for (distance, layer), (found, wanted) in sorted(sums.items()):
                total = totals.setdefault(distance, [0, 0])
                total[0], total[1] = total[0] + found, total[1] + wanted
                by_layer.setdefault(distance, {})[layer] = found / wanted
            return LookaheadStats(
                guard.depth,
                guard.level,
                guard.state,
                self._worth.state,
                self.pace.slowness,
                guard.share,
                self._asked,
                self._announced,
                {distance: found / wanted for distance, (found, wanted) in totals.items()},
                by_layer,
                dict(self.not_asked),
            )
