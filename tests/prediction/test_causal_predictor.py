"""Predictors of decoder-only models: what they know of a model, that no token reads a later one, tables and serving."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

import sida_ext
from bench.causal.tiny_families import FAMILIES
from sida_ext.planning.counting import CHOICES as COUNTED
from sida_ext.prediction.calibration import fit_chosen_temperature, fit_mixture
from sida_ext.prediction.drift import DriftWatch
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import CHOICES, predicted_stack, stack_facts
from sida_ext.prediction.protocol import HashPredictor, PredictorError, TokenTablePredictor, load_predictor
from sida_ext.training.causal_fit import fit_stand_ins, freeze_copies
from sida_ext.training.causal_traces import collect_causal_traces
from sida_ext.training.distill import TrainingOptions, train_predictor
from sida_ext.training.evaluation import evaluate
from sida_ext.training.objective import membership_loss
from sida_ext.training.traces import join_traces
from tests.support.families import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, EXPERTS, LAYERS, CHOSEN = 128, 8, 3, 2
# Routers of several matrices, and layers that choose different numbers of experts: there is no shadow of either.
WITHOUT = {"inkling": "expected the router", "hunyuan_v1_moe": "expected one number"}


@pytest.fixture(scope="module")
def plain():
    model = tiny_model("olmoe")[1]
    with torch.no_grad():  # random experts add so little that later routers could be named without them
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.mul_(15)
    return model


@pytest.fixture(scope="module")
def swapped(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("swapped") / "experts.sida"
    model = sida_ext.swap_experts(copy.deepcopy(plain), expert_memory="40%", expert_dtype="float32", store=path)
    yield model
    model.sida.close()


@pytest.fixture
def model(swapped):
    swapped.sida.predictor = None
    swapped.sida.reset_stats()
    yield swapped
    swapped.sida.predictor = None


def tokens(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def true_choices(model, input_ids, mask=None) -> torch.Tensor:
    """[B, S, layers, choices] of a batch, by its trace; -1 at padding."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    (trace,) = collect_causal_traces(
        model, [{"input_ids": input_ids, "attention_mask": mask, "document": torch.arange(len(input_ids))}]
    )
    found = torch.full((*input_ids.shape, *trace.chosen.shape[1:]), -1)
    found[mask.bool()] = trace.chosen
    return found


class Oracle:
    """Knows the router: runs the model itself."""

    candidates = CHOSEN

    def __init__(self, model) -> None:
        self.model, self.calls = model, []

    def predict(self, input_ids, attention_mask=None, top_k=1) -> HashTable:
        self.calls.append(tuple(input_ids.shape))
        index = true_choices(self.model, input_ids, attention_mask)
        chance = (index >= 0).float()
        return HashTable(index.int(), chance, chance)


def test_the_names_of_the_number_of_choices_are_the_planner_s():
    assert CHOICES == COUNTED


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_facts_and_a_shadow(family):
    _, model = tiny_model(family)
    if family in WITHOUT:
        with pytest.raises(ValueError, match=WITHOUT[family]):
            HashPredictor.for_model(model)
        return
    facts = stack_facts(model, "causal")
    assert predicted_stack(model) == "causal"
    assert len(facts.routers) == len(facts.blocks) == facts.layers
    table = HashPredictor.for_model(model).predict(tokens(2, 5) % 90, top_k=facts.choices)
    assert table.expert_index.shape == (2, 5, facts.layers, facts.choices)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "qwen2_moe"])
def test_an_untrained_shadow_names_the_first_layer_exactly(family):
    # What the first router reads depends on no expert, and the shadow begins as a copy of the model.
    _, model = tiny_model(family)
    facts = stack_facts(model, "causal")
    ids = tokens(3, 8)  # within the windows of the tiny models
    named = HashPredictor.for_model(model).predict(ids, top_k=facts.choices).expert_index[:, :, 0].sort(-1).values
    assert torch.equal(named, true_choices(model, ids)[:, :, 0].sort(-1).values)


