"""The virtual clock of bench/causal/lookahead.py: what it must give on routing that is known."""

from __future__ import annotations

import random

from bench.causal.lookahead import Clock, Forward, replay


def routing(steps=40, layers=4, experts=8, right=True, seed=0):
    """Two experts of each layer at random; named rightly, or those that follow them."""
    chance = random.Random(seed)
    forwards = []
    for _ in range(steps):
        wanted = [chance.sample(range(experts), 2) for _ in range(layers)]
        named = [
            {d: list(w) if right else [(e + 1) % experts for e in w] for d in range(1, at + 1)}
            for at, w in enumerate(wanted)
        ]
        forwards.append(Forward(wanted, named))
    return forwards


def test_with_room_for_all_each_expert_is_read_once():
    forwards = routing(steps=200)
    found = replay(forwards, "none", 32, 0.5, 2)
    assert found["reads_per_step"] * 200 == 32
    assert found["time_per_step"] * 200 == 200 * 4 + found["stall_per_step"] * 200


def test_true_names_are_as_good_as_the_oracle_and_hide_reads():
    forwards = routing()
    none, oracle = (replay(forwards, way, 8, 0.2, 1) for way in ("none", "oracle"))
    assert replay(forwards, "unguarded", 8, 0.2, 1) == oracle
    # All but each step's first layer is read in time: two reads of 0.2 beside a layer of 1.
    assert oracle["hit_rate"] >= 0.75 > none["hit_rate"]
    assert oracle["stall_per_step"] < none["stall_per_step"]


def test_wrong_names_cost_and_the_guard_bounds_it():
    forwards = routing(steps=200, right=False)
    none, free, guarded = (replay(forwards, way, 8, 3.0, 1) for way in ("none", "unguarded", "lookahead"))
    assert guarded["level"] == 0
    assert none["time_per_step"] < guarded["time_per_step"] < 1.1 * none["time_per_step"]
    assert free["time_per_step"] > 1.2 * none["time_per_step"]


def test_a_layer_wider_than_memory_runs_in_waves():
    clock = Clock(1, 2.0)
    clock.demand(0, [1, 2, 3])
    assert clock.now == clock.stalled == 6.0
    assert len(clock.there) == 1
