"""RouterLookahead in models of the experts seam: the same bits, the routers found, and what must refuse."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import time
import weakref

import pytest
import torch
from transformers import SwitchTransformersEncoderModel

import sida_ext
from sida_ext import _C
from sida_ext.models.layers import swapped_layers
from sida_ext.models.layouts import experts_modules
from sida_ext.prediction.lookahead_guard import GuardOptions
from sida_ext.prediction.router_asking import AskedRouter, find_routers
from sida_ext.prediction.router_lookahead import LookaheadState
from tests.support.families import tiny_model
from tests.support.reference import build, small_config

# A norm before the block; arguments behind the hidden states; a router on the residual stream itself; no norm at all;
# a router of three dimensions; experts narrower than the router's input; a layer that runs several times.
FAMILIES = ["olmoe", "mixtral", "afmoe", "gemma4", "flex_olmo", "deepseek_v3", "nemotron_h", "inkling2_loop"]
EXPERTS = 8
NEVER_OFF = GuardOptions(waste_cost=0.0, idle=10**9, window=4)


def tokens(batch=2, length=7, seed=0):
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny_model(family)[1].float().eval()
        return made[family]

    return get


def swapped(model, lookahead=None, **options):
    return sida_ext.swap_experts(
        copy.deepcopy(model), predictor=lookahead, **{"expert_dtype": "float32", "expert_memory": "40%", **options}
    )


def run(model, new=8):
    """Prompt, steps, and the prompt again without a cache."""
    with torch.no_grad():
        logits = model(input_ids=tokens()).logits
        out = model.generate(
            tokens(), max_new_tokens=new, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    return [logits, out.sequences, *out.scores]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_without_it_whatever_the_budget(models, family):
    plain = swapped(models(family), expert_memory="100%")
    with plain.sida:
        expected = run(plain)
    for budget, slots in (("15%", 0), ("60%", 0), ("100%", 1)):
        served = swapped(models(family), sida_ext.RouterLookahead(3, guard=NEVER_OFF), expert_memory=budget)
        with served.sida as runtime:
            if slots:
                runtime.set_budget(slots * runtime.header.record_bytes)
            assert_same_bits(run(served), expected)
            stats = runtime.stats()
            assert not stats.lookahead.not_asked
            if budget == "60%":
                assert stats.useful_prefetches > 0
            if slots == 1:  # no room beside what a layer computes from: nobody is asked
                assert stats.lookahead.asked == stats.useful_prefetches == 0


@pytest.mark.parametrize("seed", range(3))
def test_wrong_predictions_change_no_bits(models, monkeypatch, seed):
    """Routers that answer at random, in any number, while reads take their time and fail to be on time."""
    random = torch.Generator().manual_seed(seed)

    def wrong(self, hidden, normalised):
        rows, width = int(torch.randint(1, 5, (), generator=random)), int(torch.randint(1, 4, (), generator=random))
        index = torch.randint(-1, EXPERTS + 2, (rows, width), generator=random)
        return index, torch.rand(rows, width, generator=random) if seed else None

    plain = swapped(models("olmoe"), expert_memory="100%")
    with plain.sida:
        expected = run(plain)
    monkeypatch.setattr(AskedRouter, "ask", wrong)
    faults = _C.Faults(seed=seed, delay_us_max=300)
    served = swapped(
        models("olmoe"),
        sida_ext.RouterLookahead(guard=NEVER_OFF),
        expert_memory=("15%", "30%", "70%")[seed],
        eviction=("next_use", "lru", "fifo")[seed],
        lanes=1 + seed,
        faults=faults,
    )
    with served.sida as runtime:
        assert_same_bits(run(served), expected)
        assert runtime.stats().loads > runtime.stats().misses
        assert runtime.stats().peak_slots <= runtime.slots


def test_the_next_layers_router_is_asked_on_its_own_norm_of_what_this_layer_sees(models):
    """Against a computation of our own, from transformers' modules by their names."""
    model = copy.deepcopy(models("olmoe"))
    random = torch.Generator().manual_seed(0)
    for layer in model.model.layers:  # norms that differ, and not by a factor, which no choice depends on
        layer.post_attention_layernorm.weight.data = torch.randn(32, generator=random)
    seen = {}
    served = swapped(model, sida_ext.RouterLookahead(2, guard=NEVER_OFF), expert_memory="100%")
    layers = served.model.layers
    for number, layer in enumerate(layers):
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a, n=number: seen.__setitem__(n, a[0]))
    asked = []

    def record(self, hidden, normalised, ask=AskedRouter.ask):
        answer = ask(self, hidden, normalised)
        asked.append((self.experts, answer[0]))
        return answer

    with served.sida, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(AskedRouter, "ask", record)
        served.sida.ahead.guard.level = 2
        served(input_ids=tokens())
        for at, (name, index) in enumerate(asked):
            layer = int(name.split(".")[2])
            source = layer - 1 - (at in (1,))  # layer 0 asks 1 and 2, layer 1 asks 2
            mlp, norm = layers[layer].mlp, layers[layer].post_attention_layernorm
            wanted = mlp.gate.forward(norm.forward(seen[source]).reshape(-1, 32))[2]
            assert torch.equal(index, wanted)
    assert [name.split(".")[2] for name, _ in asked] == ["1", "2", "2"]


