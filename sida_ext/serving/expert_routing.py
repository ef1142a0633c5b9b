"""Which replica a request goes to: the one that holds most of the experts it is predicted to want, within a bound on
imbalance. Plain arithmetic without Ray, clock or threads.

Experts are bits of an integer: expert ``e`` of MoE layer ``l`` is bit ``l * experts + e``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ExpertRouting", "RoutedRequest", "mask_of", "note_reports", "reports"]

# What the replicas of each application said of themselves last, as the latest router of this process knows it. Entries
# are replaced as a whole: other threads read them.
_REPORTS: dict[str, dict[str, dict[str, Any]]] = {}


def note_reports(application: str, said: dict[str, dict[str, Any]]) -> None:
    """A router has heard of these replicas, and of no others."""
    _REPORTS[application] = said


def reports(application: str) -> dict[str, dict[str, Any]]:
    """What each replica of an application said last, by its name."""
    return _REPORTS.get(application, {})


@dataclass(frozen=True)
class RoutedRequest:
    """What a router reads of a request, computed once by the caller.

    Args:
        wanted: bits of the experts that the request is predicted to want.
        weight: its tokens, those that it may write among them.
    """

    wanted: int
    weight: float


def mask_of(pairs: Iterable[tuple[int, int]], experts: int) -> int:
    """The bits of (MoE layer, expert) pairs; ``experts``: in each layer."""
    found = 0
    for layer, expert in pairs:
        found |= 1 << (layer * experts + expert)
    return found


@dataclass
class _Known:
    held: int  # as it said last
    load: float  # what it was sent of late
    drawn: dict[int, float]  # expert bit -> how often what it was sent of late wanted it


class ExpertRouting:
    """What one router knows of its replicas.

    A replica's score for a request is the share of the wanted experts that it holds, and to it the share that its
    latest requests wanted: what it holds at this moment is half by chance, and alone does not keep domains apart (of
    two domains of phrases 73 % went where their like went, with both 97 %). Load is the weight of what a replica was
    sent, fading by half over ``horizon`` requests; one whose load is more than ``imbalance`` times the mean stands
    behind all others, so that it passes this bound by one request at the most.

    Args:
        imbalance: the bound, at least 1; 1 is turn by turn.
        horizon: requests after which half of a request's weight is forgotten.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, imbalance: float = 1.25, horizon: int = 64) -> None:
        for name, value in (("imbalance", imbalance), ("horizon", horizon)):
            if not value >= 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.imbalance = imbalance
        self._keep = 0.5 ** (1 / horizon)
        self._known: dict[str, _Known] = {}

    def present(self, replicas: Collection[str]) -> None:
        """The replicas that there are now. A new one begins with the load at which the others, were theirs equal, would
        just be within the bound: it is sent its share at once, and not flooded while it is still empty."""
        self._known = {name: known for name, known in self._known.items() if name in replicas}
        before, after = len(self._known), len(replicas)
        whole = sum(known.load for known in self._known.values())
        if after > before:
            begin = max(0.0, whole / max(before, 1) * (after / self.imbalance - before) / (after - before))
            new = {name: _Known(0, begin, {}) for name in replicas if name not in self._known}
            self._known |= new

    def report(self, replica: str, held: int) -> None:
        """What a replica says that it holds; of one that is not there (any more) nothing is kept."""
        if replica in self._known:
            self._known[replica].held = held

    def load(self, replica: str) -> float:
        """Weight of what the replica was sent of late."""
        return self._known[replica].load

    def rank(self, wanted: int, candidates: Sequence[str]) -> list[str]:
        """The candidates, best first.

        Args:
            wanted: bits of the experts that the request is predicted to want; 0: nothing is known, and load decides.
        """
        loads = {name: self._known[name].load for name in candidates}
        bound = self.imbalance * sum(loads.values()) / max(len(loads), 1)
        bits = _bits(wanted)

        def key(name: str) -> tuple[bool, float, float]:
            known = self._known[name]
            drawn = sum(known.drawn.get(bit, 0.0) for bit in bits) / (known.load or 1.0)
            return known.load > bound, -((known.held & wanted).bit_count() + drawn), known.load

        return sorted(candidates, key=key)

    def sent(self, replica: str, wanted: int, weight: float) -> None:
        """The request went to ``replica``; ``weight``: what it costs, in tokens."""
        for known in self._known.values():
            known.load *= self._keep
        known = self._known.get(replica) or _Known(0, 0.0, {})
        known.load += weight
        known.drawn = {bit: value for bit, old in known.drawn.items() if (value := old * self._keep) > 0.01}
        for bit in _bits(wanted):
            known.drawn[bit] = known.drawn.get(bit, 0.0) + weight


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found
