"""sida plan: the policies on a routing that is known, and on a model's own."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import build, small_config
from transformers import SwitchTransformersEncoderModel

import sida_ext
from sida_ext.plan import POLICIES, Routing, compare, record_routing


def routing(batches: int, layers: int = 3, experts: int = 16, wanted: int = 4, seed: int = 0) -> Routing:
    random = torch.Generator().manual_seed(seed)
    used = [
        [(layer, torch.randperm(experts, generator=random)[:wanted].tolist()) for layer in range(layers)]
        for _ in range(batches)
    ]
    return Routing(layers, experts, used, [])


def test_everything_fits():
    (row,) = compare(routing(20), [1.0])
    assert row.slots == 48
    distinct = {(layer, e) for batch in routing(20).batches for layer, experts in batch for e in experts}
    assert set(row.loads.values()) == {len(distinct)}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_beats_the_optimum(seed):
    for row in compare(routing(60, seed=seed), [0.1, 0.3, 0.6, 0.9]):
        for policy in POLICIES:
            assert row.loads["opt"] <= row.loads[policy], (row.share, policy)
        assert row.hit_rate["next_use"] >= max(row.hit_rate[p] for p in ("lru", "lfu", "fifo"))


def test_a_cycle_that_lru_never_hits():
    # Five experts in turn over four slots: LRU and FIFO miss each time, the optimum keeps three.
    cycle = [[(0, [i % 5])] for i in range(50)]
    (row,) = compare(Routing(1, 5, cycle, []), [0.8], lookahead=6)
    assert row.slots == 4
    assert row.hit_rate["lru"] == row.hit_rate["fifo"] == 0
    assert row.hit_rate["opt"] > 0.6
    assert row.hit_rate["next_use"] > 0.6


def test_shares_are_checked():
    for share in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=f"share is {share}"):
            compare(routing(1), [share])


def test_the_routing_of_a_model_is_what_its_router_chose(tmp_path):
    reference = build(SwitchTransformersEncoderModel, small_config())
    reference.save_pretrained(tmp_path)
    model = sida_ext.from_pretrained(tmp_path, expert_memory="50%")
    batch = {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    recorded = record_routing(model, [batch])
    with torch.no_grad():
        logits = reference(**batch, output_router_logits=True).router_logits
    assert recorded.batches == [[(i, layer.argmax(-1).unique().tolist()) for i, layer in enumerate(logits)]]
    model.sida.close()
    with pytest.raises(ValueError, match="no swapped MoE layers"):
        record_routing(reference, [batch])


@pytest.fixture(scope="module")
def recorded():
    """120 sentences of the bundled model, with its predictor's tables: python -m bench.policy --record."""
    text = gzip.decompress((Path(__file__).parent / "routing_demo.json.gz").read_bytes())
    return Routing(**json.loads(text))


@pytest.mark.parametrize("perfect", [True, False])
def test_next_use_on_real_routing(recorded, perfect):
    routing = replace(recorded, predicted=[]) if perfect else recorded
    for row in compare(routing, [percent / 100 for percent in range(10, 100, 10)], lookahead=4):
        rate = row.hit_rate
        if perfect:
            assert rate["next_use"] >= 0.97 * rate["opt"], row
        assert rate["next_use"] <= rate["opt"]
        assert rate["next_use"] >= max(rate["lru"], rate["lfu"], rate["fifo"]), row
        if rate["opt"] > rate["lru"] + 0.01:
            assert rate["next_use"] > rate["lru"], row
