"""Steps of decoder-only models: what is learned, the state that follows the cache, the same bits, and the guard."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import sida_ext
from sida_ext import DecoderPredictor
from sida_ext.models.causal_steps import WATCHED
from sida_ext.prediction.drift import DriftWarning, DriftWatch
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.learned_steps import (
    DISTANCES,
    FADING,
    JOINED,
    KNOWLEDGE,
    LearnedSteps,
    StepState,
    needed,
    odds_of_table,
)
from sida_ext.prediction.lookahead_guard import GuardOptions, LookaheadGuard
from sida_ext.prediction.protocol import HashPredictor, PredictorError, TokenTablePredictor, load_predictor
from sida_ext.prediction.router_asking import AskedRouter
from sida_ext.training.causal_traces import collect_causal_traces
from sida_ext.training.step_fit import fit_steps, judge_steps, trace_steps
from tests.support.decoders import Random, cached
from tests.support.families import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, EXPERTS, LAYERS, CHOSEN = 128, 8, 3, 2
NEVER_OFF = GuardOptions(waste_cost=0.0, idle=10**9, window=4)
GENERATE = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.fixture(scope="module")
def plain():
    model = tiny_model("olmoe")[1]
    with torch.no_grad():  # random experts add so little that later routers could be named without them
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.mul_(15)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def served(plain, predictor=None, **options):
    options = {"expert_memory": "40%", "expert_dtype": "float32", **options}
    return sida_ext.swap_experts(copy.deepcopy(plain), predictor=predictor, **options)


@pytest.fixture
def model(plain):
    model = served(plain)
    yield model
    model.sida.close()


@pytest.fixture
def steady(model):
    """Its guard never rests, which would go by the time that reads take: every step is predicted."""
    never = GuardOptions(idle=10**9, window=10**9)
    model.sida.ahead.guard = LookaheadGuard(LAYERS, model.sida.header.record_bytes, never)
    return model


def tokens(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def true_choices(model, ids) -> torch.Tensor:
    """[B, S, layers, choices]."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document": torch.arange(len(ids))}
    (trace,) = collect_causal_traces(model, [batch])
    return trace.chosen.unflatten(0, tuple(ids.shape))


def traced(model, rows=24, columns=20, seed=0):
    ids = tokens(rows, columns, seed)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document": torch.arange(rows)}
    return list(collect_causal_traces(model, [batch]))


@pytest.fixture(scope="module")
def table(plain):
    table = TokenTablePredictor.for_model(plain)
    for trace in traced(plain, 60):
        table.update(trace.input_ids, trace.chosen, trace.weights)
    return table


def drawn(table, seed=0) -> LearnedSteps:
    """Weights of no sense."""
    random = torch.Generator().manual_seed(seed)
    shapes = (LAYERS, KNOWLEDGE), (LAYERS, DISTANCES, JOINED)
    return LearnedSteps(table, *(torch.randn(shape, generator=random) for shape in shapes))


class Recorder(LearnedSteps):
    """Keeps what it says, and for which tokens."""

    def __init__(self, like: LearnedSteps) -> None:
        super().__init__(like.table, like.weights, like.joined, like.held_out_top1)
        self.told_odds: list[tuple[torch.Tensor, torch.Tensor]] = []

    def odds(self, state, input_ids):
        answer = super().odds(state, input_ids)
        self.told_odds.append((input_ids.clone(), answer))
        return answer


def afresh(learned, plain, ids) -> torch.Tensor:
    """Log odds of the last token of ids [B, n], by a predictor that was told of all tokens before it."""
    state = learned.start(torch.zeros(len(ids), 0, 0), None)
    state = learned.observe(state, true_choices(plain, ids)[:, :-1])
    return LearnedSteps.odds(learned, state, ids[:, -1:])


