"""Training a predictor: traces, the distillation loss, calibration, splits, resuming, the report."""

from __future__ import annotations

import itertools
import json
import os
import signal
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

from sida_ext.prediction.calibration import Reliability, fit_temperature
from sida_ext.prediction.drift import DriftWarning, DriftWatch
from sida_ext.prediction.protocol import HashPredictor, HashTable, TokenTablePredictor, load_predictor
from sida_ext.training import traces as traces_module
from sida_ext.training import trainer as trainer_module
from sida_ext.training.distill import (
    TrainingOptions,
    collect_traces,
    tokenized_batches,
    train_predictor,
    truncated_distillation,
)
from sida_ext.training.evaluation import evaluate
from sida_ext.training.split import HELD_OUT, TRAIN, VALIDATION, split_of
from sida_ext.training.traces import TraceStore, join_traces

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, EXPERTS, LAYERS = 40, 5, 2
QUICK = TrainingOptions(epochs=3, batch_sentences=16, validation=0.1, held_out=0.2, warmup=5)


def small_model(seed: int = 0) -> SwitchTransformersEncoderModel:
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=4, num_heads=2, num_experts=EXPERTS,
        num_sparse_encoder_layers=LAYERS, num_decoder_layers=2, is_encoder_decoder=False,
    )  # fmt: skip
    return SwitchTransformersEncoderModel(config).eval()


@pytest.fixture(scope="module")
def model() -> SwitchTransformersEncoderModel:
    return small_model()


def tokenizer(text: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % VOCABULARY for letter in text][:max_length]}


def some_texts(number: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (number,), generator=generator).tolist()
    return ["".join(chr(97 + n) for n in torch.randint(0, 26, (k,), generator=generator).tolist()) for k in lengths]


def traced(model, number: int = 40, seed: int = 0):
    return join_traces(list(collect_traces(model, tokenized_batches(tokenizer, some_texts(number, seed)))))


class Oracle:
    """Knows the router: runs the model itself."""

    def __init__(self, model) -> None:
        self.model = model

    def predict(self, input_ids, attention_mask=None, top_k=1) -> HashTable:
        output = self.model.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_router_logits=True
        ).router_logits
        gate, index = torch.stack(output, dim=2).detach().softmax(-1).topk(top_k)
        padding = (attention_mask == 0)[:, :, None, None]
        return HashTable(index.masked_fill(padding, -1), gate.masked_fill(padding, 0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_traces_are_the_routers_own_words(model, side):
    input_ids = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    batch = {"input_ids": input_ids, "attention_mask": mask, "document": torch.tensor([5, 6, 7])}
    (trace,) = collect_traces(model, [batch], keep=4)
    recorded = []
    routers = [block.layer[-1].mlp.router for block in model.encoder.block if block.layer[-1].is_sparse]
    hooks = [r.register_forward_hook(lambda _, __, out: recorded.append(out)) for r in routers]
    with torch.no_grad():
        model(input_ids=input_ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    real = mask.bool()
    assert trace.input_ids.tolist() == input_ids[real].tolist()
    assert trace.length.tolist() == [7, 2, 4]
    assert trace.document.tolist() == [5, 6, 7]
    for layer, (expert_mask, gate, logits) in enumerate(recorded):
        assert torch.equal(trace.top1[:, layer], expert_mask.argmax(-1)[real])
        torch.testing.assert_close(trace.gate[:, layer], gate[real][:, 0])
        best = logits[real].topk(4).values
        torch.testing.assert_close(trace.logits[:, layer].float(), best - best[:, :1], atol=2e-3, rtol=2e-3)
    ids, padded = trace.select(torch.tensor([2, 1])).padded()
    assert ids[padded].tolist() == input_ids[real].split([7, 2, 4])[2].tolist() + input_ids[1][real[1]].tolist()


def test_tracing_leaves_the_models_mode_as_it_was_and_is_deterministic():
    model = small_model().train()
    batch = {"input_ids": torch.arange(8)[None]}
    first, second = (next(collect_traces(model, [batch])) for _ in range(2))
    assert model.encoder.training
    assert torch.equal(first.gate, second.gate)


def test_a_model_that_gives_nan_cannot_be_traced():
    model = small_model()
    model.encoder.block[0].layer[0].SelfAttention.o.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="router logits hold NaN or inf"):
        next(collect_traces(model, [{"input_ids": torch.arange(4)[None]}]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 9))
def test_truncated_distillation_is_its_definition(seed, truncation, experts):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 2, experts, generator=generator, dtype=torch.float64).float()
    value, index = teacher.topk(min(experts, 5))
    expected = []
    for token in range(3):
        for layer in range(2):
            chosen = teacher[token, layer].argsort(descending=True)[: min(truncation, value.shape[-1])]
            p, q = (t[token, layer][chosen].double().exp() for t in (teacher, student))
            expected.append(float((p / p.sum() - q / q.sum()).abs().sum()))
    found = truncated_distillation(student, value, index, truncation)
    assert float(found) == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert float(truncated_distillation(teacher, value, index, truncation)) == pytest.approx(0, abs=1e-6)


def test_options_are_checked():
    for name, value in (("truncation", 0), ("truncation", 31), ("epochs", 0), ("held_out", 0.99), ("seconds", 0.0)):
        with pytest.raises(ValueError, match=name):
            TrainingOptions(**{name: value})


def test_temperature_undoes_overconfidence():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 2, 6, generator=generator) * 2
    label = torch.distributions.Categorical(logits=logits).sample()
    for factor in (torch.tensor([3.0, 0.5]), torch.tensor([0.002, 40.0])):
        found = fit_temperature(logits * factor[:, None], label)
        torch.testing.assert_close(found, factor, rtol=0.1, atol=0)


