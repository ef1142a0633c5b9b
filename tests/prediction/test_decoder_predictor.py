"""The decoder's predictors by themselves: errors, files, padding, the folded step."""

from __future__ import annotations

import pytest
import torch
from transformers import SwitchTransformersForConditionalGeneration

from sida_ext import HashPredictor, PredictorError, TokenTablePredictor
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.protocol import RecurrentPredictor, TokenTableDecoder, load_predictor
from tests.support.decoders import EXPERTS, LAYERS, Random, generate, recurrent
from tests.support.reference import build, small_config

pytestmark = pytest.mark.usefixtures("one_thread")


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
    model.sida.decoder_predictor = HashPredictor.for_model(model, "paper", hidden=16)
    with pytest.raises(PredictorError, match="decoder_predictor is HashPredictor, expected an object with start"):
        generate(model)


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
        (lambda p: p.start(torch.zeros(2, 3, 5), None), r"encoder_output has shape \(2, 3, 5\), expected \[B, S, 24\]"),
        (lambda p: p.start(torch.zeros(2, 3, 24), torch.ones(2, 4)), r"attention_mask has shape \(2, 4\)"),
        (
            lambda p: p.step(p.start(torch.zeros(2, 3, 24), None), torch.ones(3, 1, dtype=torch.int64)),
            "the state is of 2 rows, input_ids of 3",
        ),
        (
            lambda p: p.step(p.start(torch.zeros(2, 3, 24), None), torch.full((2, 1), -1)),
            r"input_ids\[0, 0\] is -1; the model knows tokens from 0 on",
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
