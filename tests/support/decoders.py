"""An encoder-decoder with swapped experts that generates, and predictors of its decoder."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.cache_utils import Cache

import sida_ext
from sida_ext.prediction.cache_names import cache_argument
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.protocol import RecurrentPredictor

EXPERTS, LAYERS = 8, 2
GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def swap(reference, **changes):
    return sida_ext.swap_experts(copy.deepcopy(reference), **{"expert_dtype": "float32", **changes})


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
    """A DecoderPredictor that is wrong on purpose: names any experts, as many as it likes, and says so with any
    confidence."""

    def __init__(self, seed: int, layers: int = LAYERS) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.layers = layers

    def start(self, encoder_output, attention_mask):
        return encoder_output.shape[0]

    def step(self, state, input_ids):
        assert state == input_ids.shape[0]
        count = int(torch.randint(1, EXPERTS + 1, (), generator=self.random))
        shape = (*input_ids.shape, self.layers, count)
        index = torch.rand((*shape[:3], EXPERTS), generator=self.random).argsort(-1)[..., :count]
        gate = torch.rand(shape, generator=self.random)
        absent = torch.rand(shape, generator=self.random) < 0.3
        return HashTable(index.masked_fill(absent, -1), gate.masked_fill(absent, 0)), state

    def reorder(self, state, index):
        return int(index.numel())


def cached(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The keyword under which this release's model takes a cache."""
    return {cache_argument(model): cache}