def test_odds_are_the_regression_of_what_is_known(table):
    learned = drawn(table)
    assert isinstance(learned, DecoderPredictor)
    state = learned.start(torch.zeros(1, 0, 0), None)
    torch.testing.assert_close(state.faded[0, 0], table.probabilities(torch.tensor([VOCABULARY]))[0])
    chosen = torch.tensor([[[[0, 1], [2, 3], [4, 5]]]])
    state = learned.observe(state, chosen)
    found = learned.odds(state, torch.tensor([[7]]))[0]
    hot = torch.zeros(LAYERS, EXPERTS).scatter_(1, chosen[0, 0], 1.0)
    marginal = table.marginal
    wanted = learned.weights[:, 0, None] * table.probabilities(torch.tensor([7]))[0].clamp(1e-4, 1 - 1e-4).logit()
    wanted = wanted + learned.weights[:, 1, None] * hot + learned.weights[:, 4, None]
    for at, rest in enumerate(FADING):
        faded = rest * marginal + (1 - rest) * hot
        wanted = wanted + learned.weights[:, 2 + at, None] * faded.clamp(1e-4, 1 - 1e-4).logit()
    torch.testing.assert_close(found, wanted)
    assert torch.equal(
        learned.step(state, torch.tensor([[7]]))[0].expert_index[0, 0, :, 0], found.argmax(-1).to(torch.int64)
    )


def test_tokens_told_at_once_are_those_told_one_by_one(table):
    learned = drawn(table)
    chosen = torch.rand(2, 9, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(1)).topk(CHOSEN).indices
    chosen[0, :4] = -1  # padding on the left tells nothing
    together = learned.observe(learned.start(torch.zeros(2, 0, 0), None), chosen)
    for row, first in ((0, 4), (1, 0)):
        state = learned.start(torch.zeros(1, 0, 0), None)
        for at in range(first, 9):
            state = learned.observe(state, chosen[row : row + 1, at : at + 1])
        torch.testing.assert_close(together.last[row : row + 1], state.last)
        torch.testing.assert_close(together.faded[:, row : row + 1], state.faded)
    again = learned.reorder(together, torch.tensor([1, 1, 0]))
    assert torch.equal(again.last[0], together.last[1])
    assert torch.equal(again.faded[:, 2], together.faded[:, 0])
    nothing = learned.observe(together, torch.full((2, 3, LAYERS, CHOSEN), -1))
    assert torch.equal(nothing.last, together.last)
    assert torch.equal(nothing.faded, together.faded)


def test_experts_are_needed_by_any_token():
    odds = torch.tensor([[2.0, -3.0, 0.5]])
    assert needed(odds, 0.5) == [0, 2]
    assert needed(odds, 0.0) == [0, 2, 1]
    assert needed(torch.tensor([[-0.1, -3.0], [-0.1, -3.0]]), 0.5) == [0]  # 1 - 0.525 ** 2
    named = odds_of_table(HashTable(torch.tensor([[[[1, -1]]]]), torch.tensor([[[[0.5, 0.0]]]])), 3)
    assert needed(named[:, 0], 0.0) == [1]


def test_what_is_learned_is_no_worse_than_its_parts(plain, table):
    learned = fit_steps(table, trace_steps(plain, lambda: iter(traced(plain, 60, seed=1))))
    found = judge_steps(learned, trace_steps(plain, lambda: iter(traced(plain, 60, seed=2))))
    assert found["tokens"] == 1200
    assert found["steps"]["mean_among_k"] > found["token table"]["mean_among_k"] - 0.005
    assert found["token table"]["mean_among_k"] > found["last"]["mean_among_k"]
    gained = []
    for distance in (1, 2):
        parts = [found[f"{way} {distance}"]["mean_among_k"] for way in ("lookahead", "steps")]
        assert found[f"joined {distance}"]["mean_among_k"] > max(parts) - 0.005
        assert found[f"joined {distance}"]["ece"] < 0.04
        gained.append(found[f"joined {distance}"]["mean_among_k"] - max(parts))
    assert max(gained) > 0.01
    assert "joined 3" not in found  # three layers
    assert torch.equal(learned.joined[0], torch.tensor([[1.0, 0, 0]]).expand(DISTANCES, -1))  # nobody asks before it
    assert trace_steps(plain, lambda: iter(traced(plain)), tokens=50).tokens == 50


