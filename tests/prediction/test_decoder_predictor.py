"""The decoder's predictors inside generate: the same tokens and bits, state that follows beams, errors, files."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import sida_ext
from sida_ext import _C, DecoderPredictor, HashPredictor, PredictorError, TokenTablePredictor
from sida_ext.cli import read_pairs
from sida_ext.models.decoding import DecoderSteps, PredictedCache
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.protocol import RecurrentPredictor, TokenTableDecoder, load_predictor
from sida_ext.training import trainer as trainer_module
from sida_ext.training.decoder_distill import train_decoder_predictor
from sida_ext.training.decoder_traces import collect_decoder_traces, paired_batches, read_by_decoder
from sida_ext.training.distill import TrainingOptions
from sida_ext.training.evaluation import evaluate
from tests.support.reference import build, small_config

EXPERTS, LAYERS = 8, 2
GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on more threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference():
    model = build(SwitchTransformersForConditionalGeneration, small_config())
    model.generation_config.eos_token_id = 1
    return model


@pytest.fixture(scope="module")
def swapped(reference, tmp_path_factory):
    """A swapped model that all tests of the module share; each sets the predictor that it needs."""
    folder = tmp_path_factory.mktemp("swapped")
    model = swap(reference, store=folder / "experts.sida", expert_memory="30%")
    yield model
    model.sida.close()


def swap(reference, **changes):
    return sida_ext.swap_experts(copy.deepcopy(reference), **{"expert_dtype": "float32", **changes})


@pytest.fixture
def model(swapped):
    swapped.sida.decoder_predictor = None
    yield swapped
    swapped.sida.decoder_predictor = None


def inputs(batch=3, length=9, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, (batch, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, seed=0, batch=3, **options):
    torch.manual_seed(seed)
    return model.generate(**inputs(batch, seed=seed), **{"max_new_tokens": 10, **options})


def recurrent(model, seed=0, **options) -> RecurrentPredictor:
    """Untrained, with weights large enough that what it names depends on the past and on the encoder."""
    predictor = RecurrentPredictor.for_model(model, seed=seed, **options).eval().requires_grad_(False)
    for cell in predictor.net.cells:
        cell.recalled.weight.mul_(20)
        cell.out.weight.mul_(20)
    return predictor


class Random:
    """Wrong on purpose: names any experts, as many as it likes, and says so with any confidence."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def start(self, encoder_output, attention_mask):
        return encoder_output.shape[0]

    def step(self, state, input_ids):
        assert state == input_ids.shape[0]
        count = int(torch.randint(1, EXPERTS + 1, (), generator=self.random))
        shape = (*input_ids.shape, LAYERS, count)
        index = torch.rand((*shape[:3], EXPERTS), generator=self.random).argsort(-1)[..., :count]
        gate = torch.rand(shape, generator=self.random)
        absent = torch.rand(shape, generator=self.random) < 0.3
        return HashTable(index.masked_fill(absent, -1), gate.masked_fill(absent, 0)), state

    def reorder(self, state, index):
        return int(index.numel())


@pytest.mark.parametrize("mode", GENERATE)
def test_tokens_are_those_of_transformers(model, reference, mode):
    """Free-running up to the first decision that is too close to call in float32."""
    margins = []

    def watch(input_ids, scores):
        best = scores.topk(2, dim=-1).values
        margins.append((best[:, 0] - best[:, 1]).min().item())
        return scores

    expected = generate(reference, **GENERATE[mode], logits_processor=transformers.LogitsProcessorList([watch]))
    model.sida.decoder_predictor = recurrent(model)
    actual = generate(model, **GENERATE[mode])
    sure = next((i for i, margin in enumerate(margins) if margin < 1e-4), len(margins))
    width = min(sure + 1, actual.shape[1], expected.shape[1])
    assert width > 3
    assert torch.equal(actual[:, :width], expected[:, :width])


