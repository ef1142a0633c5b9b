"""Predictors that know nothing: what they name follows from the token ids alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sida_ext import HashTable


class ByToken:
    """Names expert ``id % modulo`` for each token, with probability 1/2, in every layer; 1: expert 0 for all.

    Args:
        layers: MoE layers of the stack.
    """

    def __init__(self, modulo: int = 8, layers: int = 2) -> None:
        self.modulo, self.layers = modulo, layers

    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        index = (input_ids % self.modulo)[:, :, None, None].repeat(1, 1, self.layers, 1)
        return HashTable(index, torch.full(index.shape, 0.5))