def test_a_file_of_before_has_no_steps_and_a_new_one_the_same(plain, table, tmp_path):
    predictor = HashPredictor.for_model(plain)
    predictor.table = table
    predictor.save_pretrained(tmp_path / "before")
    assert load_predictor(tmp_path / "before", plain).steps is None
    predictor.steps = drawn(table)
    predictor.steps.held_out_top1 = 0.75
    predictor.save_pretrained(tmp_path / "new")
    again = load_predictor(tmp_path / "new", plain).steps
    assert torch.equal(again.weights, predictor.steps.weights)
    assert torch.equal(again.joined, predictor.steps.joined)
    assert again.held_out_top1 == 0.75
    state = again.start(torch.zeros(2, 0, 0), None)
    assert torch.equal(again.odds(state, tokens(2, 1)), predictor.steps.odds(state, tokens(2, 1)))
    with pytest.raises(PredictorError, match="fingerprint"):
        load_predictor(tmp_path / "new", tiny_model("olmoe", seed=1)[1])


@pytest.mark.parametrize("mode", GENERATE)
def test_bits_do_not_depend_on_the_predictor_or_the_budget(plain, table, mode):
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, **GENERATE[mode]}

    def written(model, seed):
        torch.manual_seed(seed)
        return model.generate(tokens(2, 6, seed), **options)

    with_nobody = served(plain)
    with with_nobody.sida:
        expected = [written(with_nobody, seed) for seed in range(2)]
    asked = served(plain, sida_ext.RouterLookahead(guard=NEVER_OFF))
    alone = served(plain)
    alone.sida.predictor = None
    draw = torch.Generator().manual_seed(len(mode))
    with asked.sida, alone.sida:
        for seed in range(2):
            for model in (asked, alone):
                for predictor in (drawn(table, seed), Random(seed, LAYERS)):
                    slots = int(torch.randint(1, LAYERS * EXPERTS + 1, (), generator=draw))
                    model.sida.set_budget(slots * model.sida.header.record_bytes)
                    model.sida.decoder_predictor = predictor
                    actual = written(model, seed)
                    assert torch.equal(actual.sequences, expected[seed].sequences), (type(predictor), seed, slots)
                    assert all(map(torch.equal, actual.logits, expected[seed].logits)), (type(predictor), seed, slots)


def test_state_follows_the_beams(plain, table, steady):
    """What was predicted for each beam is what is known of that beam's own tokens."""
    steady.sida.decoder_predictor = recorder = Recorder(drawn(table))
    history: list[torch.Tensor] = []

    def watch(input_ids, scores):
        history.append(input_ids.clone())
        return scores

    processors = transformers.LogitsProcessorList([watch])
    steady.generate(tokens(2, 5), num_beams=3, max_new_tokens=8, logits_processor=processors)
    assert len(recorder.told_odds) == len(history) - 1 == 7  # the prompt is not a step
    crossed = False
    for before, ids, (given, odds) in zip(history[:-1], history[1:], recorder.told_odds, strict=True):
        assert torch.equal(given, ids[:, -1:])
        torch.testing.assert_close(odds, afresh(recorder, plain, ids), rtol=1e-4, atol=1e-4)
        crossed |= not torch.equal(ids[:, :-1], before)
    assert crossed, "no beam was ever copied or dropped; the test shows nothing"