@pytest.mark.parametrize("mode", GENERATE)
def test_bits_do_not_depend_on_predictor_or_budget(model, mode):
    seeds = range(2)
    options = {"output_logits": True, "return_dict_in_generate": True, **GENERATE[mode]}
    plain = [generate(model, seed, **options) for seed in seeds]
    total = model.sida.header.total_experts
    draw = torch.Generator().manual_seed(len(mode))
    for seed, expected in zip(seeds, plain, strict=True):
        for predictor in (recurrent(model, seed), Random(seed), Random(seed + 100)):
            slots = int(torch.randint(1, total + 1, (), generator=draw))
            model.sida.set_budget(slots * model.sida.header.record_bytes)
            model.sida.decoder_predictor = predictor
            actual = generate(model, seed, **options)
            assert torch.equal(actual.sequences, expected.sequences), (type(predictor).__name__, seed, slots)
            for ours, theirs in zip(actual.logits, expected.logits, strict=True):
                assert torch.equal(ours, theirs), (type(predictor).__name__, seed, slots)


def test_slow_reads_change_nothing(reference):
    model = swap(reference, expert_memory="20%", faults=_C.Faults(seed=3, delay_us_max=500))
    with model.sida:
        expected = generate(model, num_beams=2)
        model.sida.decoder_predictor = Random(7)
        assert torch.equal(generate(model, num_beams=2), expected)


def test_rows_that_end_early_are_predicted_with_the_others(model):
    """One row ends at once, the others go on: the step is still one batch, and the tokens are the same."""
    first = generate(model, batch=4, min_new_tokens=10)[:, 1]
    model.generation_config.eos_token_id = int(first[0])
    try:
        expected = generate(model, batch=4)
        model.sida.decoder_predictor = recurrent(model)
        actual = generate(model, batch=4)
    finally:
        model.generation_config.eos_token_id = 1
    assert torch.equal(actual, expected)
    assert (expected[0, 2:] == model.config.pad_token_id).all()


class Recorder:
    """Another predictor's tables, and the encoder's results that it began with."""

    def __init__(self, predictor) -> None:
        self.predictor, self.tables, self.begun = predictor, [], []

    def start(self, encoder_output, attention_mask):
        self.begun.append((encoder_output, attention_mask))
        return self.predictor.start(encoder_output, attention_mask)

    def step(self, state, input_ids):
        table, state = self.predictor.step(state, input_ids)
        self.tables.append(table)
        return table, state

    def reorder(self, state, index):
        return self.predictor.reorder(state, index)


def test_state_follows_the_beams(model):
    """What was predicted for each beam is what a predictor says that reads that beam's tokens from the start."""
    predictor = recurrent(model)
    recorder = Recorder(predictor)
    model.sida.decoder_predictor = recorder
    history: list[torch.Tensor] = []

    def watch(input_ids, scores):
        history.append(input_ids.clone())
        return scores

    crossed = False
    for seed in range(3):
        recorder.tables.clear()
        recorder.begun.clear()
        history.clear()
        generate(model, seed, num_beams=3, min_new_tokens=9, logits_processor=transformers.LogitsProcessorList([watch]))
        (begun,) = recorder.begun
        assert len(recorder.tables) == len(history) == 10
        for length, (table, tokens) in enumerate(zip(recorder.tables, history, strict=True), 1):
            assert tokens.shape == (9, length)
            afresh, _ = predictor.step(predictor.start(*begun), tokens)
            torch.testing.assert_close(table.probability, afresh.probability[:, -1:], rtol=1e-4, atol=1e-5)
            assert torch.equal(table.expert_index[..., 0], afresh.expert_index[:, -1:, :, 0])
            if length > 1:
                crossed |= not torch.equal(tokens[:, :-1], history[length - 2])
    assert crossed, "no beam was ever copied or dropped; the test shows nothing"


