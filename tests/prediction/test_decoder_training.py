"""Training a decoder's predictor: traces under teacher forcing, going on, what a step costs."""

from __future__ import annotations

import pytest
import torch
from transformers import SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext.cli import read_pairs
from sida_ext.prediction.cache_names import cache_argument
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.protocol import RecurrentPredictor, TokenTableDecoder, load_predictor
from sida_ext.training import decoder_distill
from sida_ext.training import trainer as trainer_module
from sida_ext.training.decoder_distill import decoder_cost, train_decoder_predictor
from sida_ext.training.decoder_traces import collect_decoder_traces, paired_batches, read_by_decoder
from sida_ext.training.distill import TrainingOptions
from sida_ext.training.evaluation import evaluate
from tests.support.decoders import EXPERTS, LAYERS
from tests.support.reference import build, small_config

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cost_of_a_step_is_measured_whatever_the_cache_is_called(name):
    """Releases of transformers differ in it; both are played here by a stack that calls it so."""
    plain = build(SwitchTransformersForConditionalGeneration, small_config()).eval()
    stack = stack_facts(plain, "decoder").stack
    own = cache_argument(stack)
    original = type(stack)

    def forward(self, cache, **others):
        assert cache is None or cache.get_seq_length() > 0
        output = original.forward(self, **others, **{own: cache})
        return {name: output[own]}

    calls = {
        "cache": lambda self, cache=None, **others: forward(self, cache, **others),
        "past_key_values": lambda self, past_key_values=None, **others: forward(self, past_key_values, **others),
    }
    stack.__class__ = type("Stack", (original,), {"forward": calls[name]})
    predictor = RecurrentPredictor.for_model(plain, hidden=8).eval().requires_grad_(False)
    found = decoder_cost(predictor, plain, rows=(1,), source=3, steps=4)
    assert found["1x1"]["model_ms"] > 0


def test_a_measurement_that_fails_costs_no_predictor(model, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no clock")

    monkeypatch.setattr(decoder_distill, "decoder_cost", fails)
    options = TrainingOptions(epochs=1, batch_sentences=8, validation=0.1, held_out=0.2, max_length=8)
    with pytest.raises(RuntimeError, match="no clock"):
        train_decoder_predictor(model, tokenizer, some_pairs(60), tmp_path, options, progress=False)
    assert isinstance(load_predictor(tmp_path, model), RecurrentPredictor)


def test_lines_with_and_without_target(tmp_path):
    lines = tmp_path / "pairs.jsonl"
    lines.write_text('{"text": "one", "target": "two"}\n\n{"text": "three"}\n')
    assert read_pairs([lines]) == [("one", "two"), "three"]
    lines.write_text('{"text": "one", "target": 2}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: 'target' is int, expected a string"):
        read_pairs([lines])
