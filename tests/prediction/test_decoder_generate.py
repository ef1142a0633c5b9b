"""generate() with a predicted decoder: the same tokens and bits, state that follows beams, copies and caches."""

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
from sida_ext import _C, DecoderPredictor, HashPredictor
from sida_ext.models.decoding import DecoderSteps, PredictedCache
from sida_ext.prediction.cache_names import cache_of
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.protocol import load_predictor
from tests.support.decoders import EXPERTS, GENERATE, LAYERS, Random, cached, generate, inputs, recurrent, swap
from tests.support.reference import build, small_config

pytestmark = pytest.mark.usefixtures("one_thread")


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
            model(
                encoder_outputs=encoded,
                attention_mask=batch["attention_mask"],
                decoder_input_ids=span,
                **cached(model, cache),
            )
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
        model(**batch, decoder_input_ids=tokens[:, 3:], **cached(model, cache_of(first)))
    afresh, _ = predictor.step(predictor.start(*recorder.begun[0]), tokens)
    torch.testing.assert_close(recorder.tables[-1].probability, afresh.probability[:, -1:], rtol=1e-4, atol=1e-5)


def test_a_cache_that_was_filled_elsewhere_is_predicted_from_here_on(model):
    batch, tokens = inputs(2), torch.randint(2, 97, (2, 4))
    recorder = Recorder(recurrent(model))
    with torch.no_grad():
        first = model(**batch, decoder_input_ids=tokens[:, :2])
        model.sida.decoder_predictor = recorder
        for place in (2, 3):
            model(**batch, decoder_input_ids=tokens[:, place : place + 1], **cached(model, cache_of(first)))
        assert len(recorder.begun) == 1
        # A step that nobody predicted: the state has a gap, and prediction begins anew behind it.
        model.sida.decoder_predictor = None
        model(**batch, decoder_input_ids=tokens[:, :1], **cached(model, cache_of(first)))
        model.sida.decoder_predictor = recorder
        for place in (2, 3):
            model(**batch, decoder_input_ids=tokens[:, place : place + 1], **cached(model, cache_of(first)))
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


def test_predictors_of_both_stacks(reference):
    encoder = HashPredictor.for_model(reference, "paper", hidden=16).eval()
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
    encoder = HashPredictor.for_model(reference, "paper", hidden=16).eval()
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
    assert twin.decoder.forward._module() is twin.decoder
    assert recorder.tables


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
