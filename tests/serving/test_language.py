"""Texts through a language model: their likelihood and their continuations, beside transformers' own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import sida_ext
from examples.demo_language import MODEL
from sida_ext.cli import app
from sida_ext.serving.language import continuations, is_language_model, likelihoods, perplexity
from tests.support.families import tiny_model

TEXTS = [[5, 9, 7, 22, 31], [8, 4], [3, 3, 60, 17, 9, 12, 44, 2], [11]]


@pytest.fixture(scope="module")
def models():
    """transformers' own and the served one, float32."""
    model = tiny_model("qwen3_moe")[1].float().eval()
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = 2
    served = sida_ext.swap_experts(tiny_model("qwen3_moe")[1].float().eval(), "cpu", "30%", None, "float32")
    served.generation_config.eos_token_id = 2
    yield model, served
    served.sida.close()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_the_model(models, batch_size):
    model, served = models
    found = list(likelihoods(served, TEXTS, batch_size=batch_size))
    for (value, count), ids in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logits[place, token]) for place, token in enumerate(ids[1:]))
        assert count == len(ids) - 1
        assert value == pytest.approx(expected, abs=1e-3)
    tokens = sum(count for _, count in found)
    assert perplexity(found) == pytest.approx(math.exp(-sum(value for value, _ in found) / tokens))
    assert math.isnan(perplexity([(0.0, 0)]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_continuations_are_those_of_generate(models, batch_size):
    model, served = models
    written = list(continuations(served, TEXTS, 6, batch_size=batch_size))
    for ids, found in zip(TEXTS, written, strict=True):
        with torch.no_grad():
            expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert found == expected[0, len(ids) :].tolist()


def test_an_empty_prompt_is_named(models):
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens, expected at least one"):
        list(continuations(models[1], [[3], []], 2))


def test_which_models_are_language_models(models):
    assert is_language_model(models[1])
    classifier = sida_ext.SwitchTransformersForSequenceClassification.from_pretrained(MODEL.parent / "demo_model")
    assert not is_language_model(classifier)


def test_the_command_scores_texts_and_goes_on_with_them(tmp_path):
    lines = ["It is a truth universally acknowledged, that", "The function returns a new list of"]
    text, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    text.write_text("\n".join(lines) + "\n")
    common = ["run", str(MODEL), str(text), "--expert-memory", "30%", "-o", str(out)]
    done = CliRunner().invoke(app, common)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == lines
    assert all(row["log_likelihood"] < 0 and row["tokens"] > 3 for row in rows)
    assert "perplexity" in done.output
    trace = tmp_path / "trace.json"
    done = CliRunner().invoke(app, [*common, "--generate", "5", "--trace", str(trace)])
    assert done.exit_code == 0, done.output
    assert json.loads(trace.read_text())["traceEvents"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["generated"] and 1 <= row["tokens"] <= 5 for row in rows)


def test_the_command_says_how_many_continuations_it_shows(tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("".join(f"Text number {number} [of] five\n" for number in range(5)))
    done = CliRunner().invoke(app, ["run", str(MODEL), str(text), "--generate", "1"])
    assert done.exit_code == 0, done.output
    assert "(3 of 5 continuations are shown; -o FILE writes all)" in done.output
    text.write_text("One text\n")
    done = CliRunner().invoke(app, ["run", str(MODEL), str(text), "--generate", "1"])
    assert "continuations are shown" not in done.output


def test_the_command_says_what_is_no_language_model(tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("A fine film.\n")
    done = CliRunner().invoke(app, ["run", str(MODEL.parent / "demo_model"), str(text), "--generate", "5"])
    assert done.exit_code != 0
    assert "is no language model" in f"{done.output}{done.exception}"


def test_a_folder_that_is_not_there_is_named_before_anything_runs(tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("A fine film.\n")
    done = CliRunner().invoke(app, ["run", str(MODEL), str(text), "-o", str(tmp_path / "nowhere" / "out.jsonl")])
    assert done.exit_code != 0
    assert "nowhere is no folder, expected one to write out.jsonl into" in f"{done.output}{done.exception}"


def test_a_stream_takes_what_a_tokenizer_returns(models):
    from transformers import BatchEncoding

    given = [BatchEncoding({"input_ids": torch.tensor([ids]), "use_cache": False}) for ids in TEXTS]
    outputs = list(sida_ext.stream(models[1], given))
    assert [output.logits.shape[1] for output in outputs] == [len(ids) for ids in TEXTS]