def test_calibration_error_is_the_gap_weighted_by_count():
    bins = Reliability.empty(10)
    bins.add(torch.tensor([0.95, 0.95, 0.95, 0.95, 1.0, 0.15]), torch.tensor([True, True, False, False, True, False]))
    assert bins.ece == pytest.approx((abs(4 * 0.95 + 1.0 - 3) + 0.15) / 6, abs=1e-6)
    assert [point["count"] for point in bins.curve()] == [1, 5]


def test_the_split_is_by_document_and_near_its_shares():
    document = torch.arange(4000).repeat_interleave(2)
    part = split_of(document, replace(QUICK, seed=3))
    assert torch.equal(part[::2], part[1::2])
    shares = [float((part == each).float().mean()) for each in (TRAIN, VALIDATION, HELD_OUT)]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    assert not torch.equal(part, split_of(document, replace(QUICK, seed=4)))
    assert split_of(torch.tensor([-1, -2]), QUICK).tolist() == [HELD_OUT] * 2


def test_an_oracle_scores_one_and_its_gate_is_right(model):
    trace = traced(model)
    summary = evaluate(Oracle(model), [trace]).summary()
    assert summary["top1"] == summary["top3"] == [1.0] * LAYERS
    assert max(summary["gate_error"]) < 1e-5
    assert summary["tokens"] == trace.input_ids.numel()


def test_evaluation_counts_by_hand(model):
    trace = traced(model)
    table = TokenTablePredictor.for_model(model)
    table.update(trace.input_ids, (trace.top1 + 1) % EXPERTS, trace.gate)
    summary = evaluate(table, [trace]).summary()
    named = table.predict(trace.input_ids[:, None], top_k=3).expert_index[:, 0].long()
    hits = named == trace.top1[..., None]
    assert summary["top1"] == pytest.approx(hits[..., 0].double().mean(0).tolist())
    assert summary["top3"] == pytest.approx(hits.any(-1).double().mean(0).tolist())