def test_state_follows_speculation_and_a_cache_of_the_callers(model):
    """Tokens that a speculation got wrong are taken back; what is predicted after is as if they had never been."""
    predictor = recurrent(model)
    recorder = Recorder(predictor)
    model.sida.decoder_predictor = recorder
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    tokens = torch.randint(2, 97, (1, 12), generator=torch.Generator().manual_seed(4))
    batch = inputs(1)
    with torch.no_grad():
        encoded = model.encoder(**batch)

        def run(span):
            model(encoder_outputs=encoded, attention_mask=batch["attention_mask"], decoder_input_ids=span, cache=cache)
            return recorder.tables[-1]

        run(tokens[:, :5])
        assert isinstance(cache, PredictedCache)
        cache.crop(-3)
        assert cache.get_seq_length() == 2
        table = run(tokens[:, 7:9])
        kept = torch.cat([tokens[:, :2], tokens[:, 7:9]], dim=1)
        twin = copy.deepcopy(cache)
        assert twin.sida_steps._predictor is recorder
        after = run(tokens[:, 9:10])
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
        last = run(tokens[:, 10:11])
    afresh, _ = predictor.step(
        predictor.start(encoded[0], batch["attention_mask"]), torch.cat([kept, tokens[:, 9:11]], 1)
    )
    whole = torch.cat([table.probability, after.probability, last.probability], dim=1)
    torch.testing.assert_close(whole, afresh.probability[:, 2:], rtol=1e-4, atol=1e-5)
    assert torch.equal(twin.sida_steps._seen, kept)
    cache.reset()
    assert cache.sida_steps._seen is None


def test_prompt_lookup_gives_the_same_tokens(model):
    expected = generate(model, batch=1, prompt_lookup_num_tokens=3)
    model.sida.decoder_predictor = recurrent(model)
    assert torch.equal(generate(model, batch=1, prompt_lookup_num_tokens=3), expected)


def test_a_manual_loop_goes_on_with_the_models_own_cache(model):
    predictor = recurrent(model)
    recorder = Recorder(predictor)
    model.sida.decoder_predictor = recorder
    batch, tokens = inputs(2), torch.randint(2, 97, (2, 4))
    with torch.no_grad():
        first = model(**batch, decoder_input_ids=tokens[:, :3])
        model(**batch, decoder_input_ids=tokens[:, 3:], cache=first.cache)
    afresh, _ = predictor.step(predictor.start(*recorder.begun[0]), tokens)
    torch.testing.assert_close(recorder.tables[-1].probability, afresh.probability[:, -1:], rtol=1e-4, atol=1e-5)


def test_a_cache_that_was_filled_elsewhere_is_predicted_from_here_on(model):
    batch, tokens = inputs(2), torch.randint(2, 97, (2, 4))
    recorder = Recorder(recurrent(model))
    with torch.no_grad():
        first = model(**batch, decoder_input_ids=tokens[:, :2])
        model.sida.decoder_predictor = recorder
        for place in (2, 3):
            model(**batch, decoder_input_ids=tokens[:, place : place + 1], cache=first.cache)
        assert len(recorder.begun) == 1
        # A step that nobody predicted: the state has a gap, and prediction begins anew behind it.
        model.sida.decoder_predictor = None
        model(**batch, decoder_input_ids=tokens[:, :1], cache=first.cache)
        model.sida.decoder_predictor = recorder
        for place in (2, 3):
            model(**batch, decoder_input_ids=tokens[:, place : place + 1], cache=first.cache)
    assert len(recorder.begun) == 2
    afresh, _ = recorder.predictor.step(recorder.predictor.start(*recorder.begun[0]), tokens[:, 2:])
    torch.testing.assert_close(recorder.tables[-1].probability, afresh.probability[:, -1:], rtol=1e-4, atol=1e-5)


