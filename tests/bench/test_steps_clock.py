"""The runs of bench/causal/steps.py on the virtual clock: what they give where what is likely is right, or wrong."""

from __future__ import annotations

import pytest

from bench.causal.steps import Step, cost, replay, sixteen_layers

LAYERS, EXPERTS, CHOSEN = 6, 16, 2


def steps(shift: int, chance: float, count: int = 150) -> list[Step]:
    """Layers that want experts in turn, of which the one that follows by ``shift`` is thought likely."""
    found = []
    for number in range(count):
        wanted = [[(7 * number + 3 * layer + at) % EXPERTS for at in range(CHOSEN)] for layer in range(LAYERS)]
        step = Step(wanted, {})
        for layer, experts in enumerate(wanted):
            for distance in range(1, layer + 2):
                likely = [(chance, (expert + shift) % EXPERTS) for expert in experts]
                step.likely["steps", layer, distance] = likely
        found.append(step)
    return found


@pytest.mark.parametrize("read", [0.1, 1.0, 10.0])
def test_what_is_right_saves_and_what_is_wrong_costs_little(read):
    right, wrong = steps(0, 0.95), steps(EXPERTS // 2, 0.95)
    none = replay(right, "none", 24, read)
    found = replay(right, "steps", 24, read)
    assert found["time"] <= none["time"]
    assert found["wasted"] == 0
    if read <= 1:
        assert found["stall"] < 0.8 * none["stall"]
        assert replay(right, "oracle", 24, read)["stall"] <= found["stall"] + 1e-9
    assert replay(wrong, "steps", 24, read)["level"] == 0  # the guard has stopped it


def test_what_is_unlikely_is_not_read():
    none, found = (replay(steps(0, 0.2), way, 24, 1.0) for way in ("none", "steps"))
    assert found["useful"] == found["wasted"] == 0
    assert found["time"] == none["time"]


def test_every_part_of_a_step_costs_something():
    found = cost(sixteen_layers(), repeats=8)
    assert set(found) == {"odds", "observe", "joined", "step"}
    assert found["step"] > found["odds"] + found["observe"] > 0