def test_sentences_of_a_document_stay_together_and_empty_ones_are_skipped():
    batches = list(tokenized_batches(tokenizer, ["abc", ["de", "  ", "fghij"], ""], sentences=2))
    assert sorted(n for b in batches for n in b["document"].tolist()) == [0, 1, 1]
    assert sorted(n for b in batches for n in b["attention_mask"].sum(1).tolist()) == [2, 3, 5]
    with pytest.raises(TypeError, match="document 0 holds a int"):
        list(tokenized_batches(tokenizer, [[3]]))


def test_training_beats_the_token_table_and_writes_a_whole_folder(model, tmp_path):
    texts = some_texts(600)
    predictor = train_predictor(model, tokenizer, texts, tmp_path, QUICK, progress=False)
    report = json.loads((tmp_path / "report.json").read_text())
    held_out = report["held_out"]
    assert held_out["predictor"]["mean_top1"] > held_out["token_table"]["mean_top1"] + 0.05
    assert held_out["predictor"]["tokens"] == report["tokens"]["held_out"]
    assert sum(report["tokens"].values()) == sum(map(len, texts))
    curve = report["confident"]
    assert curve[0]["by_table"] == 1
    assert curve[0]["demanded"] == 0
    assert curve[-1]["by_table"] == curve[-1]["output_error"] == curve[-1]["transfers_saved"] == 0
    assert all(a["by_table"] >= b["by_table"] for a, b in itertools.pairwise(curve))
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "predictor.safetensors", "report.json", "report.png", "token_table",
    ]  # fmt: skip
    loaded = load_predictor(tmp_path, model)
    assert loaded.held_out_top1 == held_out["predictor"]["mean_top1"]
    input_ids = torch.arange(10)[None]
    assert torch.equal(loaded(input_ids), predictor(input_ids))
    load_predictor(tmp_path / "token_table", model)


def weights_of(predictor: HashPredictor) -> torch.Tensor:
    return torch.cat([p.flatten() for p in predictor.parameters()])


