"""A predictor answers on its own device, wherever the model and its tokens are."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

from sida_ext.prediction.decoder_net import DecoderState
from sida_ext.prediction.decoder_predictor import RecurrentPredictor, TokenTableDecoder
from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.prediction.token_table import TokenTablePredictor
from tests.support.reference import build, small_config

TOKENS = torch.tensor([[5, 6, 7], [8, 9, 3]])


class Elsewhere(torch.Tensor):
    """A tensor of another device, as far as a machine without one can have it: it can be asked for its shape and moved,
    and no product takes it together with a tensor from here."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        moves = function in (torch.Tensor.to, torch.Tensor.cpu)
        given = [arg.as_subclass(torch.Tensor) if isinstance(arg, Elsewhere) else arg for arg in args]
        if not moves and any(type(arg) is torch.Tensor and arg.dim() for arg in args):
            raise RuntimeError("Expected all tensors to be on the same device")
        result = function(*given, **(kwargs or {}))
        kept = isinstance(result, torch.Tensor) and not moves
        return result.as_subclass(Elsewhere) if kept else result


def elsewhere(tensor):
    return tensor.as_subclass(Elsewhere)


@pytest.fixture(scope="module")
def encoder():
    return build(SwitchTransformersEncoderModel, small_config()).eval()


@pytest.fixture(scope="module")
def seq2seq():
    return build(SwitchTransformersForConditionalGeneration, small_config(num_decoder_layers=4)).eval()


def test_the_stand_in_for_another_device_tells_a_mistake():
    with pytest.raises(RuntimeError, match="same device"):
        _ = elsewhere(torch.ones(2)) + torch.ones(2)


def test_embeddings_of_a_model_elsewhere_are_copied_here(encoder):
    here = HashPredictor.for_model(encoder).eval()
    # On one device they are the model's own.
    assert here.embedding.data_ptr() == encoder.shared.weight.data_ptr()
    options = here.options
    there = HashPredictor(elsewhere(here.embedding), here.layers, here.experts, "none", **options)
    assert type(there.embedding) is torch.Tensor
    assert there.predict(TOKENS).expert_index.shape == (2, 3, here.layers, 1)


def test_tokens_from_elsewhere_are_predicted_here(encoder):
    predictor = HashPredictor.for_model(encoder).eval()
    expected = predictor.predict(TOKENS, torch.ones_like(TOKENS)).expert_index
    assert torch.equal(predictor.predict(elsewhere(TOKENS), elsewhere(torch.ones_like(TOKENS))).expert_index, expected)
    table = TokenTablePredictor.for_model(encoder)
    assert table.predict(elsewhere(TOKENS)).expert_index.shape == expected.shape


def test_steps_of_a_decoder_elsewhere_are_predicted_here(seq2seq):
    predictor = RecurrentPredictor.for_model(seq2seq).eval().requires_grad_(False)
    told = torch.randn(2, 4, predictor.embedding.shape[1], generator=torch.Generator().manual_seed(0))
    state = predictor.start(elsewhere(told), elsewhere(torch.ones(2, 4)))
    table, state = predictor.step(state, elsewhere(TOKENS[:, :1]))
    expected, _ = predictor.step(predictor.start(told, torch.ones(2, 4)), TOKENS[:, :1])
    assert torch.equal(table.expert_index, expected.expert_index)
    state = predictor.reorder(state, elsewhere(torch.tensor([1, 0])))
    assert all(type(getattr(state, field.name)) is torch.Tensor for field in fields(DecoderState))
    counted = TokenTableDecoder(TokenTablePredictor.for_model(seq2seq, "decoder"))
    assert counted.step(None, elsewhere(TOKENS[:, :1]))[0].expert_index.shape[:2] == (2, 1)


def test_a_folded_step_stands_where_its_network_does(seq2seq):
    """Not where new tensors happen to be made."""
    predictor = RecurrentPredictor.for_model(seq2seq, hidden=8).eval().requires_grad_(False)
    state = predictor.start(torch.zeros(2, 0, predictor.embedding.shape[1]), None)
    with torch.device("meta"):
        folded = predictor._folded_step()
    assert {part.device.type for layer in folded.layers for part in layer} == {"cpu"}
    assert predictor.step(state, TOKENS[:, :1])[0].expert_index.device.type == "cpu"


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_predicted_for_by_the_cpu(encoder, tmp_path):
    HashPredictor.for_model(encoder).save_pretrained(tmp_path)
    expected = HashPredictor.from_pretrained(tmp_path, encoder).predict(TOKENS).expert_index
    moved = build(SwitchTransformersEncoderModel, small_config()).eval().cuda()
    predictor = HashPredictor.from_pretrained(tmp_path, moved)
    assert torch.equal(predictor.predict(TOKENS.cuda()).expert_index, expected)
    assert torch.equal(predictor.cuda().predict(TOKENS.cuda()).expert_index.cpu(), expected)