def test_another_predictor_between_two_steps_takes_over():
    class Counting:
        def start(self, encoder_output, attention_mask):
            return 0

        def step(self, state, input_ids):
            shape = (*input_ids.shape, 1, 1)
            return HashTable(torch.zeros(shape, dtype=torch.int32), torch.ones(shape)), state + input_ids.shape[1]

        def reorder(self, state, index):
            return state

    steps, token = DecoderSteps(), torch.ones(2, 1, dtype=torch.int64)
    for number in range(3):
        steps.step(Counting(), token, torch.zeros(2, 3, 4), None, number)
        assert steps._state == number + 1


def test_each_step_is_one_announced_batch_that_is_retired(model, monkeypatch):
    announced, retired, current = [], [], []
    announce, retire = model.sida.announce, model.sida.retire

    def note(wanted):
        assert list(wanted) == [layer.name for layer in layers]
        announced.append(announce(wanted))
        return announced[-1]

    monkeypatch.setattr(model.sida, "announce", note)
    monkeypatch.setattr(model.sida, "retire", lambda number: retired.append(number) or retire(number))
    layers = [layer for layer in model.decoder.modules() if isinstance(layer, sida_ext.models.switch.SparseMLP)]
    hook = layers[0].register_forward_pre_hook(lambda *_: current.append(model.sida.current.number))
    model.sida.decoder_predictor = recurrent(model)
    generate(model, min_new_tokens=10)
    assert len(announced) == 10
    assert announced == retired == current
    with monkeypatch.context() as patch:
        patch.setattr(type(layers[0].router), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            model.decoder(input_ids=torch.ones(1, 1, dtype=torch.int64), encoder_hidden_states=torch.zeros(1, 2, 24))
    hook.remove()
    assert len(announced) == 11
    assert announced == retired
    assert model.sida.current.number == 0


def test_what_is_predicted_is_prefetched(reference):
    """What a table names is read before a layer has asked for it: held back until then, no expert is missed."""
    model = swap(reference, expert_memory="100%")
    names = [layer.name for layer in model.decoder.modules() if isinstance(layer, sida_ext.models.switch.SparseMLP)]

    class All(Random):
        def step(self, state, input_ids):
            shape = (*input_ids.shape, LAYERS, EXPERTS)
            index = torch.arange(EXPERTS).expand(shape)
            return HashTable(index, torch.full(shape, 1 / EXPERTS)), state

    def counters():
        return [layer for layer in model.sida.stats().layers if layer.name in names]

    def hold(*_):
        deadline = time.monotonic() + 60
        while sum(layer.loads for layer in counters()) < LAYERS * EXPERTS:
            assert time.monotonic() < deadline, "what was announced has not been read"
            time.sleep(0.001)

    with model.sida:
        model.sida.decoder_predictor = All(0)
        model.decoder.block[0].register_forward_pre_hook(hold)
        generate(model)
        assert len(counters()) == LAYERS
        assert all(layer.unique > 0 and layer.unique == layer.hits for layer in counters())


class Broken(Random):
    """Fails at one step, in one way."""

    def __init__(self, how: str, at: int = 2) -> None:
        super().__init__(0)
        self.how, self.at, self.steps = how, at, 0

    def step(self, state, input_ids):
        self.steps += 1
        table, state = super().step(state, input_ids)
        if self.steps < self.at:
            return table, state
        if self.how == "raises":
            raise KeyError("no such thing")
        if self.how == "table alone":
            return table
        if self.how == "no table":
            return "experts", state
        if self.how == "expert":
            return HashTable(torch.full_like(table.expert_index, EXPERTS), torch.ones_like(table.gate)), state
        if self.how == "nan":
            return HashTable(table.expert_index, torch.full_like(table.gate, float("nan"))), state
        index, gate = table.expert_index, table.gate
        cut = {"rows": (slice(1, None),), "layers": (slice(None), slice(None), slice(1, None))}[self.how]
        return HashTable(index[cut], gate[cut]), state


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raises", KeyError, "no such thing"),
        ("table alone", PredictorError, r"Broken.step returned HashTable, expected a pair"),
        ("no table", PredictorError, r"Broken.step returned str, expected a sida_ext.HashTable"),
        ("expert", PredictorError, r"Broken.step returned a wrong table: .* names expert 8"),
        ("nan", ValueError, r"HashTable.gate holds nan"),
        ("rows", PredictorError, r"Broken.step returned a wrong table: .* for \(2, 1\) tokens; the batch has \(3, 1\)"),
        ("layers", PredictorError, r"Broken.step returned a wrong table: .* has 1 layers"),
    ],
)
def test_a_broken_predictor_is_an_error_in_the_caller_and_the_next_call_is_served(model, how, error, message):
    expected = generate(model)
    model.sida.decoder_predictor = Broken(how)
    with pytest.raises(error, match=message):
        generate(model)
    assert model.sida.current.number == 0
    model.sida.decoder_predictor = recurrent(model)
    assert torch.equal(generate(model), expected)


