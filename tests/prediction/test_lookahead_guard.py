"""The guard over reading ahead, alone: what it is told, on a clock that is counted."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from sida_ext.prediction.lookahead_guard import GuardOptions, LookaheadGuard

RECORD = 1000


class Clock:
    """A guard and a time that passes one second at an observation."""

    def __init__(self, depth=3, **options):
        self.guard, self.now = LookaheadGuard(depth, RECORD, GuardOptions(**{"window": 10, **options})), 0.0

    def run(self, useful, wasted, times=1):
        """Levels after each of so many observations of so many experts."""
        levels = []
        for _ in range(times):
            self.now += 1.0
            levels.append(self.guard.observe(self.now, useful * RECORD, wasted * RECORD))
        return levels


def test_it_goes_one_layer_further_at_a_time_while_that_pays():
    clock = Clock(depth=3)
    assert clock.run(1, 0, 40) == [1] * 9 + [2] * 10 + [3] * 21
    assert clock.guard.share == 1.0
    assert clock.guard.state == "open"


def test_it_backs_off_down_to_nothing_and_rests():
    clock = Clock(depth=2, rest=100.0)
    clock.run(1, 0, 15)
    assert clock.guard.level == 2
    levels = clock.run(0, 1, 20)
    assert levels[-1] == 0
    assert sorted(levels, reverse=True) == levels
    assert clock.guard.state == "resting"


def test_nothing_is_decided_before_enough_was_judged():
    clock = Clock()
    assert clock.run(1, 1, 4) == [1] * 4
    assert clock.run(1, 0) == [1]
    assert clock.run(4, 0) == [2]  # nine of thirteen


def test_it_backs_off_once_no_window_can_be_good_any_more():
    assert Clock().run(0, 1, 6) == [1] * 5 + [0]


def test_it_probes_rarely_and_rests_twice_as_long_after_each_that_fails():
    clock = Clock(depth=1, rest=4.0, longest_rest=64.0)
    probes, before = [], 1
    for _ in range(600):
        (level,) = clock.run(0, 1)
        if level and not before:
            probes.append(clock.now)
        before = level
    between = [later - earlier for earlier, later in pairwise(probes)]
    # Each probe takes six experts: more than half of a window's ten.
    assert between == [6 + rest for rest in (8, 16, 32, *[64] * 20)][: len(between)]
    assert len(between) >= 6
    assert sum(level > 0 for level in clock.run(0, 1, 740)) <= 110  # one in seven at the most


def test_a_probe_that_pays_opens_it_again():
    clock = Clock(depth=2, rest=4.0)
    clock.run(0, 1, 6)
    assert clock.guard.state == "resting"
    assert clock.run(1, 0, 3) == [0, 0, 0]
    assert clock.run(1, 0) == [1]
    assert clock.guard.state == "probing"
    assert clock.run(1, 0, 30)[-1] == 2
    assert clock.guard.state == "open"


def test_what_was_read_before_a_rest_does_not_count_after_it():
    clock = Clock(depth=1, rest=5.0)
    clock.run(0, 1, 6)
    clock.run(0, 100, 5)
    assert clock.guard.state == "probing"
    assert clock.guard.share is None


def test_it_does_not_go_further_again_at_once():
    clock = Clock(depth=2, rest=50.0)
    clock.run(1, 0, 10)
    assert clock.guard.level == 2
    clock.run(0, 10)
    assert clock.run(1, 0, 49) == [1] * 49
    assert clock.run(1, 0) == [2]


def test_what_lies_between_the_shares_stays_where_it_is():
    clock = Clock(depth=2, margin=0.2)
    assert clock.run(6, 4, 50) == [1] * 50


def test_a_cost_of_nothing_never_backs_off_for_waste():
    clock = Clock(depth=1, waste_cost=0.0)
    assert clock.run(0, 1, 100) == [1] * 100


def test_the_share_to_go_further_from_can_be_reached_whatever_waste_costs():
    for cost in (0.0, 0.5, 1.0, 9.0, 1e6):
        for slowness in (0.0, 1.0, 100.0):
            options = GuardOptions(waste_cost=cost)
            assert options.least_share(slowness) <= options.rising_share(slowness) < 1


def test_slow_reads_ask_for_fewer_in_vain():
    options = GuardOptions()
    assert options.least_share(0.0) == options.least_share(2.0) == 0.5
    assert options.least_share(3.0) == pytest.approx(2 / 3)
    assert options.least_share(10.0) == pytest.approx(0.9)
    assert GuardOptions(waste_cost=0.0).least_share(10.0) == 0.0


def test_it_rests_where_there_is_nothing_to_read_ahead():
    clock = Clock(depth=1, idle=20, rest=4.0)
    assert clock.run(0, 0, 20) == [1] * 19 + [0]
    # Nothing has gone wrong: every such rest is as short as the first.
    for _ in range(9):
        assert clock.run(0, 0, 24) == [0] * 3 + [1] * 20 + [0]


def test_the_same_events_make_the_same_levels():
    seed = random.randrange(2**32)
    print("seed", seed)
    events = [(random.Random(seed + n).randrange(4), random.Random(seed - n).randrange(3)) for n in range(500)]
    runs = []
    for _ in range(2):
        clock = Clock()
        runs.append([clock.run(*event)[0] for event in events])
        assert all(0 <= level <= 3 for level in runs[-1])
        assert clock.guard.state in ("open", "resting", "probing")
        assert (clock.guard.state == "resting") == (clock.guard.level == 0)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"waste_cost": -1}, "waste_cost is -1"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"window": 0}, "window is 0"),
        ({"idle": 0}, "idle is 0"),
        ({"rest": 0}, "rest is 0"),
        ({"rest": 9.0, "longest_rest": 8.0}, "rest is 9.0"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        GuardOptions(**wrong)


def test_a_guard_over_nothing_is_refused():
    with pytest.raises(ValueError, match="depth is 0, expected at least 1 layer"):
        LookaheadGuard(0, RECORD)
    with pytest.raises(ValueError, match="record_bytes is 0"):
        LookaheadGuard(1, 0)
    with pytest.raises(ValueError, match="expected none below 0"):
        LookaheadGuard(1, RECORD).observe(0.0, -1, 0)