def test_state_follows_tokens_that_are_taken_back_and_copies(plain, table, steady):
    steady.sida.decoder_predictor = recorder = Recorder(drawn(table))
    ids, cache = tokens(1, 12), DynamicCache()
    with torch.no_grad():

        def run(span, cache):
            steady(input_ids=span, **cached(steady, cache))

        run(ids[:, :5], cache)
        for at in (5, 6, 7):
            run(ids[:, at : at + 1], cache)
        twin = copy.deepcopy(cache)
        cache.crop(-2)
        kept = torch.cat([ids[:, :6], ids[:, 9:10]], dim=1)
        run(ids[:, 9:10], cache)
        torch.testing.assert_close(recorder.told_odds[-1][1], afresh(recorder, plain, kept), rtol=1e-4, atol=1e-4)
        twin.crop(-1)
        run(ids[:, 8:9], twin)
        other = torch.cat([ids[:, :7], ids[:, 8:9]], dim=1)
        torch.testing.assert_close(recorder.told_odds[-1][1], afresh(recorder, plain, other), rtol=1e-4, atol=1e-4)
        run(ids[:, 10:12], cache)  # candidates: each judged by what came before the step
        state = recorder.observe(recorder.start(torch.zeros(1, 0, 0), None), true_choices(plain, kept))
        wanted = LearnedSteps.odds(recorder, state, ids[:, 10:12])
        torch.testing.assert_close(recorder.told_odds[-1][1], wanted, rtol=1e-4, atol=1e-4)


def test_what_was_chosen_moves_with_the_rows(plain, table, steady):
    """Beams change places, and then tokens are taken back: the state is made again of the right rows."""
    steady.sida.decoder_predictor = recorder = Recorder(drawn(table))
    ids, cache = tokens(2, 8), DynamicCache()
    with torch.no_grad():
        steady(input_ids=ids[:, :6], **cached(steady, cache))
        steady(input_ids=ids[:, 6:7], **cached(steady, cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-1)
        steady(input_ids=ids.flip(0)[:, 7:], **cached(steady, cache))
    kept = torch.cat([ids.flip(0)[:, :6], ids.flip(0)[:, 7:]], dim=1)
    torch.testing.assert_close(recorder.told_odds[-1][1], afresh(recorder, plain, kept), rtol=1e-4, atol=1e-4)


def test_prompt_lookup_and_a_left_padded_prompt_give_the_same_tokens(table, model):
    ids = tokens(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = (padded > 0).long()
    alone = {"max_new_tokens": 8, "do_sample": False}
    expected = [
        model.generate(ids[:1], prompt_lookup_num_tokens=3, **alone),
        model.generate(padded, attention_mask=mask, **alone),
    ]
    model.sida.decoder_predictor = recorder = Recorder(drawn(table))
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=3, **alone), expected[0])
    recorder.told_odds.clear()
    model.sida.ahead.guard._enter(1, "open")  # what is drawn has been read in vain meanwhile
    assert torch.equal(model.generate(padded, attention_mask=mask, **alone), expected[1])
    given, odds = recorder.told_odds[0]
    state = recorder.observe(recorder.start(torch.zeros(2, 0, 0), None), true_choices(model, ids))
    torch.testing.assert_close(odds, LearnedSteps.odds(recorder, state, given), rtol=1e-4, atol=1e-4)


