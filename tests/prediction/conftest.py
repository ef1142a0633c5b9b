"""A small encoder-decoder, plain and with swapped experts. Others are defined where they are used."""

from __future__ import annotations

import pytest
from transformers import SwitchTransformersForConditionalGeneration

from tests.support.decoders import swap
from tests.support.reference import build, small_config


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


@pytest.fixture
def model(swapped):
    swapped.sida.decoder_predictor = None
    yield swapped
    swapped.sida.decoder_predictor = None