@pytest.mark.parametrize("family", ["deepseek_v4", "zaya"])
def test_a_router_that_reads_more_than_hidden_states_is_said_by_name(models, family, caplog):
    with caplog.at_level(logging.WARNING, "sida_ext"):
        served = swapped(models(family), sida_ext.RouterLookahead())
    said = [record.getMessage() for record in caplog.records if "RouterLookahead" in record.getMessage()]
    assert len(said) == 1
    assert "model.layers.1.mlp.experts: its router, a " in said[0]
    assert "also reads" in said[0]
    with served.sida, torch.no_grad():
        served(input_ids=tokens())
        assert "model.layers.1.mlp.experts" in served.sida.stats().lookahead.not_asked


def test_nothing_of_a_model_is_changed_by_looking_for_its_routers(models):
    model = models("mixtral")
    before = torch.get_rng_state(), model(input_ids=tokens()).logits
    order, found, obstacles = find_routers(model, experts_modules(model))
    assert order == list(found) == list(experts_modules(model))
    assert not obstacles
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(model(input_ids=tokens()).logits, before[1])
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_a_layer_that_runs_twice_is_found_once(models):
    model = models("inkling2_loop")
    order, found, _ = find_routers(model, experts_modules(model))
    assert len(order) > len(found) == 6


def test_collected_router_logits_are_the_models_own(models):
    """transformers collects them by hooks on the routers: asking must not show there."""
    plain, served = swapped(models("olmoe")), swapped(models("olmoe"), sida_ext.RouterLookahead(guard=NEVER_OFF))
    with plain.sida, served.sida, torch.no_grad():
        expected = plain(input_ids=tokens(), output_router_logits=True).router_logits
        found = served(input_ids=tokens(), output_router_logits=True).router_logits
        assert served.sida.stats().lookahead.asked > 0
    assert_same_bits(found, expected)


def test_where_all_is_read_in_vain_it_stops_and_says_so(models, monkeypatch):
    """Routers that always name what is not wanted: the experts that follow the true ones."""
    ask = AskedRouter.ask

    def wrong(self, hidden, normalised):
        index, _ = ask(self, hidden, normalised)
        chosen = set(index.unique().tolist())
        others = [expert for expert in range(EXPERTS) if expert not in chosen][:2]
        return torch.tensor([others]), None

    monkeypatch.setattr(AskedRouter, "ask", wrong)
    guard = GuardOptions(window=4, rest=1e6, longest_rest=1e6)
    served = swapped(models("olmoe"), sida_ext.RouterLookahead(guard=guard), expert_memory=5 * 20_480)
    with served.sida as runtime, torch.no_grad():
        served.generate(tokens(1), max_new_tokens=60, do_sample=False)
        stats = runtime.stats()
        assert (stats.lookahead.state, stats.lookahead.level) == ("resting", 0)
        before = stats.lookahead.asked
        served.generate(tokens(1, seed=1), max_new_tokens=10, do_sample=False)
        assert runtime.stats().lookahead.asked == before


def test_nothing_stays_announced_after_a_forward(models):
    served = swapped(models("olmoe"), sida_ext.RouterLookahead(guard=NEVER_OFF))
    with served.sida as runtime, torch.no_grad():
        announced, retired = [], []
        announce, retire = runtime.announce, runtime.retire
        runtime.announce = lambda *a, **k: announced.append(announce(*a, **k)) or announced[-1]
        runtime.retire = lambda number: (retired.append(number), retire(number))
        served(input_ids=tokens())
        assert announced
        assert retired == announced


