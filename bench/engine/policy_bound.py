"""What no policy of eviction exceeds that knows the tables of a few batches ahead and nothing further.

Batches are drawn independently from a law that the policy may know. It knows the past, and the tables of the batch
under way and of the next L; a further table is announced when a batch begins. MoE layer l of M is computed at step
b M + l.

Hits are intervals. A use of an expert is a hit only if the expert was held without a break since its use before, else
it was read in between. So a policy chooses which intervals between an expert's uses to hold, and how long, at most S at
once. An interval of g <= L batches is known when it begins. A longer one is announced at its k-th announcement,
k = g - L; until then nothing that is known tells when it ends, for each further batch uses the expert with the same
chance p, whatever was before.

Information is charged for. With price c of holding one expert for one batch, an interval of an expert at phi = l / M is
worth r = max(0, 1 - c (L + phi)) when its end is announced, and W = max(0, r - c / p) while it is not; so an
announcement is worth m = p r + (1 - p) W on average beforehand. Whoever holds the expert through an announcement pays
r - m if it names the expert and receives m - W if it does not. A policy that does not know the outcome when it decides
to hold pays nothing on average, whatever c. Therefore

    E[hits of the policy] = E[hits - payments] <= E[the most that hits - payments can be for one who knows all]

What remains is to choose intervals with everything known, at most S at once. Putting a price on every step,
lambda >= 0, bounds it from above: sum of lambda S + sum over intervals of the best of: not held, held up to some
announcement, held to the end. Every lambda gives a bound; a few hundred steps downhill find a good one. The bound
grants what no engine has: the law, and experts that take no room in the step that computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

Batch = list[tuple[int, list[int]]]  # (MoE layer, distinct experts), in the order in which the layers run


def draw(batches: Sequence[Batch], count: int, seed: int) -> list[Batch]:
    """A trace of batches drawn independently, with replacement: its law is known exactly."""
    random = Random(seed)
    return [batches[random.randrange(len(batches))] for _ in range(count)]


def chances(batches: Sequence[Batch]) -> dict[tuple[int, int], float]:
    """The chance that a drawn batch uses an expert, by (MoE layer, expert)."""
    uses: dict[tuple[int, int], int] = {}
    for batch in batches:
        for layer, experts in batch:
            for expert in experts:
                uses[layer, expert] = uses.get((layer, expert), 0) + 1
    return {expert: count / len(batches) for expert, count in uses.items()}


def steady_price(law: dict[tuple[int, int], float], layers: int, slots: int, lookahead: int) -> float:
    """The price of one expert for one batch at which as many as there are slots are worth holding, on average."""

    def earned(p: float, phi: float, price: float) -> float:
        far = (1 - p) ** lookahead
        near = sum(p * (1 - p) ** (g - 1) * max(0.0, 1 - price * g) for g in range(1, lookahead + 1))
        revealed = max(0.0, 1 - price * (lookahead + phi))
        waiting = max(0.0, revealed - price / p)
        return near + far * max(0.0, p * revealed + (1 - p) * waiting - price * (1 - phi))

    def total(price: float) -> float:
        return price * slots + sum(p * earned(p, layer / layers, price) for (layer, _), p in law.items())

    low, high = 0.0, 2.0
    for _ in range(50):  # convex: a maximum of straight lines
        third = (high - low) / 3
        low, high = (low, high - third) if total(low + third) <= total(high - third) else (low + third, high)
    return (low + high) / 2


@dataclass(frozen=True)
class Choices:
    """What can be held: from which step to which, for what, and where each interval's choices begin."""

    begin: np.ndarray
    end: np.ndarray
    gain: np.ndarray
    first: np.ndarray


def choices(
    trace: Sequence[Batch], law: dict[tuple[int, int], float], layers: int, lookahead: int, price: float
) -> Choices:
    uses: dict[tuple[int, int], list[int]] = {}
    for number, batch in enumerate(trace):
        for layer, experts in batch:
            for expert in experts:
                uses.setdefault((layer, expert), []).append(number)
    rows: list[tuple[int, int, float]] = []
    first = []
    for (layer, expert), used in uses.items():
        p = law[layer, expert]
        revealed = max(0.0, 1 - price * (lookahead + layer / layers))
        waiting = max(0.0, revealed - price / p)
        received, paid = p * (revealed - waiting), (1 - p) * (revealed - waiting)
        for at, following in zip(used, [*used[1:], None], strict=True):
            begin, so_far = at * layers + layer, len(rows)
            if following is not None and following - at <= lookahead:
                rows.append((begin, following * layers + layer, 1.0))
            else:
                # The announcements that do not name it; after the last table of the trace there are none.
                silent = (following if following is not None else len(trace)) - lookahead - at - 1
                if received > 0:
                    rows += [(begin, (at + k) * layers, k * received) for k in range(1, silent + 1)]
                if following is not None:
                    rows.append((begin, following * layers + layer, 1 + silent * received - paid))
            if len(rows) > so_far:
                first.append(so_far)
    begins, ends, gains = zip(*rows, strict=True)
    return Choices(np.array(begins), np.array(ends), np.array(gains), np.array(first))


def most_hits(
    trace: Sequence[Batch],
    law: dict[tuple[int, int], float],
    layers: int,
    slots: int,
    lookahead: int,
    rounds: int = 400,
) -> float:
    """The bound on one trace; it holds on average over traces drawn from the law.

    With a lookahead of the whole trace everything is known, and it bounds Belady's optimum.
    """
    price = steady_price(law, layers, slots, lookahead)
    can = choices(trace, law, layers, lookahead, price)
    of_interval = np.zeros(len(can.begin), int)
    of_interval[can.first[1:]] = 1
    of_interval = np.cumsum(of_interval)
    steps = len(trace) * layers
    prices = np.full(steps, max(price, 1e-3) / layers)  # of holding one expert from a step to the next
    scale = 0.3 * prices[0]
    best, slope, size = np.inf, np.zeros(steps), np.zeros(steps)
    for round_ in range(1, rounds + 1):
        paid = np.concatenate([[0.0], np.cumsum(prices)])
        value = can.gain - (paid[can.end] - paid[can.begin])
        most = np.maximum.reduceat(value, can.first)
        best = min(best, float(prices.sum() * slots + np.maximum(most, 0).sum()))
        taken = (value == most[of_interval]) & (value > 0)
        held = np.zeros(steps + 1)
        np.add.at(held, can.begin[taken], 1)
        np.add.at(held, can.end[taken], -1)
        gradient = slots - np.cumsum(held)[:steps]
        # Steps of a size that each price has shown to need (Adam), ever shorter.
        slope, size = 0.9 * slope + 0.1 * gradient, 0.99 * size + 0.01 * gradient**2
        step = slope / (1 - 0.9**round_) / (np.sqrt(size / (1 - 0.99**round_)) + 1e-9)
        prices = np.maximum(0, prices - scale / np.sqrt(round_) * step)
    return best
