"""How many batches ahead to predict: picked from what memory holds, what a batch wants and the measured rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DEFAULT_LOOKAHEAD", "Lookahead", "choose_lookahead"]

DEFAULT_LOOKAHEAD = 4
# Further ahead inputs are held up, and results wait, for next to nothing.
MOST = 16


@dataclass(frozen=True)
class Lookahead:
    """Batches, and why so many."""

    batches: int
    why: str


def choose_lookahead(slots: int, experts: int, wanted: int, disk_rate: float, memory_rate: float) -> Lookahead:
    """The lookahead of a stream.

    Eviction chooses among the experts in memory by their next uses, so that the tables known ahead should name about as
    many. Batches that want w of N experts each leave (1 - w/N)^k of them unnamed after k batches; S slots are covered
    from k = ln(1 - S/N) / ln(1 - w/N) on. Twice that is taken, for routing is not uniform: some experts are named again
    and again, and on random base-128 shapes it reaches 97 % of the hits of the optimum at budgets from 10 to 90 %
    (docs/measured.md). Where an expert is read no slower than it is computed with, reads hide behind the computation
    and fewer of them save nothing.

    Args:
        slots, experts: of the whole model.
        wanted: distinct experts of one batch, over all layers.
        disk_rate, memory_rate: bytes a second; 0: not measured, and the disk is taken to be the slower one.
    """
    default = DEFAULT_LOOKAHEAD
    if slots >= experts:
        return Lookahead(default, "all experts fit: nothing is evicted")
    if wanted < 1:
        return Lookahead(default, "the first batch wants no expert")
    rates = "rates not measured, the disk taken to be slower than memory"
    if disk_rate > 0 and memory_rate > 0:
        slower = memory_rate / disk_rate
        rates = f"reading an expert takes {slower:.1f} times as long as streaming it from memory"
        if slower <= 1:
            return Lookahead(default, f"{rates}: reads hide behind the computation")
    share = min(wanted / experts, 1 - 1 / experts)
    covered = math.log(1 - slots / experts) / math.log(1 - share)
    batches = max(default, min(MOST, math.ceil(2 * covered)))
    return Lookahead(
        batches,
        f"{rates}, so that fewer reads count; memory holds {slots} of {experts} experts and a batch wants {wanted}: "
        f"the tables of {covered:.1f} batches name as many, and twice that is taken, from {default} to {MOST}",
    )