def test_a_batch_that_was_announced_by_another_is_left_to_it(models):
    served = swapped(models("olmoe"), sida_ext.RouterLookahead(guard=NEVER_OFF))
    with served.sida as runtime, torch.no_grad():
        number = runtime.announce({swapped_layers(served)[0].name: [0]})
        with runtime.batch(number):
            served(input_ids=tokens())
        runtime.retire(number)
        assert runtime.stats().lookahead.asked == 0
        served(input_ids=tokens())
        assert runtime.stats().lookahead.asked > 0


def test_a_copy_of_the_model_asks_its_own_routers(models):
    served = swapped(models("olmoe"), sida_ext.RouterLookahead(guard=NEVER_OFF))
    with served.sida, torch.no_grad():
        expected = served(input_ids=tokens()).logits
        twin = copy.deepcopy(served)
        assert torch.equal(twin(input_ids=tokens()).logits, expected)
        targets = twin.model.layers[0].mlp.experts.ahead.targets
        assert targets[0].router.router is twin.model.layers[1].mlp.gate
        assert targets[0].router.norm is twin.model.layers[1].post_attention_layernorm


def test_a_dropped_model_gives_its_memory_back_at_once(models):
    gc.collect()
    gc.disable()
    try:
        served = swapped(models("olmoe"), sida_ext.RouterLookahead(guard=NEVER_OFF))
        with torch.no_grad():
            served(input_ids=tokens())
        gone = weakref.ref(served.sida)
        del served
        assert gone() is None
    finally:
        gc.enable()


def test_several_threads_look_ahead_at_once(models):
    plain, served = swapped(models("mixtral")), swapped(models("mixtral"), sida_ext.RouterLookahead(guard=NEVER_OFF))
    with plain.sida, served.sida, torch.no_grad():
        expected = [plain(input_ids=tokens(seed=seed)).logits for seed in range(4)]
        found = [None] * 4

        def work(seed):
            with torch.no_grad():
                for _ in range(3):
                    found[seed] = served(input_ids=tokens(seed=seed)).logits

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert_same_bits(found, expected)


def test_a_model_of_another_kind_is_refused():
    model = build(SwitchTransformersEncoderModel, small_config())
    with pytest.raises(ValueError, match="holds RouterLookahead, which asks the routers of the experts seam"):
        sida_ext.swap_experts(model, predictor=sida_ext.RouterLookahead())


def test_a_model_that_does_not_run_on_tokens_alone_is_refused_before_it_is_touched(models, monkeypatch):
    model = copy.deepcopy(models("olmoe"))
    monkeypatch.setattr(model, "forward", lambda input_ids: 1 / 0)
    with pytest.raises(ValueError, match="cannot find the routers of OlmoeForCausalLM"):
        sida_ext.swap_experts(model, predictor=sida_ext.RouterLookahead())
    assert all("forward" not in vars(module) for module in experts_modules(model).values())
    assert model.model.layers[0].mlp.experts.down_proj.device.type == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read_ahead_where_nothing_is_said(models, family):
    plain = swapped(models(family), expert_memory="100%", read_ahead=False)
    with plain.sida as runtime:
        expected = run(plain)
        assert runtime.stats().lookahead is None
        assert runtime.stats().useful_prefetches == 0
    served = swapped(models(family), expert_memory="60%")
    with served.sida as runtime:
        assert_same_bits(run(served), expected)
        stats = runtime.stats()
        assert stats.lookahead.depth == 1
        assert stats.useful_prefetches > 0


def test_a_single_token_asks_nobody(models):
    served = swapped(models("olmoe"), expert_memory="60%")
    with served.sida as runtime, torch.no_grad():
        first = served(input_ids=tokens(1, 9), use_cache=True)
        asked, read = runtime.stats().lookahead.asked, runtime.stats().useful_prefetches
        assert asked == len(swapped_layers(served)) - 1
        served(input_ids=tokens(1, 1), past_key_values=first.past_key_values)
        assert runtime.stats().lookahead.asked == asked
        assert runtime.stats().useful_prefetches == read
        served(input_ids=tokens(1, 9))
        assert runtime.stats().lookahead.asked == 2 * asked
        assert set(runtime.stats().lookahead.recall) == {1}