def test_no_token_reads_a_later_one(plain):
    predictor = HashPredictor.for_model(plain)
    ids = tokens(2, 12)
    changed = ids.clone()
    changed[:, 7:] = tokens(2, 5, seed=1)
    one, other = predictor(ids), predictor(changed)
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=0, atol=1e-5)
    assert not torch.allclose(one[:, 7:], other[:, 7:], atol=1e-2)
    torch.testing.assert_close(one[:, :5], predictor(ids[:, :5]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_prediction(plain, side):
    predictor = HashPredictor.for_model(plain)
    ids = tokens(1, 6)
    pad = torch.full((1, 4), 1)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = torch.cat(
        [torch.zeros(1, 4), torch.ones(1, 6)] if side == "left" else [torch.ones(1, 6), torch.zeros(1, 4)], 1
    )
    place = slice(4, None) if side == "left" else slice(0, 6)
    table = predictor.predict(padded, mask.long(), top_k=3)
    alone = predictor.predict(ids, top_k=3)
    assert torch.equal(table.expert_index[:, place], alone.expert_index)
    torch.testing.assert_close(table.probability[:, place], alone.probability, rtol=0, atol=1e-5)
    assert int(table.expert_index[mask == 0].max()) == -1
    assert table.padding_need is not None
    assert alone.padding_need is None


def test_a_probability_is_of_being_among_the_chosen(plain):
    predictor = HashPredictor.for_model(plain)
    table = predictor.predict(tokens(2, 9), top_k=EXPERTS)
    first = table.probability[:, :, 0]
    # The middle between the last chosen and the first other: at most so many are above a half, and these are.
    assert ((first > 0.5).sum(-1) == CHOSEN).all()
    assert (table.probability.sum(-1) > 1.0).all()


def test_token_table_counts_every_choice():
    table = TokenTablePredictor(VOCABULARY, 1, 4, "x", backoff=1.0, stack="causal", choices=2)
    ids = torch.tensor([7, 7, 7])
    chosen = torch.tensor([[[0, 1]], [[0, 2]], [[0, 1]]])
    table.update(ids, chosen, torch.full(chosen.shape, 0.5))
    found = table.probabilities(torch.tensor([7]))[0, 0]
    assert math.isclose(float(found.sum()), 2.0, rel_tol=1e-3)
    assert found[0] > 0.9
    assert 0.5 < found[1] < 0.8
    assert 0.2 < found[2] < 0.5
    assert found[3] < 0.1
    with pytest.raises(ValueError, match=r"expected \(1, 3, 1, 2\)"):
        table.update(ids, chosen[..., 0], torch.zeros(3, 1))


def test_temperature_of_choices_is_found():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 1, 6, generator=random) * 2
    wanted = (torch.rand(logits.shape, generator=random) < (logits / 3).sigmoid()).float()
    # The loss takes so many choices a token; tokens of exactly three are kept, whose odds stay those of the logits.
    kept = wanted.sum(-1)[:, 0] == 3
    chosen = wanted[kept].topk(3, dim=-1).indices
    sharp, true = (float(fit_chosen_temperature(logits[kept] * factor, chosen)) for factor in (10.0, 1.0))
    assert math.isclose(sharp, 10 * true, rel_tol=1e-2)
    assert 1 < true < 4


def test_membership_loss_is_least_for_the_true_choice():
    chosen = torch.tensor([[[0, 2]]])
    right = torch.tensor([[[9.0, -9.0, 9.0, -9.0]]])
    assert float(membership_loss(right, chosen)) < 1e-3
    assert float(membership_loss(-right, chosen)) > 10


def test_evaluation_of_an_oracle_and_of_a_table_that_is_wrong(plain):
    ids = tokens(3, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document": torch.arange(3)}
    traces = list(collect_causal_traces(plain, [batch]))
    found = evaluate(Oracle(plain), traces).summary()
    assert found["choices"] == CHOSEN
    assert found["among_k"] == [1.0] * LAYERS
    assert found["mean_top1"] == 1.0
    untrained = evaluate(HashPredictor.for_model(plain), traces).summary()
    assert untrained["among_k"][0] == 1.0
    assert untrained["among_k"][2] < 1.0
    assert all(two >= one for one, two in zip(untrained["among_k"], untrained["among_2k"], strict=True))


def test_a_trace_of_a_swapped_model_is_that_of_the_plain_one(plain, model):
    ids = tokens(2, 10)
    assert torch.equal(true_choices(plain, ids), true_choices(model, ids))


def test_drift_takes_several_choices():
    index = torch.zeros(1, 4, 1, 2, dtype=torch.int32)
    watch = DriftWatch(0.8, window=4)
    watch.observe(HashTable(index, torch.ones(1, 4, 1, 2)), torch.tensor([[[[3, 0]]] * 3 + [[[1, 2]]]]))
    assert watch.rate == 0.75


def test_stream_reads_ahead_and_keeps_the_bits(plain, model):
    batches = [{"input_ids": tokens(2, 6, seed=n), "attention_mask": torch.ones(2, 6).long()} for n in range(4)]
    wanted = [output.logits for output in sida_ext.stream(model, batches)]
    unread = model.sida.stats().misses
    model.sida.reset_stats()
    for predictor in (Oracle(plain), HashPredictor.for_model(plain)):
        found = [output.logits for output in sida_ext.stream(model, batches, predictor)]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert model.sida.stats().misses < unread
        model.sida.reset_stats()


def test_generate_predicts_its_prompt_alone(plain, model):
    ids = tokens(2, 7)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.sida.predictor = oracle = Oracle(plain)
    found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(found, wanted)
    assert oracle.calls == [(2, 7)]
    assert model.sida.current.number == 0


def test_a_prompt_is_announced_before_its_first_layer(plain, model, monkeypatch):
    events = []
    announce, retire = type(model.sida).announce, type(model.sida).retire
    monkeypatch.setattr(type(model.sida), "announce", lambda *a, **k: events.append(dict(a[1])) or announce(*a, **k))
    monkeypatch.setattr(type(model.sida), "retire", lambda *a: events.append("retired") or retire(*a))
    model.sida.predictor = Oracle(plain)
    ids = tokens(1, 9)
    with torch.no_grad():
        model(input_ids=ids)
        model(input_ids=ids[:, :1])
    (named, last) = events
    true = true_choices(plain, ids)
    assert last == "retired"
    assert [set(experts) for experts in named.values()] == [
        set(true[0, :, layer].unique().tolist()) for layer in range(LAYERS)
    ]
    assert list(named) == list(model.sida.header.layers)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_forward_that_fails_leaves_nothing_announced(plain, model, monkeypatch, kind):
    def fail(*_):
        raise kind

    retired = []
    retire = type(model.sida).retire
    monkeypatch.setattr(type(model.sida), "retire", lambda *a: retired.append(a[1]) or retire(*a))
    model.sida.predictor = oracle = Oracle(plain)
    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(kind), torch.no_grad():
        model(input_ids=tokens(1, 4))
    hook.remove()
    assert len(retired) == 1
    assert model.sida.current.number == 0
    with torch.no_grad():
        model(input_ids=tokens(1, 4))  # is predicted as if nothing had been
    assert len(oracle.calls) == len(retired) == 2


def letters(text: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
    return {"input_ids": [3 + ord(letter) % 100 for letter in text][:max_length]}


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory):
    random = torch.Generator().manual_seed(0)
    texts = ["".join(chr(97 + n) for n in torch.randint(0, 12, (20,), generator=random).tolist()) for _ in range(120)]
    out = tmp_path_factory.mktemp("trained")
    options = TrainingOptions(epochs=6, validation=0.1, held_out=0.2, warmup=5, learning_rate=3e-3)
    return train_predictor(plain, letters, texts, out, options, progress=False), out


def test_training_beats_the_token_table_and_reports_coverage(trained):
    predictor, out = trained
    held_out = json.loads((out / "report.json").read_text())["held_out"]
    ours, table = held_out["predictor"], held_out["token_table"]
    assert ours["choices"] == CHOSEN
    assert len(ours["among_k"]) == LAYERS
    assert 1 - ours["mean_among_k"] < 0.7 * (1 - table["mean_among_k"])
    assert ours["mean_ece"] < 0.1
    assert predictor.held_out_top1 == ours["mean_top1"]


def test_a_trained_predictor_is_read_again_and_refused_elsewhere(trained, plain):
    predictor, out = trained
    again = load_predictor(out, plain)
    ids = tokens(2, 8)
    one, other = predictor.predict(ids, top_k=4), again.predict(ids, top_k=4)
    assert torch.equal(one.expert_index, other.expert_index)
    assert torch.equal(one.probability, other.probability)
    table = load_predictor(out / "token_table", plain)
    assert isinstance(table, TokenTablePredictor)
    assert table.choices == CHOSEN
    assert table.stack == "causal"
    _, foreign = tiny_model("olmoe", seed=1)
    for path in (out, out / "token_table"):
        with pytest.raises(PredictorError, match="fingerprint"):
            load_predictor(path, foreign)


def test_a_joined_predictor_is_no_worse_than_either(trained, plain):
    predictor, out = trained
    assert predictor.table is not None
    assert predictor.mixture.shape == (LAYERS, 3)
    again = load_predictor(out, plain)
    assert torch.equal(again.mixture, predictor.mixture)
    random = torch.Generator().manual_seed(7)
    ids = 3 + (97 + torch.randint(0, 12, (40, 20), generator=random)) % 100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document": torch.arange(40)}
    traces = list(collect_causal_traces(plain, [batch]))
    joined = evaluate(again, traces).summary()["mean_among_k"]
    table = evaluate(load_predictor(out / "token_table", plain), traces).summary()["mean_among_k"]
    again.table = None
    alone = evaluate(again, traces).summary()["mean_among_k"]
    assert joined > table + 0.02
    assert joined > alone - 0.01


def test_a_mixture_finds_the_weights_that_made_it():
    random = torch.Generator().manual_seed(0)
    features = torch.cat([torch.randn(20_000, 2, generator=random), torch.ones(20_000, 1)], 1)
    wanted = torch.tensor([1.5, -0.5, 0.25])
    happened = torch.rand(20_000, generator=random) < (features @ wanted).sigmoid()
    torch.testing.assert_close(fit_mixture(features, happened), wanted, rtol=0, atol=0.08)
    # What is told apart wholly by the first feature has no best weight: the ridge keeps it finite.
    assert fit_mixture(features, features[:, 0] > 0).isfinite().all()


def test_a_right_copy_is_not_trained(plain):
    ids = tokens(6, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document": torch.arange(6)}
    traces = list(collect_causal_traces(plain, [batch]))
    predictor = HashPredictor.for_model(plain)
    assert freeze_copies(predictor, lambda: iter(traces))
    trained = {name for name, weight in predictor.named_parameters() if weight.requires_grad}
    assert trained
    assert all(any(part in name for part in ("inner", "out.weight", "sharpness", "offset")) for name in trained)
    assert not any("attention" in name for name in trained)
    wrong = HashPredictor.for_model(plain)
    with torch.no_grad():
        wrong.net.attention[0].q.weight.mul_(-3)
        wrong.net.feed_forward[0].router.weight.mul_(-1)
    assert not freeze_copies(wrong, lambda: iter(traces))
    assert all(weight.requires_grad for weight in wrong.parameters())


def test_variants_are_refused_for_the_wrong_stack(plain):
    with pytest.raises(ValueError, match="expected 'causal'"):
        HashPredictor.for_model(plain, "shadow")


def test_a_layer_that_runs_twice_is_not_traced(plain):
    model = copy.deepcopy(plain)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    ids = tokens(1, 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document": torch.zeros(1)}
    with pytest.raises(ValueError, match="expected once for each"):
        join_traces(list(collect_causal_traces(model, [batch])))


def test_stand_ins_are_fitted_to_what_the_experts_add(plain):
    ids = tokens(24, 20)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document": torch.arange(24)}
    traces = list(collect_causal_traces(plain, [batch]))
    fitted, untrained = HashPredictor.for_model(plain), HashPredictor.for_model(plain)
    assert fit_stand_ins(fitted, plain, lambda: iter(traces))
    one, other = (evaluate(each, traces).summary()["among_k"] for each in (fitted, untrained))
    assert one[0] == other[0] == 1.0
    assert one[1] > other[1] + 0.1
    assert one[2] > other[2] + 0.1
    narrow = HashPredictor.for_model(plain, hidden=16)
    assert not fit_stand_ins(narrow, plain, lambda: iter(traces))
