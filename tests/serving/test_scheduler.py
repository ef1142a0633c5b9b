"""Admission and leaving: a state machine on a clock of the test's own."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sida_ext.serving.scheduler import Item, Limits, QueueFullError, Scheduler

FAR = 1e9


def item(number: int, prompt: int = 10, new: int = 10, **more: object) -> Item:
    return Item(number, prompt, new, **{"deadline": FAR, "request": number, **more})  # type: ignore[arg-type]


def test_rows_join_in_the_order_of_their_arrival_and_leave_at_a_boundary():
    scheduler = Scheduler(Limits(rows=2))
    scheduler.submit([item(1), item(2), item(3)])
    step = scheduler.next_step(0.0)
    assert (step.join, step.rows) == ([1, 2], [])
    step = scheduler.next_step(0.0)
    assert (step.join, step.rows) == ([], [1, 2])
    assert scheduler.leave(1)
    step = scheduler.next_step(0.0)
    assert (step.join, step.rows) == ([3], [2])
    assert not scheduler.leave(1)


def test_a_full_queue_takes_all_rows_of_a_request_or_none():
    scheduler = Scheduler(Limits(rows=1, queue=2))
    scheduler.submit([item(1)])
    with pytest.raises(QueueFullError, match="1 rows wait, 2 more exceed 2"):
        scheduler.submit([item(2), item(3)])
    assert scheduler.waiting == 1
    scheduler.submit([item(4)])
    assert scheduler.waiting == 2


def test_a_row_that_can_never_run_is_refused():
    scheduler = Scheduler(Limits(tokens=100))
    with pytest.raises(ValueError, match="a row of 101 tokens, expected at most 100"):
        scheduler.submit([item(1, 100, 1)])


def test_running_rows_keep_within_the_tokens():
    scheduler = Scheduler(Limits(rows=8, tokens=100))
    scheduler.submit([item(1, 30, 30), item(2, 30, 30), item(3, 10, 10)])
    assert scheduler.next_step(0.0).join == [1, 3]  # 2 does not fit beside 1
    scheduler.leave(1)
    assert scheduler.next_step(0.0).join == [2]


def test_prompts_of_one_step_keep_within_their_tokens_and_a_long_one_starts_alone():
    scheduler = Scheduler(Limits(rows=8, prompt_tokens=50))
    scheduler.submit([item(1, 40), item(2, 40), item(3, 400)])
    assert [scheduler.next_step(0.0).join for _ in range(4)] == [[1], [2], [3], []]


def test_the_row_whose_experts_are_held_goes_first():
    scheduler = Scheduler(Limits(rows=1))
    scheduler.submit([item(1, experts=frozenset({(0, 1)})), item(2, experts=frozenset({(0, 7)}))])
    assert scheduler.wants_overlap
    assert scheduler.next_step(0.0, frozenset({(0, 7)})).join == [2]


def test_rows_that_share_experts_with_running_ones_go_first():
    scheduler = Scheduler(Limits(rows=2))
    one, other = frozenset({(0, 1), (1, 2)}), frozenset({(0, 5), (1, 6)})
    scheduler.submit([item(1, experts=one), item(2, experts=other), item(3, experts=one)])
    assert scheduler.next_step(0.0).join == [1, 3]


@pytest.mark.parametrize("patience", [0, 1, 5])
def test_a_row_is_overtaken_patience_times_at_the_most(patience):
    scheduler = Scheduler(Limits(rows=1, patience=patience))
    scheduler.submit([item(0, experts=frozenset({(0, 9)}))])
    scheduler.submit([item(number, experts=frozenset({(0, 1)})) for number in range(1, 20)])
    order = []
    for _ in range(20):
        order += scheduler.next_step(0.0, frozenset({(0, 1)})).join
        scheduler.leave(order[-1])
    assert order.index(0) == patience
    assert sorted(order) == list(range(20))


def test_a_large_row_that_has_waited_long_is_not_starved_by_small_ones():
    scheduler = Scheduler(Limits(rows=4, tokens=100, patience=3))
    scheduler.submit([item(0, 5, 5), item(1, 50, 50)])
    assert scheduler.next_step(0.0).join == [0]
    number = 2
    for _ in range(10):
        scheduler.submit([item(number, 5, 5)])
        number += 1
        scheduler.next_step(0.0)
    assert scheduler.running == 4  # 0 and the three that might overtake
    for running in (0, 2, 3, 4):
        scheduler.leave(running)
    assert scheduler.next_step(0.0).join == [1]


def test_rows_over_their_deadline_leave_whether_they_wait_or_run():
    scheduler = Scheduler(Limits(rows=1))
    scheduler.submit([item(1, deadline=5.0), item(2, deadline=3.0), item(3, deadline=9.0)])
    assert scheduler.next_step(0.0).join == [1]
    step = scheduler.next_step(5.0)
    assert sorted(step.expired) == [1, 2]
    assert step.join == [3]


def test_a_row_of_one_step_is_not_decoded():
    scheduler = Scheduler(Limits())
    scheduler.submit([item(1, once=True), item(2)])
    assert scheduler.next_step(0.0).join == [1, 2]
    scheduler.leave(1)
    assert scheduler.next_step(0.0).rows == [2]


def ended(scheduler, count, seconds):
    """``count`` rows that ran together for that long, from time 0, have just ended."""
    scheduler.submit([item(number) for number in range(count)])
    assert len(scheduler.next_step(0.0).join) == count
    for number in range(count):
        scheduler.leave(number)
    assert scheduler.next_step(seconds).empty


def test_the_first_that_comes_after_a_batch_is_held_until_as_many_have_come():
    scheduler = Scheduler(Limits())
    ended(scheduler, 3, 0.1)
    for number in (10, 11):
        scheduler.submit([item(number)])
        step = scheduler.next_step(0.11)
        assert step.empty
        assert step.until == pytest.approx(0.15)  # half of the 0.1 s that the batch took
    scheduler.submit([item(12)])
    assert scheduler.next_step(0.12).join == [10, 11, 12]
    assert scheduler.next_step(0.12).rows == [10, 11, 12]


def test_a_row_is_held_for_a_part_of_the_time_of_the_batch_before_and_never_beyond_the_limit():
    scheduler = Scheduler(Limits())
    ended(scheduler, 3, 0.1)
    scheduler.submit([item(10)])
    assert scheduler.next_step(0.1499).empty
    assert scheduler.next_step(0.1501).join == [10]
    scheduler = Scheduler(Limits(gather=0.02))
    ended(scheduler, 3, 100.0)
    scheduler.submit([item(10)])
    assert scheduler.next_step(100.019).empty
    assert scheduler.next_step(100.021).join == [10]


def test_clients_whose_rows_waited_meanwhile_are_joined_by_those_that_come_back():
    """Else two halves of the clients would take turns for good."""
    scheduler = Scheduler(Limits(rows=8))
    scheduler.submit([item(number) for number in range(4)])
    assert len(scheduler.next_step(0.0).join) == 4
    scheduler.submit([item(number) for number in range(10, 14)])  # while those are computed
    for number in range(4):
        scheduler.leave(number)
    held = scheduler.next_step(0.1)
    assert held.empty
    assert held.until == pytest.approx(0.15)
    scheduler.submit([item(number) for number in range(20, 23)])
    assert scheduler.next_step(0.11).empty
    scheduler.submit([item(23)])
    assert scheduler.next_step(0.12).join == [10, 11, 12, 13, 20, 21, 22, 23]
    # And so after every batch.
    for number in (10, 11, 12, 13, 20, 21, 22, 23):
        scheduler.leave(number)
    scheduler.submit([item(number) for number in range(30, 34)])
    held = scheduler.next_step(0.22)
    assert held.empty
    assert held.until == pytest.approx(0.27)
    # As many wait as may run: nobody is held.
    scheduler.submit([item(number) for number in range(40, 46)])
    assert len(scheduler.next_step(0.23).join) == 8


def test_nobody_is_held_for_those_that_do_not_come_back():
    """Holds in vain are left out, ever more of them, until others come back in time again."""
    scheduler = Scheduler(Limits(rows=8))
    now, number, held = 0.0, 0, ""
    for batch in range(40):
        scheduler.submit([item(number + place) for place in range(4)])
        step = scheduler.next_step(now)
        if step.empty:
            now = step.until
            assert scheduler.next_step(now).join
            held += "1"
        else:
            held += "0" if batch else ""
        for place in range(4):
            scheduler.leave(number + place)
        number, now = number + 4, now + 0.1
        scheduler.submit([item(10_000 + number)])  # one of four
        step = scheduler.next_step(now)
        if step.empty and step.until is not None:
            now = step.until
            scheduler.next_step(now)
        scheduler.leave(10_000 + number)
    assert held.count("1") <= 8


def test_a_row_that_comes_long_after_a_batch_is_not_held():
    scheduler = Scheduler(Limits())
    ended(scheduler, 3, 0.1)
    scheduler.submit([item(10)])
    assert scheduler.next_step(5.0).join == [10]


def test_a_single_client_and_rows_beside_running_ones_are_not_held():
    scheduler = Scheduler(Limits())
    ended(scheduler, 1, 0.1)
    scheduler.submit([item(10), item(11), item(12)])
    assert scheduler.next_step(0.1).join == [10, 11, 12]
    scheduler.leave(10), scheduler.leave(11)
    scheduler.submit([item(13)])
    assert scheduler.next_step(0.2).join == [13]
    scheduler = Scheduler(Limits())
    scheduler.submit([item(number, request=1) for number in range(4)])
    assert len(scheduler.next_step(0.0).join) == 4
    for number in range(4):
        scheduler.leave(number)
    assert scheduler.next_step(0.1).empty
    scheduler.submit([item(10)])
    assert scheduler.next_step(0.1).join == [10]  # the four were of one request
    scheduler = Scheduler(Limits(gather=0))
    ended(scheduler, 3, 0.1)
    scheduler.submit([item(10)])
    assert scheduler.next_step(0.1).join == [10]


def test_rows_that_come_while_others_run_start_together():
    scheduler = Scheduler(Limits(rows=8))
    scheduler.submit([item(0, arrived=0.0), item(1, arrived=0.0)])
    assert scheduler.next_step(0.0).join == [0, 1]
    scheduler.next_step(0.01)
    scheduler.submit([item(2, arrived=0.011)])
    for now in (0.02, 0.03, 0.04, 0.05):  # the next boundary, 0.01 later, is within 0.05 of its arrival
        step = scheduler.next_step(now)
        assert (step.join, step.rows, step.until) == ([], [0, 1], None)
        scheduler.submit([item(10 + int(100 * now), arrived=now)])
    assert scheduler.next_step(0.06).join == [2, 12, 13, 14, 15]


def test_rows_are_not_held_where_steps_are_long_or_no_place_would_be_left():
    scheduler = Scheduler(Limits(rows=4))
    scheduler.submit([item(0, arrived=0.0), item(1, arrived=0.0)])
    scheduler.next_step(0.0)
    scheduler.next_step(0.2)
    scheduler.submit([item(2, arrived=0.39)])
    assert scheduler.next_step(0.4).join == [2]  # the boundary after this one is 0.2 away
    scheduler.leave(2)
    scheduler.next_step(0.401)
    scheduler.submit([item(3, arrived=0.402), item(4, arrived=0.402)])
    assert scheduler.next_step(0.403).join == [3, 4]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 6), patience=st.integers(0, 5))
def test_every_row_runs_once_whatever_happens(seed, rows, patience):
    draw = random.Random(seed)
    limits = Limits(rows=rows, queue=30, tokens=200, prompt_tokens=60, patience=patience)
    scheduler = Scheduler(limits)
    arrived, joined, gone, passed = [], [], set(), {}
    number = 0
    for tick in range(300):
        if number < 60 and draw.random() < 0.5:
            experts = frozenset((0, draw.randrange(6)) for _ in range(draw.randrange(3)))
            arrived_at = float(tick) if draw.random() < 0.5 else float("-inf")
            new = item(number, draw.randint(1, 90), draw.randint(0, 90), experts=experts, arrived=arrived_at)
            try:
                scheduler.submit([new])
            except QueueFullError:
                assert scheduler.waiting == limits.queue
            else:
                arrived.append(new)
            number += 1
        step = scheduler.next_step(float(tick), frozenset({(0, draw.randrange(6))}))
        for id in step.join:
            for other in arrived:
                if other.id not in joined and other.id not in gone and other.id < id and other.id not in step.join:
                    passed[other.id] = passed.get(other.id, 0) + 1
            joined.append(id)
        running = [other for other in arrived if other.id in joined and other.id not in gone]
        assert len(running) <= rows
        assert sum(other.tokens for other in running) <= limits.tokens
        for other in running:
            if draw.random() < 0.4:
                scheduler.leave(other.id)
                gone.add(other.id)
    for turn in range(100):
        scheduler.next_step(1e6 + turn)
        for other in arrived:
            scheduler.leave(other.id) if other.id in joined else None
        step = scheduler.next_step(1e6 + turn + 0.5)  # whatever waits is held no longer than that
        joined += step.join
        for id in step.join:
            scheduler.leave(id)
    assert sorted(set(joined)) == sorted(other.id for other in arrived)
    assert len(joined) == len(set(joined))
    assert all(count <= patience for count in passed.values()), passed


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("queue", 0), ("tokens", 0), ("prompt_tokens", 0)])
def test_limits_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        Limits(**{name: value})
    with pytest.raises(ValueError, match="gather is -1, expected seconds, 0 or more"):
        Limits(gather=-1)
