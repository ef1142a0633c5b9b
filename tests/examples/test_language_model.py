"""The bundled language model, the script that trains it, and the n-gram model that it is measured against."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, Qwen3MoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from examples import gated_experts, kneser_ney, running_text, train_demo_language_model

MODEL = train_demo_language_model.DEMO_LANGUAGE_MODEL
SHAPE = {"layers": 1, "experts": 4, "top-k": 2, "d-model": 16, "width": 8, "head-dim": 8, "vocab": 300}
BRIEF = {"length": 16, "batch": 2, "documents": 3, "eval-tokens": 64, "table-tokens": 64, "steps": 2}
TINY = [part for name, value in (SHAPE | BRIEF).items() for part in (f"--{name}", str(value))]


def test_every_document_is_in_one_split_and_both_domains_are_in_each():
    names: dict[str, set[tuple[str, str]]] = {}
    for split in running_text.SPLITS:
        documents = running_text.load_documents(split)
        names[split] = {(document.domain, document.name) for document in documents}
        assert len(names[split]) == len(documents)
        assert {document.domain for document in documents} == set(running_text.DOMAINS)
    for one, other in itertools.combinations(names.values(), 2):
        assert not one & other
    with pytest.raises(ValueError, match="split is 'test', expected one of train"):
        running_text.load_documents("test")
    with pytest.raises(ValueError, match="domain is 'law', expected one of literature"):
        running_text.load_documents("train", "law")


def test_passages_keep_the_text_in_order_and_say_whose_it_is():
    given = running_text.load_documents("held_out", "documentation")[:5]
    cut = running_text.passages(given, 400)
    assert len(cut) > len(given)
    for document in given:
        parts = [part.text for part in cut if part.name == document.name]
        assert all(len(part) >= 200 for part in parts)
        at = 0
        for part in parts:
            at = document.text.index(part, at) + len(part)
    with pytest.raises(ValueError, match="characters is 0, expected at least 1"):
        running_text.passages(given, 0)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_kneser_ney_gives_a_distribution_after_every_context(order):
    rng = np.random.default_rng(order)
    vocab = 7
    tokens = (rng.zipf(1.5, 3000) % vocab).astype(np.int64)
    model = kneser_ney.KneserNey(tokens, order, vocab)
    for context in [tokens[: order - 1], tokens[5 : 5 + order - 1], np.full(order - 1, vocab - 1)]:
        rows = [np.append(context, token) for token in range(vocab)]
        total = sum(math.exp(model.log_probabilities(row)[-1]) for row in rows)
        assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("vocab", [9, 60])
def test_kneser_ney_bigram_by_hand(vocab):
    """An interpolated bigram model written out with dictionaries, with estimated discounts and without."""
    rng = np.random.default_rng(3)
    tokens = (rng.zipf(1.4, 400) % vocab).astype(np.int64)
    pairs: dict[tuple[int, int], int] = {}
    for pair in itertools.pairwise(tokens.tolist()):
        pairs[pair] = pairs.get(pair, 0) + 1
    before: dict[int, int] = {}
    for _, last in pairs:
        before[last] = before.get(last, 0) + 1

    def discounts(counts: list[int]) -> list[float]:
        n = [counts.count(k) for k in (1, 2, 3, 4)]
        if min(n) == 0:
            return [0.5, 1.0, 1.5]
        share = n[0] / (n[0] + 2 * n[1])
        return [min(max(k - (k + 1) * share * n[k] / n[k - 1], 0.0), k) for k in (1, 2, 3)]

    d2, d1 = discounts(list(pairs.values())), discounts(list(before.values()))
    first, second = 1, int(tokens[1])

    def unigram(token: int) -> float:
        count, total = before.get(token, 0), sum(before.values())
        left = sum(d1[min(c, 3) - 1] for c in before.values()) / total
        return (count - d1[min(count, 3) - 1] if count else 0.0) / total + left / vocab

    behind = {last: count for (one, last), count in pairs.items() if one == first}
    total = sum(behind.values())
    count = behind.get(second, 0)
    wanted = (count - d2[min(count, 3) - 1] if count else 0.0) / total
    wanted += sum(d2[min(c, 3) - 1] for c in behind.values()) / total * unigram(second)
    found = kneser_ney.KneserNey(tokens, 2, vocab).log_probabilities(np.array([first, second]))[1]
    assert math.exp(found) == pytest.approx(wanted, rel=1e-12)


def test_kneser_ney_names_what_it_cannot_count():
    with pytest.raises(ValueError, match="the text has 2 tokens, expected at least the order, 3"):
        kneser_ney.KneserNey(np.zeros(2, np.int64), 3, 4)
    with pytest.raises(ValueError, match="order is 6, expected 2 to 5"):
        kneser_ney.KneserNey(np.zeros(10, np.int64), 6, 4096)


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_of_the_training_are_transformers_own(top_k):
    """Output and every gradient against transformers' eager loop, in float64; one expert gets no token."""
    torch.manual_seed(top_k)
    config = OlmoeConfig(hidden_size=12, intermediate_size=10, num_experts=6, num_experts_per_tok=top_k)
    config._experts_implementation = "eager"
    experts = OlmoeExperts(config).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(9, top_k, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(5)[:top_k] for _ in range(9)])
    inputs = [x, weight, *experts.parameters()]
    given = torch.randn(9, 12, dtype=torch.float64)
    found = gated_experts.gated_training_forward(experts, x, index, weight)
    wanted = experts(x, index, weight)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found, inputs, given), torch.autograd.grad(wanted, inputs, given), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_experts_of_the_training_refuse_another_activation():
    config = OlmoeConfig(hidden_size=4, intermediate_size=4, num_experts=2, num_experts_per_tok=1, hidden_act="gelu")
    experts = OlmoeExperts(config)
    with pytest.raises(ValueError, match="expected SiLU"):
        gated_experts.gated_training_forward(
            experts, torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
        )


