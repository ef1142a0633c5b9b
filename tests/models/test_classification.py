"""The sequence classification head, and the bundled model that uses it, by transformers alone."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersEncoderModel
from transformers.modeling_outputs import SequenceClassifierOutput

from examples import corpus
from sida_ext.models.classification import SwitchTransformersForSequenceClassification, masked_mean

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEMO_MODEL = EXAMPLES / "demo_model"


def small_config(**changes) -> SwitchTransformersConfig:
    values = {
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 2,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
        "num_labels": 3,
        "initializer_factor": 0.2,
    }
    return SwitchTransformersConfig(**(values | changes))


@pytest.fixture
def model() -> SwitchTransformersForSequenceClassification:
    torch.manual_seed(0)
    return SwitchTransformersForSequenceClassification(small_config()).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 50, shape, generator=torch.Generator().manual_seed(1))


def test_shapes_and_outputs(model):
    out = model(random_ids(5, 7), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert isinstance(out, SequenceClassifierOutput)
    assert out.loss is None
    assert out.logits.shape == (5, 3)
    assert len(out.hidden_states) == 5
    assert all(states.shape == (5, 7, 16) for states in out.hidden_states)
    assert len(out.attentions) == 4
    assert [logits.shape for logits in out.router_logits] == [(5, 7, 4)] * 2


def test_only_what_was_asked_for_is_returned(model):
    out = model(random_ids(2, 3))
    assert (out.hidden_states, out.attentions, out.router_logits) == (None, None, None)


def test_tuple_without_return_dict(model):
    ids = random_ids(2, 3)
    (logits,) = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits)


def test_loss_is_mean_cross_entropy(model):
    ids, labels = random_ids(4, 6), torch.tensor([0, 2, 1, 2])
    out = model(ids, labels=labels)
    expected = -out.logits.double().log_softmax(-1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(out.loss.double(), expected)


def test_a_step_down_the_gradient_lowers_the_loss(model):
    ids, labels = random_ids(8, 6), torch.arange(8) % 3
    before = model(ids, labels=labels).loss
    before.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts" not in name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert model(ids, labels=labels).loss < before


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits(model, side):
    ids = random_ids(3, 6)
    alone = model(ids, attention_mask=torch.ones_like(ids)).logits
    pad, none = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)
    parts = ([pad, ids], [none, torch.ones_like(ids)]) if side == "left" else ([ids, pad], [torch.ones_like(ids), none])
    padded = model(torch.cat(parts[0], 1), attention_mask=torch.cat(parts[1], 1)).logits
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    # Without the mask the padding counts, so the comparison above can fail.
    assert not torch.allclose(model(torch.cat(parts[0], 1)).logits, alone, atol=1e-5, rtol=1e-5)


def test_masked_mean_against_a_loop():
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    expected = torch.stack([rows[keep.bool()].mean(0) for rows, keep in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(masked_mean(hidden, mask), expected)
    poisoned = torch.where(mask.bool().unsqueeze(-1), hidden, float("nan"))
    torch.testing.assert_close(masked_mean(poisoned, mask), expected)


def test_inputs_embeds_equal_input_ids(model):
    ids = random_ids(2, 5)
    torch.testing.assert_close(model(inputs_embeds=model.shared(ids)).logits, model(ids).logits)


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = SwitchTransformersForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.num_labels == 3
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    ids = random_ids(2, 5)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_encoder_weights_are_those_of_the_encoder_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    encoder = SwitchTransformersEncoderModel.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 5)
    hidden = encoder(ids).last_hidden_state
    assert torch.equal(model.classifier(hidden.mean(dim=1)), model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds, got neither"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "inputs_embeds": torch.ones(2, 3, 16)}, "got both"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
            r"attention_mask has shape \(2, 4\), expected \(2, 3\)",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(3, dtype=torch.long)},
            r"labels has shape \(3,\), expected \(2,\)",
        ),
        (
            {
                "input_ids": torch.ones(2, 3, dtype=torch.long),
                "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]]),
            },
            "row 1 is all 0",
        ),
    ],
)
def test_bad_input_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_other_problem_types_are_refused():
    with pytest.raises(ValueError, match="multi_label_classification"):
        SwitchTransformersForSequenceClassification(small_config(problem_type="multi_label_classification"))


@pytest.fixture(scope="module")
def bundled():
    model = SwitchTransformersForSequenceClassification.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL), corpus.load_sentences("held_out", "movie")


def test_bundled_model_is_above_the_majority_class(bundled):
    model, tokenizer, sentences = bundled
    some = sentences[:200]
    batch = tokenizer([s.text for s in some], padding=True, truncation=True, return_tensors="pt")
    labels = torch.tensor([s.label for s in some])
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    correct = (logits.argmax(-1) == labels).double().mean().item()
    majority = max(labels.double().mean().item(), 1 - labels.double().mean().item())
    # Four standard errors of the majority's accuracy on so many sentences: no lucky draw gets there.
    assert correct > majority + 4 * (majority * (1 - majority) / len(some)) ** 0.5


def test_bundled_model_is_as_large_as_stated(bundled):
    model, tokenizer, sentences = bundled
    stored = json.loads((DEMO_MODEL / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 25_000_000
    batch = tokenizer([s.text for s in sentences[:8]], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    assert len(out.router_logits) >= 4
    real = batch["attention_mask"].bool()
    for logits in out.router_logits:
        assert logits.shape[-1] >= 32
        assert len(logits.argmax(-1)[real].unique()) >= 16


def test_bundled_tokenizer_names_its_special_tokens(bundled):
    _, tokenizer, _ = bundled
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer("A fine film.")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a fine film."


def test_splits_share_no_sentence():
    texts = {split: {s.text.lower() for s in corpus.load_sentences(split)} for split in corpus.SPLITS}
    assert all(len(some) > 1000 for some in texts.values())
    assert not texts["train"] & texts["held_out"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["held_out"]