def test_reorder_that_fails_is_an_error_in_the_caller(model):
    class Stiff(Random):
        def reorder(self, state, index):
            raise ValueError("cannot be reordered")

    model.sida.decoder_predictor = Stiff(0)
    with pytest.raises(ValueError, match="cannot be reordered"):
        generate(model, num_beams=2)


def test_weights_that_are_nan_are_an_error(model):
    predictor = recurrent(model)
    predictor.net.moe[0].router.weight.fill_(float("nan"))
    model.sida.decoder_predictor = predictor
    with pytest.raises(ValueError, match="logits hold NaN or inf"):
        generate(model)


def test_an_object_that_is_no_decoder_predictor_is_named(model):
    model.sida.decoder_predictor = HashPredictor.for_model(model, "context", hidden=16)
    with pytest.raises(PredictorError, match="decoder_predictor is HashPredictor, expected an object with start"):
        generate(model)


def test_predictors_of_both_stacks(reference):
    encoder = HashPredictor.for_model(reference, "context", hidden=16).eval()
    decoder = recurrent(reference)
    assert isinstance(decoder, DecoderPredictor)
    assert not isinstance(encoder, DecoderPredictor)
    for given in ((encoder, decoder), [decoder, encoder]):
        with swap(reference, predictor=given).sida as runtime:
            assert runtime.predictor is encoder
            assert runtime.decoder_predictor is decoder
    with swap(reference, predictor=decoder).sida as runtime:
        assert runtime.predictor is None
    with pytest.raises(TypeError, match="holds two for the decoder"):
        swap(reference, predictor=(decoder, decoder))
    with pytest.raises(TypeError, match="predictor is int"):
        swap(reference, predictor=(decoder, 3))
    alone = build(SwitchTransformersEncoderModel, small_config())
    with pytest.raises(ValueError, match="SwitchTransformersEncoderModel has no decoder with MoE layers"):
        sida_ext.swap_experts(alone, predictor=decoder)


def test_predicted_routing_of_the_encoder_and_a_predicted_decoder(reference):
    """The encoder's table replaces its routers; the decoder's only prefetches."""
    encoder = HashPredictor.for_model(reference, "context", hidden=16).eval()
    with_both = swap(reference, predictor=(encoder, recurrent(reference)), routing="predicted", expert_memory="40%")
    with with_both.sida:
        actual = generate(with_both)
        with_both.sida.decoder_predictor = None
        assert torch.equal(generate(with_both), actual)


def test_a_copy_of_the_model_predicts_too(model):
    twin = copy.deepcopy(model)
    recorder = Recorder(recurrent(model))
    expected = generate(model)
    model.sida.decoder_predictor = recorder
    assert torch.equal(generate(twin), expected)
    assert twin.decoder.forward.args[0] is twin.decoder
    assert recorder.tables