@pytest.mark.parametrize(("family", "config"), [("olmoe", OlmoeConfig), ("qwen3_moe", Qwen3MoeConfig)])
def test_the_script_trains_two_steps_and_writes_a_model_that_transformers_reads(family, config, tmp_path):
    train_demo_language_model.main(
        [*TINY, "--family", family, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "model")]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(model.config, config)
    assert model.dtype == torch.bfloat16
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["training_steps"] == 2
    assert metrics["training_tokens"] == 2 * 2 * 16
    assert metrics["held_out"]["both"]["tokens"] == 2 * 64
    assert len(metrics["routing"]) == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("  Emma said:\n\tdef f(): pass", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "  Emma said:\n\tdef f(): pass"
    assert model.generate(ids, max_new_tokens=2, do_sample=False, min_new_tokens=2).shape[1] == ids.shape[1] + 2


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path):
    given = [*TINY, "--steps", "4", "--work", str(tmp_path)]
    one = train_demo_language_model.Training(train_demo_language_model.parse(given))
    losses = [one.one_step()["loss"] for _ in range(2)]
    one.save()
    losses += [one.one_step()["loss"] for _ in range(2)]
    other = train_demo_language_model.Training(train_demo_language_model.parse([*given, "--resume"]))
    other.load()
    assert [other.one_step()["loss"] for _ in range(2)] == losses[2:]
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_resuming_needs_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to go on from"):
        train_demo_language_model.Training(
            train_demo_language_model.parse([*TINY, "--resume", "--work", str(tmp_path)])
        )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--top-k", "33"], "--top-k is 33, expected at most the 32 experts"),
        (["--d-model", "100"], "--d-model is 100, expected a multiple of --head-dim 32"),
        (["--workers", "3"], "--batch is 4, expected a multiple of --workers 3"),
        (["--layers", "0"], "--layers is 0, expected at least 1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(capsys, given, said):
    with pytest.raises(SystemExit):
        train_demo_language_model.parse(given)
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((MODEL / "metrics.json").read_text())


def test_bundled_model_has_the_size_that_it_should(metrics):
    config = json.loads((MODEL / "config.json").read_text())
    assert config["num_hidden_layers"] >= 6
    assert (config["num_experts"], config["num_experts_per_tok"]) == (32, 4)
    assert metrics["file_bytes"] == (MODEL / "model.safetensors").stat().st_size <= 25_000_000


@pytest.mark.parametrize("domain", ["literature", "documentation"])
def test_bundled_model_reads_held_out_text_as_its_metrics_say(metrics, domain):
    """By transformers alone: the first windows of the held-out text, each read from its beginning."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="eager").eval()
    said, window = metrics["held_out_sample"][domain], metrics["window"]
    documents = running_text.load_documents("held_out", domain)
    ids = [tokenizer.eos_token_id]
    for document in documents:
        ids += [*tokenizer(document.text[:20_000])["input_ids"], tokenizer.eos_token_id]
        if len(document.text) > 20_000 or len(ids) > said["tokens"]:
            break
    assert len(ids) > said["tokens"], "the sample does not lie in the part that was tokenized"
    total = 0.0
    for start in range(0, said["tokens"], window):
        row = torch.tensor(ids[start : start + window + 1])
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0]
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    assert math.exp(total / said["tokens"]) == pytest.approx(said["perplexity"], rel=1e-3)


def test_bundled_model_is_better_than_n_grams_and_uses_its_experts(metrics):
    held_out = metrics["held_out"]
    for name in (*running_text.DOMAINS, "both"):
        assert held_out[name]["perplexity"] < 0.9 * held_out[name]["kneser_ney_3_gram_perplexity"], name
    assert held_out["both"]["perplexity"] < held_out["both"]["kneser_ney_5_gram_perplexity"]
    assert all(layer["entropy"] > 0.85 and layer["busiest_expert_share"] < 0.2 for layer in metrics["routing"])


def test_windows_that_keep_to_their_own_experts_have_information():
    experts, rows, length = 8, 4, 5
    own = torch.full((rows, length, experts), -20.0)
    for row in range(rows):
        own[row, :, 2 * row : 2 * row + 2] = 0.0
    found = train_demo_language_model.window_information((own.flatten(0, 1),), rows)
    assert found.item() == pytest.approx(math.log(rows) / math.log(experts), abs=1e-5)
    same = own[:1].expand(rows, -1, -1).flatten(0, 1)
    assert train_demo_language_model.window_information((same,), rows).item() == pytest.approx(0.0, abs=1e-6)
    both = train_demo_language_model.window_information((own.flatten(0, 1), same), rows)
    assert both.item() == pytest.approx(found.item() / 2, abs=1e-6)


@pytest.mark.parametrize("characters", [1, 100_000, 1_500_000, None])
def test_training_texts_are_the_first_characters_of_a_domain(characters):
    given = ["--documents", "3"] if characters is None else ["--characters", str(characters)]
    texts = train_demo_language_model.training_texts("literature", train_demo_language_model.parse(given))
    whole = [document.text for document in running_text.load_documents("train", "literature")]
    if characters is None:
        assert texts == whole[:3]
    else:
        assert sum(map(len, texts)) == characters
        assert "".join(whole).startswith("".join(texts))
        assert texts[:-1] == whole[: len(texts) - 1]