def test_a_prompt_announces_no_more_than_can_be_read_in_time(models, monkeypatch):
    served = swapped(models("olmoe"), expert_memory="100%")
    with served.sida as runtime, torch.no_grad():
        announced = []

        def record(wanted, begin=True, announce=runtime.announce):
            announced.append((runtime.held(), wanted))
            return announce(wanted, begin=begin)

        monkeypatch.setattr(runtime, "announce", record)
        monkeypatch.setattr(type(runtime.ahead.pace), "slowness", 1.0)  # one read while one layer computes
        served(input_ids=tokens(1, 9))
    assert announced
    names = list(runtime.header.layers)
    for held, wanted in announced:
        absent = [(name, expert) for name, experts in wanted.items() for expert in experts]
        assert sum((names.index(name), expert) not in held for name, expert in absent) <= 1


def test_a_predictor_that_looks_ahead_takes_the_defaults_place(models):
    given = sida_ext.RouterLookahead(2)
    served = swapped(models("olmoe"), given)
    with served.sida as runtime:
        assert runtime.stats().lookahead.depth == 2
        assert not any(layer.ahead.prompts_only for layer in swapped_layers(served))


def test_a_model_whose_routers_cannot_be_found_is_served_without(models, monkeypatch, caplog):
    model = copy.deepcopy(models("olmoe"))
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "sida_ext"):
        patch.setattr(model, "forward", lambda input_ids: 1 / 0)
        served = sida_ext.swap_experts(model, expert_memory="40%")
    with served.sida as runtime, torch.no_grad():
        assert any("cannot find the routers of OlmoeForCausalLM" in record.message for record in caplog.records)
        served(input_ids=tokens())
        assert runtime.stats().lookahead is None


def test_an_announcement_can_leave_the_first_reads_to_the_demand(models):
    """``begin=False``: the engine's next event begins the reads, and a demand's come before them."""
    served = swapped(models("olmoe"), expert_memory="100%", lanes=1)
    with served.sida as runtime, torch.no_grad():
        layers, before = swapped_layers(served), runtime.held()
        number = runtime.announce({layers[1].name: [0, 1]}, begin=False)
        assert runtime.held() == before
        runtime.start_trace()
        layers[0](torch.randn(1, 32), torch.tensor([[5, 6]]), torch.ones(1, 2))
        runtime.retire(number)
        copies = [event.name for event in runtime.take_trace() if event.kind == "copy"]
        assert copies[0] == f"{layers[0].name} expert 5"
        assert not copies[0].startswith(layers[1].name)


def test_layers_at_which_nobody_could_be_asked_say_nothing_of_what_asking_is_worth(models, monkeypatch):
    took = []
    monkeypatch.setattr(LookaheadState, "took", lambda self, seconds, tokens, asking: took.append(asking))
    served = swapped(models("olmoe"), sida_ext.RouterLookahead(guard=GuardOptions(waste_cost=0.0, idle=10**9)))
    with served.sida, torch.no_grad():
        served(input_ids=tokens())
        asked = len(took)
        assert asked > 0
        assert None not in took
        with monkeypatch.context() as without:  # tried without
            without.setattr(LookaheadState, "may_ask", lambda self: False)
            served(input_ids=tokens())
        assert took[asked:] == [None] * asked
        monkeypatch.setattr(LookaheadState, "level", lambda self, passed, asked=1: 0)  # the guard rests
        served(input_ids=tokens())
    assert len(took) == 2 * asked


def test_asking_that_takes_longer_than_it_saves_rests_and_changes_no_bit(models, monkeypatch):
    """The guard of bytes would let it go on: what is read ahead is right."""
    model = models("olmoe")
    plain = swapped(model, read_ahead=False)
    with plain.sida, torch.no_grad():
        expected = [plain(input_ids=tokens(seed=seed)).logits for seed in range(30)]
    ask, asked = AskedRouter.ask, []

    def slow(self, *arguments):
        asked.append(time.monotonic())
        time.sleep(0.01)
        return ask(self, *arguments)

    monkeypatch.setattr(AskedRouter, "ask", slow)
    served = swapped(model, sida_ext.RouterLookahead(guard=GuardOptions(waste_cost=0.0, idle=10**9)))
    with served.sida, torch.no_grad():
        found = [served(input_ids=tokens(seed=seed)).logits for seed in range(30)]
        assert served.sida.stats().lookahead.worth == "resting"
    assert_same_bits(found, expected)
    assert len(asked) < 30  # of 60