def test_saved_and_loaded(model, tmp_path):
    predictor = recurrent(model)
    predictor.round_weights()
    predictor.save_pretrained(tmp_path / "recurrent")
    loaded = load_predictor(tmp_path / "recurrent", model)
    assert isinstance(loaded, RecurrentPredictor)
    ids = torch.randint(2, 97, (2, 5))
    encoded = torch.randn(2, 4, 24)
    for ours, theirs in zip(
        loaded.step(loaded.start(encoded, None), ids), predictor.step(predictor.start(encoded, None), ids), strict=True
    ):
        if isinstance(ours, HashTable):
            assert torch.equal(ours.expert_index, theirs.expert_index)
            assert torch.equal(ours.probability, theirs.probability)
    table = TokenTablePredictor.for_model(model, "decoder")
    table.update(ids, torch.ones(2, 5, LAYERS, dtype=torch.int64), torch.ones(2, 5, LAYERS))
    table.save_pretrained(tmp_path / "table")
    loaded_table = load_predictor(tmp_path / "table", model)
    assert isinstance(loaded_table, TokenTableDecoder)
    assert loaded_table.step(None, ids)[0].expert_index[..., 0].eq(1).all()
    other = build(SwitchTransformersForConditionalGeneration, small_config(), seed=9)
    for name in ("recurrent", "table"):
        with pytest.raises(PredictorError, match="trained for a model with fingerprint"):
            load_predictor(tmp_path / name, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.start(torch.zeros(2, 3, 5), None), r"encoder_output has shape \(2, 3, 5\); expected \[B, S, 24\]"),
        (lambda p: p.start(torch.zeros(2, 3, 24), torch.ones(2, 4)), r"attention_mask has shape \(2, 4\)"),
        (
            lambda p: p.step(p.start(torch.zeros(2, 3, 24), None), torch.ones(3, 1, dtype=torch.int64)),
            "the state is of 2 rows, input_ids of 3",
        ),
        (
            lambda p: p.step(p.start(torch.zeros(2, 3, 24), None), torch.full((2, 1), 97)),
            r"input_ids\[0, 0\] is 97; the model knows tokens 0..96",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        change(recurrent(model))


def test_padding_of_the_encoder_and_of_the_decoder_changes_nothing(model):
    predictor = recurrent(model)
    encoded, ids = torch.randn(1, 4, 24), torch.randint(2, 97, (1, 6))
    alone = predictor.predict(ids, None, 3, encoded)
    padded = predictor.predict(
        torch.cat([ids, torch.zeros(1, 2, dtype=torch.int64)], 1),
        torch.tensor([[1] * 6 + [0] * 2]),
        3,
        torch.cat([encoded, torch.full((1, 3, 24), 50.0)], 1),
        torch.tensor([[1] * 4 + [0] * 3]),
    )
    assert torch.equal(padded.expert_index[:, :6], alone.expert_index)
    torch.testing.assert_close(padded.probability[:, :6], alone.probability)
    assert padded.expert_index[:, 6:].eq(-1).all()
    assert predictor.predict(ids).expert_index.shape == (1, 6, LAYERS, 1)  # without an encoder's result


def busy(model, **options) -> RecurrentPredictor:
    """Every weight random, so that no part of the network is without effect."""
    predictor = recurrent(model, **options)
    random = torch.Generator().manual_seed(5)
    for weight in predictor.net.parameters():
        weight.add_(0.3 * torch.randn(weight.shape, generator=random))
    return predictor


def both_ways(predictor, encoded, ids):
    """Logits of each token, step by step and as whole rows, and the last states."""
    state, steps = predictor.start(encoded, None), []
    for token in ids.split(1, dim=1):
        logits, state = predictor._step(state, token)
        steps.append(logits)
    whole, end = predictor._step(predictor.start(encoded, None), ids)
    return (torch.cat(steps, 1), state.memory), (whole, end.memory)


@pytest.mark.parametrize("options", [{}, {"hidden": 8}, {"cells": 1}, {"hidden": 8, "cells": 1, "stand_in": 4}])
@pytest.mark.parametrize("source", [0, 5])
def test_a_folded_step_computes_what_the_network_computes(model, options, source):
    predictor = busy(model, **options)
    random = torch.Generator().manual_seed(1)
    encoded, ids = torch.randn(3, source, 24, generator=random), torch.randint(2, 97, (3, 6), generator=random)
    with torch.no_grad():
        ours, theirs = both_ways(predictor, encoded, ids)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert theirs[0].std() > 0.5  # logits that could differ


def test_a_folded_step_follows_the_weights(model):
    predictor, other = busy(model), busy(model, seed=3)
    encoded, ids = torch.randn(2, 4, 24), torch.randint(2, 97, (2, 3))

    def check():
        ours, theirs = both_ways(predictor, encoded, ids)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        return ours[0]

    with torch.no_grad():
        before = check()
        predictor.net.moe[1].router.weight.mul_(3)
        written = check()
        predictor.load_state_dict(other.state_dict())
        loaded = check()
        predictor.double().float()
        check()
    assert not torch.allclose(before, written)
    assert not torch.allclose(written, loaded)


def tokenizer(text: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
    return {"input_ids": [2 + ord(letter) % 95 for letter in text][:max_length]}


def some_pairs(number: int, seed: int = 0, targets: bool = True) -> list:
    random = torch.Generator().manual_seed(seed)

    def text() -> str:
        length = int(torch.randint(1, 9, (), generator=random))
        return "".join(chr(97 + n) for n in torch.randint(0, 26, (length,), generator=random).tolist())

    pairs = [(text(), text()) for _ in range(number)]
    return pairs if targets else [source for source, _ in pairs]


def traced(model, pairs, keep=EXPERTS):
    return list(collect_decoder_traces(model, read_by_decoder(model, paired_batches(tokenizer, pairs), 8), keep))


def test_traces_are_what_the_router_says_while_the_model_generates(model, monkeypatch):
    """A source alone is traced on what the model writes for it: token by token the same choices, up to its end."""
    sources = some_pairs(3, targets=False)
    ids = torch.tensor([tokenizer(sources[0], True, 512)["input_ids"]])
    monkeypatch.setattr(
        model.generation_config, "eos_token_id", int(model.generate(input_ids=ids, max_new_tokens=3)[0, -1])
    )
    (trace,) = traced(model, sources)
    assert len(set(trace.length.tolist())) > 1
    routed: list[torch.Tensor] = []
    routers = [m.router for m in model.decoder.modules() if isinstance(m, sida_ext.models.switch.SparseMLP)]
    hooks = [router.register_forward_hook(lambda _, __, out: routed.append(out[2])) for router in routers]
    for row in range(trace.rows):
        part = trace.select(torch.tensor([row]))
        routed.clear()
        source = torch.tensor([tokenizer(sources[int(part.document)], True, 512)["input_ids"]])
        written = model.generate(input_ids=source, max_new_tokens=8)
        steps = torch.stack([torch.cat(routed[layer::LAYERS], dim=1) for layer in range(LAYERS)], dim=2)[0]
        length = int(part.length)
        assert part.input_ids.tolist() == written[0, :length].tolist()
        assert length == written.shape[1] - 1
        assert torch.equal(part.top1, steps[:length].argmax(-1))
        encoded = model.encoder(input_ids=source).last_hidden_state[0]
        torch.testing.assert_close(part.encoded.float(), encoded, rtol=2e-3, atol=2e-3)
    for hook in hooks:
        hook.remove()


def test_traces_of_given_targets(model):
    pairs = [("abc", "defg"), ([5, 6], [7, 8, 9]), ("only this", "x")]
    (trace,) = traced(model, pairs)
    rows = [trace.select(torch.tensor([row])) for row in range(3)]
    by_document = {int(row.document): row for row in rows}
    assert by_document[1].input_ids.tolist() == [0, 7, 8]
    assert by_document[1].encoded_length.tolist() == [2]
    assert by_document[0].input_ids.tolist() == [0, *tokenizer("def", True, 9)["input_ids"]]
    source = torch.tensor([[5, 6]])
    with torch.no_grad():
        logits = model(input_ids=source, decoder_input_ids=torch.tensor([[0, 7, 8]]), output_router_logits=True)
    expected = torch.stack(logits.decoder_router_logits, dim=2)[0]
    assert torch.equal(by_document[1].top1, expected.argmax(-1))
    torch.testing.assert_close(by_document[1].gate, expected.softmax(-1).amax(-1), rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="document 0 holds neither text nor token ids"):
        list(paired_batches(tokenizer, [("abc", [1.5])]))


def test_training_learns_saves_and_goes_on(model, tmp_path):
    options = TrainingOptions(
        epochs=6, batch_sentences=8, validation=0.1, held_out=0.2, warmup=5, max_length=8, learning_rate=5e-3
    )
    pairs = some_pairs(60)
    trained = train_decoder_predictor(model, tokenizer, pairs, tmp_path / "whole", options, progress=False)
    # Interrupted after the traces and two epochs; the second call goes on to the same weights.
    half = tmp_path / "half"
    original, epochs = trainer_module.Trainer._run_epoch, []

    def stop_after_two(self, bar):
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(original(self, bar))

    trainer_module.Trainer._run_epoch = stop_after_two
    try:
        with pytest.raises(KeyboardInterrupt):
            train_decoder_predictor(model, tokenizer, pairs, half, options, progress=False)
    finally:
        trainer_module.Trainer._run_epoch = original
    assert not (half / "predictor.safetensors").exists()
    again = train_decoder_predictor(model, tokenizer, pairs, half, options, progress=False)
    for (name, ours), (_, theirs) in zip(again.state_dict().items(), trained.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    loaded = load_predictor(half, model)
    assert loaded.held_out_top1 == trained.held_out_top1
    assert isinstance(load_predictor(half / "token_table", model), TokenTableDecoder)
    assert (half / "report.json").is_file()
    assert not (half / "training").exists()
    traces = traced(model, some_pairs(30, seed=5))
    before = evaluate(RecurrentPredictor.for_model(model, seed=options.seed), traces).summary()
    after = evaluate(loaded, traces).summary()
    assert after["mean_top1"] > before["mean_top1"]
    with pytest.raises(ValueError, match="held_out is 0"):
        train_decoder_predictor(model, tokenizer, pairs, half, TrainingOptions(held_out=0.0))


def test_lines_with_and_without_target(tmp_path):
    lines = tmp_path / "pairs.jsonl"
    lines.write_text('{"text": "one", "target": "two"}\n\n{"text": "three"}\n')
    assert read_pairs([lines]) == [("one", "two"), "three"]
    lines.write_text('{"text": "one", "target": 2}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: 'target' is int, expected a string"):
        read_pairs([lines])


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_bundled_denoiser_and_its_predictor(tmp_path):
    """They fit each other, and generate gives transformers' own tokens while decoder layers are read ahead."""
    folder = EXAMPLES / "demo_denoiser"
    plain = SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    batch = words(["this thing is <mask> garbage.", "a tale of <mask> men."], padding=True, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = plain.generate(**batch, max_new_tokens=16)
    assert words.decode(expected[0], skip_special_tokens=True).endswith("garbage.")
    predictor = load_predictor(folder / "decoder_predictor", plain)
    model = sida_ext.from_pretrained(
        folder, expert_dtype="float32", dtype=torch.float32, expert_memory="30%", predictor=predictor,
        store_cache=tmp_path,
    )  # fmt: skip
    with model.sida:
        assert torch.equal(model.generate(**batch, max_new_tokens=16), expected)
    report = json.loads((folder / "decoder_predictor" / "report.json").read_text())["held_out"]
    assert report["predictor"]["mean_top3"] > 0.9 > report["token_table"]["mean_top3"]
