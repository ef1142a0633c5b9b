"""Whether whole batches are announced: the guard over a predictor that is right, and over one that is wrong."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import OlmoeForCausalLM

import sida_ext
from sida_ext import HashTable
from sida_ext.planning.hit_rates import ModelledTime, Routing, on_the_clock
from sida_ext.prediction.announcing import AnnouncingState
from sida_ext.prediction.lookahead_guard import GuardOptions
from tests.support.reference import build

LAYERS, EXPERTS, WANTED = 6, 32, 10


def drawn(batches, seed=0):
    """A routing of which three of ten experts change from batch to batch."""
    draw = random.Random(seed)
    wanted = [set(draw.sample(range(EXPERTS), WANTED)) for _ in range(LAYERS)]
    found = []
    for _ in range(batches):
        for layer in range(LAYERS):
            kept = {expert for expert in sorted(wanted[layer]) if draw.random() > 0.3}
            others = [expert for expert in range(EXPERTS) if expert not in kept]
            wanted[layer] = kept | set(draw.sample(others, WANTED - len(kept)))
        found.append([(layer, sorted(experts)) for layer, experts in enumerate(wanted)])
    return found


def always_wrong(batches, seed=1):
    """As many experts in each layer, none of which the batch wants."""
    draw = random.Random(seed)
    return [
        [(layer, draw.sample(sorted(set(range(EXPERTS)) - set(experts)), WANTED)) for layer, experts in batch]
        for batch in batches
    ]


@pytest.mark.parametrize("read", [0.1e-3, 0.5e-3, 2e-3])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
def test_on_the_clock_a_wrong_predictor_costs_next_to_nothing_and_an_oracle_keeps_all_it_gains(budget, read):
    batches, slots = drawn(400), round(budget * LAYERS * EXPERTS)
    time = ModelledTime(read, before=0.5e-3, compute=0.05e-3)
    plain, wrong = Routing(LAYERS, EXPERTS, batches, []), Routing(LAYERS, EXPERTS, batches, always_wrong(batches))
    none = on_the_clock(plain, slots, time, lookahead=0)
    assert on_the_clock(wrong, slots, time).seconds > 1.05 * none.seconds  # without the guard
    guarded = on_the_clock(wrong, slots, time, guard=GuardOptions())
    assert guarded.seconds <= 1.02 * none.seconds
    assert guarded.wasted_prefetches <= 20  # of the first batch; it names 60
    oracle, unguarded = (on_the_clock(plain, slots, time, guard=guard) for guard in (GuardOptions(), None))
    assert oracle.seconds <= min(none.seconds, 1.005 * unguarded.seconds)  # which begins to read early at once


def test_on_the_clock_layers_that_hardly_wait_are_not_read_early():
    # Six slots, sixteen experts a layer, and what is computed hides nearly all reads.
    batches = [[(layer, list(range(16))) for layer in range(4)] for _ in range(40)]
    plain, time = Routing(4, 16, batches, []), ModelledTime(0.045e-3, before=0.5e-3, compute=0.05e-3)
    none, oracle = on_the_clock(plain, 6, time, lookahead=0), on_the_clock(plain, 6, time, guard=GuardOptions())
    assert on_the_clock(plain, 6, time).loads > none.loads  # what reading early costs
    assert oracle.seconds <= none.seconds
    assert oracle.loads <= none.loads


def test_on_the_clock_what_is_missing_lies_evenly_and_is_hidden():
    """Half of the experts fit and all are wanted in turn. A layer computes for as long as half of its experts take to
    be read: where each misses half, hardly anything is waited for."""
    layers, experts = 6, 32
    batches = [[(layer, list(range(experts))) for layer in range(layers)] for _ in range(20)]
    time = ModelledTime(0.09e-3, before=0.0, compute=0.05e-3)
    seconds = [
        on_the_clock(Routing(layers, experts, batches[:count], []), layers * experts // 2, time, lookahead=0).seconds
        for count in (10, 20)
    ]
    assert seconds[1] - seconds[0] <= 1.15 * 10 * layers * experts * time.compute


class Counted:
    """An AnnouncingState on counters and a time of the test's own."""

    def __init__(self, **options):
        self.counts, self.now = (0, 0, 0, 0, 0, 0.0, 0.0), 0.0
        guard = GuardOptions(**options)
        self.state = AnnouncingState(None, guard, 1, lambda: self.counts, lambda: self.now)

    def batch(self, useful, wasted, read=0.001, right=0, wrong=0):
        """One second of a batch, and room for the next."""
        self.now += 1.0
        loads = useful + wasted
        fresh = (right, wrong, useful, wasted, loads, loads * read, 0.0)
        self.counts = tuple(a + b for a, b in zip(self.counts, fresh, strict=True))
        return self.state.room(500)


