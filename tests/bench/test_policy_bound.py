"""The bound on what any policy can reach that knows a few batches ahead: it must hold, and be near."""

from __future__ import annotations

import pytest
import torch

from bench.engine.policy_bound import chances, choices, draw, most_hits, steady_price
from sida_ext import _C

LAYERS, EXPERTS = 3, 24


def law(batches: int = 40, seed: int = 0):
    """Batches of 4 to 9 distinct experts in a layer, low numbers more often."""
    random = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(2, EXPERTS + 2)
    made = []
    for _ in range(batches):
        wanted = int(torch.randint(4, 10, (1,), generator=random))
        made.append([(layer, torch.multinomial(weights, wanted, generator=random).tolist()) for layer in range(LAYERS)])
    return made


def hits(result: tuple[int, int, int]) -> int:
    wanted, loads, _ = result
    return wanted - loads


@pytest.mark.parametrize("slots", [14, 29, 50])
def test_no_policy_is_above_it_and_more_knowledge_never_below(slots):
    batches = law()
    chance = chances(batches)
    traces = [draw(batches, 60, seed) for seed in range(4)]
    before = 0.0
    for lookahead in (1, 3, 60):
        bound = sum(most_hits(trace, chance, LAYERS, slots, lookahead) for trace in traces)
        reached = sum(hits(_C.run_policy(LAYERS, EXPERTS, trace, "next_use", slots, lookahead, [])) for trace in traces)
        assert reached <= bound
        assert bound >= 0.995 * before  # of two upper bounds, neither of which is exact
        before = bound
    optimal = sum(hits(_C.run_optimal(LAYERS, EXPERTS, trace, slots)) for trace in traces)
    assert optimal <= before <= 1.05 * optimal


def test_with_room_for_all_everything_is_a_hit_but_the_first_use():
    batches = law()
    trace = draw(batches, 30, 1)
    distinct = {(layer, expert) for batch in trace for layer, experts in batch for expert in experts}
    wanted = sum(len(experts) for batch in trace for _, experts in batch)
    bound = most_hits(trace, chances(batches), LAYERS, LAYERS * EXPERTS, 30)
    assert bound == pytest.approx(wanted - len(distinct), rel=0.01)


def test_who_decides_before_the_announcement_pays_nothing_on_average():
    """One layer, two experts, each batch one of them at random; whoever holds an expert to its end, always."""
    batches = [[(0, [0])], [(0, [1])], [(0, [1])], [(0, [1])]]
    chance = chances(batches)
    assert chance == {(0, 0): 0.25, (0, 1): 0.75}
    price = steady_price(chance, 1, 1, 1)
    gained = uses = 0.0
    for seed in range(40):
        trace = draw(batches, 200, seed)
        can = choices(trace, chance, 1, 1, price)
        for begin in range(len(can.first)):
            rows = slice(can.first[begin], can.first[begin + 1] if begin + 1 < len(can.first) else None)
            gained += can.gain[rows][-1]  # held to the end, or to the end of the trace
            uses += 1
    # Every interval is worth 1 but those that the trace cuts off: two in each.
    assert gained / uses == pytest.approx(1 - 80 / uses, abs=0.01)
