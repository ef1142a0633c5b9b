"""sida plan: the policies on a routing that is known, and on a model's own."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import SwitchTransformersEncoderModel

import sida_ext
from sida_ext import _C
from sida_ext.experts.options import EVICTIONS
from sida_ext.models.layers import swapped_layers
from sida_ext.planning.hit_rates import (
    UNTOLD,
    ModelledTime,
    Routing,
    compare,
    on_the_clock,
    record_routing,
    record_steps,
)
from tests.support.families import tiny_model
from tests.support.reference import build, small_config


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
        for policy in EVICTIONS:
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


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "experts.sida"
    model = sida_ext.swap_experts(tiny_model("olmoe")[1], expert_memory="50%", expert_dtype="float32", store=path)
    yield model
    model.sida.close()


def test_steps_are_the_tokens_of_a_text_one_by_one(decoder):
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    found = record_steps(decoder, [{"input_ids": ids, "attention_mask": mask}])
    assert len(found.batches) == 10
    seen = []
    for layer in swapped_layers(decoder):
        layer.observer = lambda name, index: seen.append(sorted(index[-1].tolist()))
    with torch.no_grad():
        cache = decoder(input_ids=ids[:1, :5], use_cache=True).past_key_values
        seen.clear()
        decoder(input_ids=ids[:1, 5:], past_key_values=cache, use_cache=True)
    for layer in swapped_layers(decoder):
        layer.observer = None
    assert [sorted(experts) for _, experts in found.batches[5]] == seen
    for row in compare(found, [0.25, 0.75]):
        assert set(row.hit_rate) == {"opt", *EVICTIONS, UNTOLD}
        assert row.loads["opt"] <= row.loads["next_use"] <= row.loads[UNTOLD]


def test_only_decoder_only_models_have_steps():
    with pytest.raises(ValueError, match="no decoder-only model"):
        record_steps(torch.nn.Linear(2, 2), [])


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
    """120 sentences of the bundled model, with its predictor's tables: python -m bench.engine.policy --record."""
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


A, B = [(0, [0])], [(0, [1])]


@pytest.mark.parametrize(
    ("batches", "slots", "lookahead", "read", "stalled", "seconds"),
    [
        # Read once for want, then there: 2 before the layer, 1 of waiting, a half of computing; two more batches.
        ([A, A, A], 1, 0, 1.0, 1.0, 8.5),
        # Announced at the start, read while the model computes what comes before.
        ([A, B, A], 2, 2, 1.0, 0.0, 7.5),
        # The reader is behind: A is there at 5 and wanted at 2; B is there at 10 and wanted at 7.5.
        ([A, B], 2, 1, 5.0, 5.5, 10.5),
        # Two experts of one layer in one slot: the second is read when the first has been computed.
        ([[(0, [0, 1])]], 1, 0, 1.0, 2.0, 5.0),
    ],
)
def test_the_virtual_clock_counts_what_a_pencil_counts(batches, slots, lookahead, read, stalled, seconds):
    row = on_the_clock(Routing(1, 2, batches, []), slots, ModelledTime(read, before=2.0, compute=0.5), lookahead)
    assert row.stalled == pytest.approx(stalled)
    assert row.seconds == pytest.approx(seconds)


def test_two_lanes_read_side_by_side():
    both = Routing(1, 2, [[(0, [0, 1])]], [])
    one, two = (on_the_clock(both, 2, ModelledTime(1.0, 0.0, 0.0, lanes), lookahead=0) for lanes in (1, 2))
    assert (one.stalled, two.stalled) == (2.0, 1.0)


def on_a_shared_disk(experts: list[int], lanes: int, read: float, shared: float, compute: float = 1.0) -> float:
    """Seconds of one layer that wants ``experts``, none of them there and room for all."""
    batches = [[(0, experts)]]
    found = _C.run_clock(1, 4, batches, "next_use", 4, 0, read, 0.0, compute, lanes, [], shared=shared)
    return found["seconds"]


def test_lanes_that_share_a_disk_slow_each_other_down():
    assert on_a_shared_disk([0], 2, 2.0, 1.5) == 3.0  # alone: two seconds, then computed
    assert on_a_shared_disk([0, 1], 2, 2.0, 1.5) == 5.0  # together each takes twice 1.5
    # The third is read alone from 3 on, while the first and the second are computed.
    assert on_a_shared_disk([0, 1, 2], 2, 2.0, 1.5) == 6.0
    assert on_a_shared_disk([0, 1, 2], 2, 2.0, 1.5, compute=0.0) == 5.0
    assert on_a_shared_disk([0, 1], 2, 2.0, 1.0) == on_a_shared_disk([0, 1], 2, 2.0, 0.0) == 4.0  # it has room for both
    for count in range(1, 5):
        wanted = list(range(count))
        assert on_a_shared_disk(wanted, 1, 2.0, 1.5) == on_a_shared_disk(wanted, 1, 2.0, 0.0)
    with pytest.raises(ValueError, match=r"shared is 3 s, expected at most read, 2 s"):
        on_a_shared_disk([0], 1, 2.0, 3.0)
    with pytest.raises(ValueError, match="shared is -1 s"):
        on_a_shared_disk([0], 1, 2.0, -1.0)


@pytest.mark.parametrize("seed", range(3))
def test_true_tables_stall_less_than_wrong_ones_and_both_compute_the_same(seed):
    true, other = routing(40, seed=seed), routing(40, seed=seed + 100)
    time = ModelledTime(read=1e-3, before=2e-3, compute=2e-4)
    told, misled = (on_the_clock(r, 24, time) for r in (true, replace(true, predicted=other.batches)))
    assert told.wanted == misled.wanted
    assert told.stalled < misled.stalled
    assert misled.wasted_prefetches > told.wasted_prefetches
    for row in (told, misled):
        computed = sum(len(experts) for batch in true.batches for _, experts in batch) * time.compute
        assert row.seconds == pytest.approx(row.stalled + 40 * 3 * time.before + computed)


@pytest.mark.parametrize(
    ("time", "says"),
    [
        (ModelledTime(-1.0, 0, 0), "read is -1 s"),
        (ModelledTime(1.0, float("nan"), 0), "before is nan s"),
        (ModelledTime(1.0, 0, 0, lanes=0), "lanes is 0"),
    ],
)
def test_modelled_times_are_checked(time, says):
    with pytest.raises(ValueError, match=says):
        on_the_clock(routing(1), 4, time)
