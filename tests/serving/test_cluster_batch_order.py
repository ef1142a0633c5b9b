"""The order in which rows reach a cluster's actors."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sida_ext.serving.cluster_batch_order import by_experts


def two_domains(count: int, seed: int) -> list[tuple[int, frozenset[tuple[int, int]]]]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        domain = draw.randrange(2)
        found.append(
            (domain, frozenset((layer, 16 * domain + draw.randrange(16)) for layer in (0, 1) for _ in "12345"))
        )
    return found


def test_domains_stand_together():
    rows = two_domains(400, seed=1)
    domains = [rows[at][0] for at in by_experts([wanted for _, wanted in rows])]
    changes = sum(left != right for left, right in itertools.pairwise(domains))
    assert changes <= 12  # about 200 in the order given; a half that holds both is cut again, either way round


@settings(max_examples=30, deadline=None)
@given(st.lists(st.frozensets(st.tuples(st.integers(0, 2), st.integers(0, 7))), max_size=60))
def test_every_row_is_there_once_and_the_order_is_always_the_same(wanted):
    order = by_experts(wanted)
    assert sorted(order) == list(range(len(wanted)))
    assert by_experts(wanted) == order
