"""A model whose vocabulary has grown: predictors made before name experts for its new tokens too."""

from __future__ import annotations

import pytest
import torch
from transformers import SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext.prediction.decoder_predictor import RecurrentPredictor, TokenTableDecoder
from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.prediction.token_table import TokenTablePredictor
from tests.support.reference import build, small_config

OLD, NEW = 97, 120
IDS = torch.tensor([[5, 110, 7, 119, 3], [97, 98, 2, 50, 60]])


def resized(model_class, **options):
    model = sida_ext.swap_experts(build(model_class, small_config()), expert_dtype="float32", **options)
    predictors = {
        "hash": lambda: HashPredictor.for_model(model),
        "paper": lambda: HashPredictor.for_model(model, "paper"),
        "table": lambda: TokenTablePredictor.for_model(model),
        "recurrent": lambda: RecurrentPredictor.for_model(model),
        "decoder table": lambda: TokenTableDecoder(TokenTablePredictor.for_model(model, "decoder")),
    }
    return model, predictors


@pytest.mark.parametrize("kind", ["hash", "paper", "table"])
@pytest.mark.parametrize("routing", ["router", "predicted", "confident"])
def test_stream_takes_new_tokens(routing, kind):
    model, predictors = resized(SwitchTransformersEncoderModel, routing=routing, confidence=0.0)
    predictor = predictors[kind]()
    model.resize_token_embeddings(NEW)
    with model.sida, torch.no_grad():
        (found,) = list(sida_ext.stream(model, [{"input_ids": IDS}], predictor))
        assert bool(torch.isfinite(found.last_hidden_state).all())
        model.sida.predictor = predictor
        torch.testing.assert_close(model(input_ids=IDS).last_hidden_state, found.last_hidden_state)
        table = predictor.predict(IDS)
        assert bool((table.expert_index >= 0).all())  # every token has an expert
        # What stands beside a new token is predicted from it and its neighbours; an old row as ever.
        old = torch.randint(0, OLD, (2, 5), generator=torch.Generator().manual_seed(0))
        assert torch.equal(predictor.predict(old).expert_index, predictors[kind]().predict(old).expert_index)
        with pytest.raises(ValueError, match=r"input_ids\[0, 1\] is 120; the model knows tokens 0..119"):
            list(sida_ext.stream(model, [{"input_ids": torch.tensor([[3, NEW]])}], predictor))


@pytest.mark.parametrize("kind", ["recurrent", "decoder table"])
def test_generate_takes_new_tokens(kind):
    reference = build(SwitchTransformersForConditionalGeneration, small_config())
    model, predictors = resized(SwitchTransformersForConditionalGeneration)
    predictor = predictors[kind]()
    torch.manual_seed(0)
    model.resize_token_embeddings(NEW)
    torch.manual_seed(0)
    reference.resize_token_embeddings(NEW)
    arguments = {"decoder_input_ids": IDS, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with model.sida as runtime, torch.no_grad():
        runtime.decoder_predictor = predictor
        runtime.start_trace()
        assert torch.equal(model.generate(IDS, **arguments), reference.generate(IDS, **arguments))
        assert any(event.kind == "predict" for event in runtime.take_trace())


def test_the_first_choice_is_the_same_however_many_are_asked_for():
    """Experts that a token went to equally often: the stream asks for more candidates than the model by itself."""
    _, predictors = resized(SwitchTransformersEncoderModel)
    table = predictors["table"]()
    ids = torch.arange(2, 60).repeat(2)
    chosen = torch.randint(0, table.experts, (ids.numel(), table.layers), generator=torch.Generator().manual_seed(0))
    table.update(ids, chosen, torch.full(chosen.shape, 0.5))
    first = table.predict(torch.arange(2, 90)[None], top_k=1)
    for top_k in range(2, table.experts + 1):
        more = table.predict(torch.arange(2, 90)[None], top_k=top_k)
        assert torch.equal(more.expert_index[..., :1], first.expert_index)
        assert torch.equal(more.gate[..., :1], first.gate)