def test_it_rests_and_then_tries_with_a_window_at_the_most():
    counted = Counted(window=10, rest=3.0)
    assert [counted.batch(8, 1) for _ in range(5)] == [500] * 5
    assert counted.batch(0, 20) == 0
    assert counted.state.stats().state == "resting"
    assert [counted.batch(0, 0) for _ in range(3)] == [0, 0, 10]
    assert counted.state.stats().state == "probing"
    assert counted.batch(10, 0) == 500
    stats = counted.state.stats()
    assert (stats.state, stats.admitted, stats.refused) == ("open", 7, 3)


def test_a_batch_larger_than_the_window_is_judged_by_its_share():
    counted = Counted(window=10)
    assert counted.batch(0, 0, right=80, wrong=40) == 500  # more wrong ones than a window holds
    assert counted.batch(0, 0, right=40, wrong=80) == 0


def test_what_is_named_in_vain_counts_though_nothing_was_read_for_it():
    counted = Counted(window=10)
    assert counted.batch(0, 0, right=8, wrong=1) == 500
    assert counted.state.stats().named_share == pytest.approx(8 / 9)
    assert counted.batch(0, 0, right=1, wrong=20) == 0
    # A third is enough where the disk rests most of the time, and half where nothing is known of it.
    assert Counted(window=10).batch(0, 0, right=4, wrong=6) == 0
    slack = Counted(window=10)
    assert [slack.batch(20, 0, right=9, wrong=1) for _ in range(3)][-1] == 500
    assert slack.batch(0, 0, right=4, wrong=6) == 500


def test_a_batch_is_given_up_at_the_layer_where_it_is_known_to_be_in_vain():
    counted = Counted()
    assert counted.batch(0, 0) == 500
    counted.counts = (3, 12, 0, 0, 0, 0.0, 0.0)
    assert not counted.state.in_vain()  # may be chance
    assert counted.state.stats().state == "open"
    counted.counts = (3, 24, 0, 0, 0, 0.0, 0.0)
    assert counted.state.in_vain()
    assert counted.state.stats().state == "resting"
    assert not counted.state.in_vain()  # said once
    assert counted.batch(0, 0) == 0


def test_a_batch_with_some_that_are_wrong_is_not_given_up():
    counted = Counted()
    counted.batch(0, 0)
    for layer in range(1, 100):
        counted.counts = (6 * layer, 4 * layer, 5 * layer, 3 * layer, 8 * layer, 0.0, 0.0)
        assert not counted.state.in_vain()
    assert counted.batch(0, 0) == 500


def test_a_rest_is_as_long_as_the_attempt_was_expensive():
    counted = Counted(window=10, rest=3.0, loss=0.02)
    assert counted.batch(5, 5, read=0.05) == 500
    assert counted.batch(0, 20, read=0.05) == 0  # about a second of reads in vain
    rested = next(second for second in range(1, 1000) if counted.batch(0, 0))
    assert 45 <= rested <= 80


def test_a_busy_disk_wants_more_useful_bytes():
    slack, busy = Counted(window=100), Counted(window=100)
    for _ in range(20):
        slack.batch(7, 3, read=0.001)
        busy.batch(7, 3, read=1.0)  # ten seconds of reads in each second: seven of ten are too few
    assert slack.state.stats().state == "open"
    assert busy.state.stats().state == "resting"
    assert busy.state.stats().pressure == pytest.approx(10.0)


def test_what_others_read_between_batches_is_not_judged():
    counted = Counted(window=10)
    counted.counts = (0, 0, 0, 50, 50, 0.1, 0.0)
    counted.state.begin(shared=True)
    assert counted.state.room(500) == 500
    counted.counts = (0, 0, 0, 100, 100, 0.2, 0.0)
    counted.state.begin(shared=False)
    assert counted.state.room(500) == 0


def test_counters_that_were_set_back_begin_at_nothing():
    counted = Counted(window=10)
    assert counted.batch(100, 0) == 500
    counted.counts = (0, 0, 0, 0, 0, 0.0, 0.0)
    assert counted.batch(8, 1) == 500


def test_a_share_of_loss_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="loss is 0"):
        GuardOptions(loss=0.0)