def test_a_step_is_announced_before_its_first_layer_and_is_over_with_it(table, model, monkeypatch):
    events = []
    announce, retire = type(model.sida).announce, type(model.sida).retire

    def note(runtime, wanted, **options):
        number = announce(runtime, wanted, **options)
        events.append((number, dict(wanted), options))
        return number

    gone = []
    monkeypatch.setattr(type(model.sida), "announce", note)
    monkeypatch.setattr(
        type(model.sida), "retire", lambda runtime, number: gone.append(number) or retire(runtime, number)
    )
    learned = LearnedSteps.untrained(table)
    model.sida.predictor = HashPredictor.for_model(model)
    model.sida.predictor.steps = learned
    ids, cache = tokens(1, 5), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, **cached(model, cache))
        model.sida.reset_stats()
        prompts = len(events)
        assert prompts == 1  # of the whole prompt, by the network
        model(input_ids=ids[:, :1], **cached(model, cache))
        _, wanted, options = events[prompts]
        least = model.sida.ahead.least
        odds = learned.odds(learned.start(torch.zeros(1, 0, 0), None), ids[:, :1])
        assert options == {}
        assert list(wanted) == [model.sida.header.layers[0]]
        assert set(wanted[model.sida.header.layers[0]]) <= set(needed(odds[:, 0], 0.01))
        assert all(options == {"begin": False} for _, _, options in events[prompts + 1 :])
        assert sorted(gone) == sorted(number for number, _, _ in events)
        assert 0 < least < 1
        for kind in (ZeroDivisionError, KeyboardInterrupt):

            def fail(*_, kind=kind):
                raise kind

            hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
            with pytest.raises(kind):
                model(input_ids=ids[:, :1], **cached(model, cache))
            hook.remove()
            assert sorted(gone) == sorted(number for number, _, _ in events)
            assert model.sida.current.number == 0


def test_what_routers_say_ahead_joins_what_was_known(plain, table, monkeypatch):
    model = served(plain, sida_ext.RouterLookahead(2, guard=NEVER_OFF), expert_memory="100%")
    margins, announced = {}, []
    margin, announce = AskedRouter.margin, type(model.sida).announce

    def note(router, hidden, normalised, experts):
        margins[router.experts] = margin(router, hidden, normalised, experts)
        return margins[router.experts]

    monkeypatch.setattr(AskedRouter, "margin", note)
    monkeypatch.setattr(
        type(model.sida),
        "announce",
        lambda runtime, wanted, **o: announced.append(wanted) or announce(runtime, wanted, **o),
    )
    weighed = torch.tensor([0.2, 3.0, -0.1]).expand(LAYERS, DISTANCES, JOINED)
    model.sida.decoder_predictor = recorder = Recorder(LearnedSteps(table, drawn(table).weights, weighed))
    with model.sida, torch.no_grad():
        model(input_ids=tokens(1, 1), **cached(model, DynamicCache()))
    ((_, odds),) = recorder.told_odds
    names = model.sida.header.layers
    assert [list(wanted) for wanted in announced] == [[names[0]], [names[1]], [names[2]]]
    assert announced[0][names[0]] == needed(odds[:, 0], 0.0)
    for layer in (1, 2):
        joined = recorder.joined_odds(odds[:, layer], layer, 1, margins[names[layer]])
        assert announced[layer][names[layer]] == needed(joined, 0.0)[: model.sida.slots - CHOSEN]
        assert needed(joined, 0.0) != needed(odds[:, layer], 0.0)
    # As the router's own forward has it: positive for what it would choose.
    chosen = true_choices(plain, tokens(1, 1))[0, 0, 1]
    assert int((margins[names[1]] > 0).sum()) == len(chosen) == CHOSEN


class Oracle:
    """Knows the next tokens' experts: runs the model itself."""

    min_need = 0.5

    def __init__(self, model) -> None:
        self.model = model

    def start(self, encoder_output, attention_mask):
        return torch.zeros(encoder_output.shape[0], 0, dtype=torch.int64)

    def step(self, state, input_ids):
        whole = torch.cat([state, input_ids], dim=1)
        index = true_choices(self.model, whole)[:, -input_ids.shape[1] :]
        return HashTable(index.int(), torch.ones(index.shape)), whole

    def reorder(self, state, index):
        return state.index_select(0, index)


def test_what_is_predicted_is_read_ahead(plain, model):
    """A predictor of one's own, from a cache that is empty, so that it knows all tokens."""
    ids = tokens(1, 30)

    def run():
        cache = DynamicCache()
        with torch.no_grad():
            for at in range(ids.shape[1]):
                model(input_ids=ids[:, at : at + 1], **cached(model, cache))
        return model.sida.stats()

    missed = run().misses
    model.sida.reset_stats()
    model.sida.decoder_predictor = Oracle(plain)
    found = run()
    assert found.misses < missed
    assert found.useful_prefetches > 0
    assert set(found.lookahead.recall.values()) == {1.0}
    assert found.lookahead.depth == LAYERS