@pytest.mark.parametrize("stop_at", [3, 30, 31])
def test_training_stopped_by_ctrl_c_goes_on_as_if_it_had_not(model, tmp_path, monkeypatch, stop_at):
    texts = some_texts(500)
    monkeypatch.setattr(traces_module, "SHARD_TOKENS", 900)
    whole = train_predictor(model, tokenizer, texts, tmp_path / "whole", QUICK, progress=False)
    learn, steps = trainer_module.Trainer._learn, []

    def interrupted(self, trace):
        steps.append(None)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self, trace)

    monkeypatch.setattr(trainer_module.Trainer, "_learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_predictor(model, tokenizer, texts, tmp_path / "cut", QUICK, progress=False)
    assert not (tmp_path / "cut" / "predictor.safetensors").exists()
    resumed = train_predictor(model, tokenizer, texts, tmp_path / "cut", QUICK, progress=False)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert not (tmp_path / "cut" / "training").exists()


def test_tracing_goes_on_where_it_was_interrupted(model, tmp_path):
    batches = list(tokenized_batches(tokenizer, some_texts(100), sentences=10))
    whole = join_traces(list(collect_traces(model, batches)))

    def failing():
        for number, batch in enumerate(batches):
            if number == 6:
                raise KeyboardInterrupt
            yield batch

    store = TraceStore(tmp_path, {"model": "m"})
    with pytest.raises(KeyboardInterrupt):
        list(store.extend(collect_traces(model, failing()), shard_tokens=120))
    again = TraceStore(tmp_path, {"model": "m"})
    assert again.batches_done == 6
    assert not again.complete
    rest = iter(batches)
    again.skip(rest)
    list(again.extend(collect_traces(model, rest), shard_tokens=120))
    assert again.complete
    assert len(again) > 2
    with pytest.raises(ValueError, match="fewer texts than given"):
        TraceStore(tmp_path, {"model": "m"}).skip(iter([*batches, batches[0]]))
    with pytest.raises(ValueError, match=r"holds \d+ traced batches, the texts \d+"):
        TraceStore(tmp_path, {"model": "m"}).skip(iter(batches[:-1]))
    joined = join_traces([again.shard(n) for n in range(len(again))])
    for name, tensor in whole.tensors().items():
        assert torch.equal(getattr(joined, name), tensor), name


def test_tracing_holds_one_shard_at_a_time(model, tmp_path):
    """However long the text is: neither sentences nor traces pile up."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    taken, most, ahead = 0, 0, 0

    def texts():
        nonlocal taken
        for text in some_texts(700):
            taken += 1
            yield text

    def watched():
        for trace in collect_traces(model, tokenized_batches(tokenizer, texts(), sentences=4)):
            alive.add(trace.gate)
            yield trace

    written = 0
    store = TraceStore(tmp_path, {"model_fingerprint": "any"})
    for tokens in store.extend(watched(), shard_tokens=100):
        written += tokens
        most = max(most, sum(gate.shape[0] for gate in alive))
        ahead = max(ahead, taken - store.batches_done * 4)
    assert written == sum(map(len, some_texts(700))) == store.tokens
    assert most < 100 + 2 * 4 * 12  # a shard, and the batches that fill it up and come next
    # The window in which sentences are sorted by length, and the shard that is being filled.
    assert ahead <= 64 * 4 + 100


def test_unfinished_work_of_another_run_is_refused(model, tmp_path, monkeypatch):
    def stop(self, progress):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            train_predictor(model, tokenizer, some_texts(200), tmp_path, QUICK, progress=False)
    for texts in (some_texts(200, seed=1), some_texts(199), some_texts(201)):
        with pytest.raises(ValueError, match="start again without resuming"):
            train_predictor(model, tokenizer, texts, tmp_path, QUICK, progress=False)
    with pytest.raises(ValueError, match="delete the folder or name another"):
        train_predictor(small_model(1), tokenizer, some_texts(200), tmp_path, QUICK, progress=False)
    train_predictor(model, tokenizer, some_texts(199), tmp_path, QUICK, resume=False, progress=False)
    assert (tmp_path / "predictor.safetensors").exists()


def test_too_little_text_says_so(model, tmp_path):
    with pytest.raises(ValueError, match="the texts hold no sentence"):
        train_predictor(model, tokenizer, ["", " "], tmp_path / "a", QUICK, progress=False)
    with pytest.raises(ValueError, match="no document was set aside for the"):
        train_predictor(model, tokenizer, ["abc"] * 2, tmp_path / "b", QUICK, progress=False)


def test_a_diverging_run_stops_with_a_reason(model, tmp_path):
    options = replace(QUICK, learning_rate=1e30, warmup=0)
    with pytest.raises(ValueError, match="a lower learning_rate may help"):
        train_predictor(model, tokenizer, some_texts(200), tmp_path, options, progress=False)


def test_held_out_texts_are_only_reported_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(traces_module, "SHARD_TOKENS", 200)  # so that some shards hold no training sentence
    given = some_texts(50, seed=9)
    train_predictor(model, tokenizer, some_texts(300), tmp_path, QUICK, held_out_texts=given, progress=False)
    report = json.loads(Path(tmp_path, "report.json").read_text())
    assert report["tokens"]["held_out"] == sum(map(len, given))


def test_drift_is_warned_of_once_with_both_numbers():
    watch = DriftWatch(0.9, tolerance=0.1, window=20)
    index = torch.zeros(1, 10, 2, 1, dtype=torch.int64)
    table = HashTable(index, torch.ones(1, 10, 2, 1))
    right, wrong = torch.zeros(1, 10, 2), torch.ones(1, 10, 2)
    padded = right.clone().index_fill(1, torch.arange(5), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chosen in (right, right, padded, padded):
            watch.observe(table, chosen)
        assert watch.rate == 1
    with pytest.warns(DriftWarning, match=r"right for 50.0% of the last 20 tokens; its report says 90.0%.*sida train"):
        watch.observe(table, wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.observe(table, wrong)
    with pytest.raises(ValueError, match="expected the table's"):
        watch.observe(table, wrong[:, :3])
