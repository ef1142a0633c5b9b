"""Which replica a request goes to: experts first, within a bound on imbalance."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sida_ext.serving.expert_routing import ExpertRouting, mask_of


def routing(*names: str, **options) -> ExpertRouting:
    made = ExpertRouting(**options)
    made.present(names)
    return made


def test_experts_are_bits_by_layer():
    assert mask_of([(0, 0), (0, 3), (2, 1)], experts=4) == 0b10_0000_1001
    assert mask_of([], experts=4) == 0


def test_the_replica_that_holds_most_of_the_experts_comes_first():
    known = routing("a", "b", "c")
    known.report("a", 0b0001)
    known.report("b", 0b0111)
    known.report("c", 0b0011)
    assert known.rank(0b0111, ["a", "b", "c"]) == ["b", "c", "a"]
    assert known.rank(0b0001, ["c", "a"])[0] in ("a", "c")
    known.report("b", 0)
    assert known.rank(0b0111, ["a", "b", "c"]) == ["c", "a", "b"]


def test_what_was_sent_counts_where_what_is_held_is_equal():
    known = routing("a", "b")
    known.sent("a", 0b1100, 1)
    known.sent("b", 0b0011, 1)
    assert known.rank(0b0001, ["a", "b"]) == ["b", "a"]
    assert known.rank(0b0100, ["a", "b"]) == ["a", "b"]


def test_without_a_prediction_load_decides():
    known = routing("a", "b", "c")
    for name, weight in (("a", 9), ("b", 3), ("c", 6)):
        known.sent(name, 0, weight)
    assert known.rank(0, ["a", "b", "c"]) == ["b", "c", "a"]


def test_a_replica_beyond_the_bound_stands_behind_all_others():
    known = routing("a", "b", imbalance=1.25)
    known.report("a", 0b1111)
    for _ in range(4):
        known.sent("a", 0b1111, 10)
    assert known.rank(0b1111, ["a", "b"]) == ["b", "a"]


def test_a_new_replica_is_sent_its_share_at_once_and_is_not_flooded():
    known = routing("a", "b")
    for _ in range(200):
        known.sent("a", 0b01, 10)
        known.sent("b", 0b10, 10)
    known.report("a", 0b01)
    known.report("b", 0b10)
    known.present(["a", "b", "c"])
    went = []
    for number in range(20):
        went.append(known.rank(0b01 << number % 2, ["a", "b", "c"])[0])
        known.sent(went[-1], 0b01 << number % 2, 10)
    assert 2 <= went.count("c") <= 8
    known.present(["b", "c"])
    known.report("a", 0b1)  # a late report of one that is gone
    with pytest.raises(KeyError):
        known.load("a")


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.floats(1.05, 2.0), st.integers(0, 2**32))
def test_no_load_passes_the_bound(replicas, imbalance, seed):
    """However one-sided the requests are: all that goes to one replica beyond its bound is one request."""
    draw = random.Random(seed)
    names = [str(number) for number in range(replicas)]
    known = routing(*names, imbalance=imbalance, horizon=32)
    known.report("0", (1 << 64) - 1)  # holds everything
    for _ in range(400):
        wanted, weight = draw.getrandbits(64), draw.randint(1, 20)
        chosen = known.rank(wanted, names)[0]
        known.sent(chosen, wanted, weight)
        loads = [known.load(name) for name in names]
        assert max(loads) <= imbalance * sum(loads) / replicas + 20


def test_two_domains_part_though_every_memory_begins_empty():
    """Memories are emulated: each holds the 12 experts that it used last, and reports now and then."""
    draw = random.Random(3)
    names = ["a", "b"]
    known = routing(*names)
    used: dict[str, list[int]] = {name: [] for name in names}
    went = []
    for number in range(400):
        domain = draw.randrange(2)
        experts = [16 * domain + draw.randrange(16) for _ in range(6)]
        wanted = sum(1 << expert for expert in set(experts))
        chosen = known.rank(wanted, names)[0]
        known.sent(chosen, wanted, 6)
        used[chosen] = [*(expert for expert in used[chosen] if expert not in experts), *set(experts)][-12:]
        if number % 10 == 0:
            for name in names:
                known.report(name, sum(1 << expert for expert in used[name]))
        if number >= 100:
            went.append((domain, chosen))
    share = sum(pair in ((0, "a"), (1, "b")) for pair in went) / len(went)
    assert max(share, 1 - share) > 0.9


@pytest.mark.parametrize("wrong", [{"imbalance": 0.9}, {"horizon": 0}, {"imbalance": float("nan")}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*, expected at least 1"):
        ExpertRouting(**wrong)