class Named:
    """Names what it is told to for every token, for sure."""

    candidates = 2

    def __init__(self, choose):
        self.choose, self.calls = choose, 0

    def predict(self, input_ids, attention_mask=None, top_k=1):
        self.calls += 1
        index = self.choose(input_ids)
        return HashTable(index, torch.ones(index.shape), torch.ones(index.shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import OlmoeConfig

    path = tmp_path_factory.mktemp("causal")
    config = OlmoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=32,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    build(OlmoeForCausalLM, config).save_pretrained(path)
    return path


@pytest.fixture
def endless(monkeypatch):
    """Once it rests, it rests for the test's whole time, however slow the machine is."""
    options = GuardOptions(rest=1e6, longest_rest=1e6)
    monkeypatch.setattr("sida_ext.models.prompt_prediction.GuardOptions", lambda: options)


@pytest.fixture
def served(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="20%")
    yield model
    model.sida.close()


def routing(model, ids):
    """The routers' choices [1, S, layers, top_k]."""
    from sida_ext.models.layers import swapped_layers

    chosen = []
    layers = swapped_layers(model)
    for layer in layers:
        layer.observer = lambda name, index: chosen.append(index.long())
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for layer in layers:
        layer.observer = None
    return torch.stack(chosen, dim=1)[None]


def unwanted(model):
    """For each layer and token two experts that no token of the batch wants."""

    def choose(ids):
        index = tables[ids.numpy().tobytes()]
        found = torch.empty_like(index)
        for layer in range(index.shape[2]):
            wanted = set(index[:, :, layer].flatten().tolist())
            others = torch.tensor([expert for expert in range(32) if expert not in wanted])
            tokens = index.shape[1]
            found[0, :, layer] = others[torch.arange(2 * tokens) % len(others)].reshape(tokens, 2)
        return found

    tables = {}
    return choose, tables


def prompts_and_tables(model, count=20):
    draw = torch.Generator().manual_seed(0)
    given = [torch.randint(2, 97, (1, 6), generator=draw) for _ in range(count)]
    return given, {ids.numpy().tobytes(): routing(model, ids) for ids in given}


def test_stream_stops_announcing_what_is_always_wrong_and_never_what_is_right(served, endless):
    given, tables = prompts_and_tables(served)
    choose, known = unwanted(served)
    known.update(tables)
    batches = [{"input_ids": ids, "use_cache": False} for ids in given]
    served.sida.reset_stats()
    plain = [output.logits for output in sida_ext.stream(served, batches)]
    assert served.sida.stats().announcing is None
    for round, predictor in enumerate((Named(lambda ids: tables[ids.numpy().tobytes()]), Named(choose))):
        found = [output.logits for output in sida_ext.stream(served, batches, predictor, drift=False)]
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
        stats = served.sida.stats().announcing
        if round == 0:
            assert stats.state == "open"
            assert (stats.admitted, stats.refused) == (20, 0)
        else:
            assert stats.state == "resting"
            assert stats.refused > 8
    served.sida.reset_stats()
    for _ in sida_ext.stream(served, batches[:8], predictor, drift=False):
        pass
    assert served.sida.stats().useful_prefetches + served.sida.stats().wasted_prefetches == 0
    assert sida_ext.experts.stats.Stats.as_dict(served.sida.stats())["announcing"]["state"] == "resting"


def test_at_no_cost_for_waste_everything_is_announced(served):
    given, tables = prompts_and_tables(served, 8)
    choose, known = unwanted(served)
    known.update(tables)
    batches = [{"input_ids": ids, "use_cache": False} for ids in given]
    for _ in sida_ext.stream(served, batches, Named(choose), waste_cost=0, drift=False):
        pass
    assert served.sida.stats().announcing is None


def test_a_prefill_is_not_even_predicted_while_that_is_in_vain(folder, endless):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="20%")
    given, tables = prompts_and_tables(model)
    choose, known = unwanted(model)
    known.update(tables)
    predictor = model.sida.predictor = Named(choose)
    with torch.no_grad():
        for ids in given:
            model(input_ids=ids, use_cache=False)
    assert model.sida.stats().announcing.state == "resting"
    assert 0 < predictor.calls < 12
    right = model.sida.predictor = Named(lambda ids: tables[ids.numpy().tobytes()])
    with torch.no_grad():
        model(input_ids=given[0], use_cache=False)
    assert right.calls == 1  # another one is judged by what it names itself
    assert model.sida.stats().announcing.state == "open"
    model.sida.close()


@pytest.mark.parametrize("by", ["stream", "prefill"])
def test_the_first_batch_is_given_up_after_its_first_layers(served, endless, by):
    """Twelve experts are named for each of four layers, all in vain: after one layer that can be no chance."""
    given, tables = prompts_and_tables(served, 1)
    choose, known = unwanted(served)
    known.update(tables)
    before = served.sida.announcing_pace()
    if by == "stream":
        (_,) = sida_ext.stream(served, [{"input_ids": given[0], "use_cache": False}], Named(choose), drift=False)
    else:
        served.sida.predictor = Named(choose)
        with torch.no_grad():
            served(input_ids=given[0], use_cache=False)
    right, wrong = (after - at for after, at in zip(served.sida.announcing_pace()[:2], before[:2], strict=True))
    assert right == 0
    assert 10 <= wrong <= 24
    assert served.sida.stats().announcing.state == "resting"
