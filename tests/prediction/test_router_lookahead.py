"""What RouterLookahead names, how much of it, and what it remembers; without a model."""

from __future__ import annotations

import pytest
import torch

import sida_ext
from sida_ext.prediction.lookahead_guard import GuardOptions
from sida_ext.prediction.pace import Pace
from sida_ext.prediction.prefetch import PrefetchPolicy
from sida_ext.prediction.router_lookahead import (
    LookaheadState,
    RouterLookahead,
    in_time,
    most_wanted,
    split_lookahead,
    within_room,
)


def test_experts_are_named_by_the_sum_of_their_weights():
    index = torch.tensor([[2, 0], [0, 3], [-1, 7]])
    weights = torch.tensor([[0.5, 0.2], [0.2, 0.9], [0.9, 0.9]])
    assert most_wanted(index, weights, 5) == [3, 2, 0]  # 7 is none of the five, -1 none at all
    assert most_wanted(index, None, 5) == [0, 2, 3]
    assert most_wanted(index[2:], weights[2:], 5) == []


def test_few_choices_and_many_are_ordered_alike():
    random = torch.Generator().manual_seed(0)
    for rows in (1, 8, 64, 65, 300):
        index = torch.randint(-1, 12, (rows, 2), generator=random)
        weights = torch.randint(0, 5, (rows, 2), generator=random) / 4  # sums without rounding, and ties
        for given in (weights, None):
            repeated = None if given is None else given.repeat(200, 1)
            assert most_wanted(index, given, 10) == most_wanted(index.repeat(200, 1), repeated, 10)


def test_an_expert_of_no_weight_is_not_named():
    assert most_wanted(torch.tensor([[1, 0]]), torch.tensor([[0.0, 0.4]]), 2) == [0]


def test_nearer_layers_get_the_room_first():
    wanted = [("a", [1, 2, 3]), ("b", [4, 5]), ("c", [6])]
    assert within_room(wanted, 6) == wanted
    assert within_room(wanted, 4) == [("a", [1, 2, 3]), ("b", [4])]
    assert within_room(wanted, 2) == [("a", [1, 2])]
    assert within_room(wanted, 0) == within_room(wanted, -3) == []


def test_no_more_is_named_than_can_be_read_in_time():
    wanted, here = [4, 0, 3, 1, 2], {0, 2}
    assert in_time(wanted, here, 0.0) == wanted  # the pace is not known yet
    assert in_time(wanted, here, 0.5) == [4, 0, 3, 2]  # two reads; what is there is named in any case
    assert in_time(wanted, here, 0.4) == wanted
    assert in_time(wanted, here, 7.0) == [4, 0, 2]
    assert in_time([], here, 1.0) == []


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"prompts_only": 1}, TypeError, "prompts_only is 1, expected True or False"),
        ({"depth": 0}, ValueError, "depth is 0, expected a number of layers of at least 1"),
        ({"depth": True}, TypeError, "depth is True"),
        ({"depth": 1.5}, TypeError, "depth is 1.5"),
        ({"waste_cost": -2.0}, ValueError, "waste_cost is -2.0"),
        ({"guard": 3}, TypeError, "guard is int"),
        ({"guard": GuardOptions(), "waste_cost": 0.5}, ValueError, "waste_cost is 0.5 beside guard="),
    ],
)
def test_arguments_that_cannot_work_are_refused(wrong, kind, words):
    with pytest.raises(kind, match=words):
        RouterLookahead(**wrong)


def test_it_stands_alone_or_beside_others():
    ahead, other = sida_ext.RouterLookahead(), PrefetchPolicy()
    assert split_lookahead(ahead) == (None, ahead)
    assert split_lookahead((other, ahead)) == ([other], ahead)
    assert split_lookahead([ahead]) == (None, ahead)
    assert split_lookahead(None) == (None, None)
    assert split_lookahead(other) == (other, None)
    with pytest.raises(TypeError, match="holds 2 RouterLookahead, expected at most one"):
        split_lookahead((ahead, ahead))


class Counts:
    def __init__(self):
        self.useful = self.wasted = self.loads = 0
        self.read = self.stall = self.now = 0.0

    def __call__(self):
        return self.useful, self.wasted, self.loads, self.read, self.stall


def made(**options):
    counts = Counts()
    lookahead = RouterLookahead(2, guard=GuardOptions(window=4, **options))
    return counts, LookaheadState(lookahead, 10, 2, counts, lambda: counts.now, {"x": "why"})


def test_what_another_predictor_had_read_is_not_judged():
    counts, state = made()
    counts.wasted += 100
    state.pass_by()
    assert state.level(1.0) == 1
    counts.wasted += 100
    assert state.level(1.0) == 0


def test_recall_is_told_by_distance_and_layer():
    _, state = made()
    state.compare("a", 1, [1, 2], [1, 3])
    state.compare("a", 1, [1], [1])
    state.compare("b", 1, [], [4])
    state.compare("b", 2, [4], [4])
    state.compare("b", 2, [4], [])
    stats = state.stats()
    assert stats.recall == {1: 0.5, 2: 1.0}
    assert stats.recall_of_layer == {1: {"a": 2 / 3, "b": 0.0}, 2: {"b": 1.0}}
    assert stats.not_asked == {"x": "why"}


def test_the_guard_sees_what_the_counters_have_grown_by():
    counts, state = made()
    counts.wasted = 2
    assert state.level(0.1) == 1
    counts.wasted = 3
    assert state.level(0.1) == 0
    assert state.stats().state == "resting"


def test_counters_that_were_set_back_begin_again():
    counts, state = made()
    counts.useful = 3
    state.level(0.1)
    counts.useful = 1  # reset_stats() in between
    assert state.level(0.1) == 2
    assert state.stats().useful_share is None  # another level, judged anew


def test_waste_costs_more_where_reads_are_slower_than_layers():
    """Three of four useful: enough where reads are fast, not where one takes ten layers' time."""
    for read, goes_on in ((0.1, True), (10.0, False)):
        counts, state = made()
        for _ in range(40):
            counts.useful, counts.wasted = counts.useful + 3, counts.wasted + 1
            counts.loads, counts.read = counts.loads + 1, counts.read + read
            state.level(1.0)
        assert state.stats().slowness == pytest.approx(read)
        assert (state.guard.level > 0) == goes_on


def test_slowness_leaves_out_stalls_and_shares_the_disk_between_lanes():
    pace = Pace(lanes=4)
    for _ in range(5):
        pace.observe(2, 4.0, 3.0, passed=5.0)  # two reads a layer, each 2 s long beside the other; 2 s computed
    assert pace.slowness == pytest.approx((4.0 / 2) / 2 / 2.0)
    pace.observe(50, 50.0, 0.0, passed=None)
    assert pace.slowness == pytest.approx(0.5)


def test_nothing_is_said_of_the_pace_before_enough_was_read():
    pace = Pace(lanes=1)
    pace.observe(7, 7.0, 0.0, passed=1.0)
    assert pace.slowness == 0.0
    with pytest.raises(ValueError, match="lanes is 0"):
        Pace(lanes=0)