def test_steps_reach_further_than_the_routers_that_are_asked(plain):
    """RouterLookahead(1) asks the next layer's router alone; what a predictor says may be announced of all that
    follow, as far as the guard goes."""
    ids = tokens(1, 30)
    found = {}
    for name in ("routers alone", "steps too"):
        model = served(plain, sida_ext.RouterLookahead(1), expert_memory="70%")
        with model.sida:
            if name == "steps too":
                model.sida.decoder_predictor = Oracle(plain)
            cache = DynamicCache()
            with torch.no_grad():
                for at in range(ids.shape[1]):
                    model(input_ids=ids[:, at : at + 1], **cached(model, cache))
            found[name] = model.sida.stats().lookahead
    assert found["routers alone"].depth <= 1
    assert found["steps too"].depth == LAYERS


def test_while_the_guard_rests_nobody_predicts(table, model):
    model.sida.decoder_predictor = recorder = Recorder(drawn(table))
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=tokens(1, 4), **cached(model, cache))
        model(input_ids=tokens(1, 1), **cached(model, cache))
        guard = model.sida.ahead.guard
        guard._rest_until(float("inf"))
        for seed in (1, 2):
            model(input_ids=tokens(1, 1, seed), **cached(model, cache))
        assert len(recorder.told_odds) == 1
        guard._enter(1, "probing")
        model(input_ids=tokens(1, 1, 3), **cached(model, cache))
    assert len(recorder.told_odds) == 2
    ids = torch.cat([tokens(1, 4), *(tokens(1, 1, seed) for seed in range(4))], dim=1)
    # What ran meanwhile was taken in.
    torch.testing.assert_close(recorder.told_odds[-1][1], afresh(recorder, model, ids), rtol=1e-4, atol=1e-4)


def test_drift_is_watched(table, model):
    learned = LearnedSteps.untrained(table)
    learned.held_out_top1 = 1.0
    model.sida.decoder_predictor = learned
    model.sida.step_drift = (learned, DriftWatch(1.0, tolerance=0.0, window=4))
    cache = DynamicCache()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        for at in range(3 * WATCHED):  # of four tokens that are looked at
            model(input_ids=tokens(1, 1, at), **cached(model, cache))
        with pytest.raises(DriftWarning, match=r"its report says 100\.0%"):
            model(input_ids=tokens(1, 1), **cached(model, cache))


def test_another_models_predictor_is_refused(table, model):
    small = TokenTablePredictor(VOCABULARY, LAYERS - 1, EXPERTS, "x", stack="causal", choices=CHOSEN)
    model.sida.decoder_predictor = LearnedSteps.untrained(small)
    cache = DynamicCache()
    with torch.no_grad(), pytest.raises(PredictorError, match="are of 2 layers of 8 experts, expected this model's 3"):
        model(input_ids=tokens(1, 1), **cached(model, cache))
    with pytest.raises(ValueError, match="expected one of a decoder-only model"):
        LearnedSteps.untrained(TokenTablePredictor(VOCABULARY, LAYERS, EXPERTS, "x"))
    with pytest.raises(ValueError, match=r"weights is .* expected finite numbers \(3, 5\)"):
        LearnedSteps(table, torch.zeros(LAYERS, 2), torch.zeros(LAYERS, DISTANCES, JOINED))
    with pytest.raises(ValueError, match="the state is of 2 rows"):
        LearnedSteps.untrained(table).odds(
            StepState(torch.zeros(2, LAYERS, EXPERTS), torch.zeros(2, 2, LAYERS, EXPERTS)), tokens(1, 1)
        )
