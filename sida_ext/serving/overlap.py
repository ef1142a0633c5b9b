"""Which sequences belong together, and which batch goes next, by the experts that they are predicted to want.

Sets of experts are bits of an integer: expert ``e`` of MoE layer ``l`` is bit ``l * experts + e``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sida_ext.experts.runtime import runtime_of
from sida_ext.models.layers import swapped_layers
from sida_ext.prediction.moe_facts import check_vocabulary
from sida_ext.prediction.prefetch import PrefetchPolicy, candidates_of
from sida_ext.prediction.protocol import Predictor, check_table

__all__ = ["bits_of", "experts_wanted", "grouped", "most_alike"]

# How much shorter than the first row of its batch a row may be: padding is computed too.
LEAST_LENGTH = 0.5


def bits_of(experts_by_layer: Iterable[Iterable[int]], experts: int) -> int:
    """The bits of the experts of each layer; ``experts``: in a layer."""
    found = 0
    for layer, wanted in enumerate(experts_by_layer):
        for expert in wanted:
            found |= 1 << (layer * experts + expert)
    return found


def experts_wanted(model: PreTrainedModel, predictor: Predictor) -> Callable[[Tensor], int]:
    """A function that gives the bits of the experts that a sequence of token ids [S] is predicted to want.

    Args:
        model: with swapped experts.
        predictor: of this model.
    """
    runtime = runtime_of(model)
    layers = sum(layer.table_layer is not None for layer in swapped_layers(model))
    experts, policy = runtime.header.num_experts, PrefetchPolicy()
    vocabulary = cast(Tensor, model.get_input_embeddings().weight).shape[0]

    def wanted(ids: Tensor) -> int:
        row = ids[None]
        check_vocabulary(row, None, vocabulary)
        with torch.no_grad():
            table = predictor.predict(row, torch.ones_like(row), top_k=candidates_of(predictor, experts))
        check_table(table, predictor, row, layers, experts)
        return bits_of(policy.experts_by_layer(table, experts), experts)

    return wanted


def most_alike(held: int, wanted: Sequence[int]) -> int:
    """The place of the set that has the largest share in common with ``held``; of equals the first."""
    return max(range(len(wanted)), key=lambda at: (_alike(held, wanted[at]), -at))


def _alike(first: int, second: int) -> float:
    return (first & second).bit_count() / max((first | second).bit_count(), 1)


def grouped(
    rows: Sequence[tuple[int, Tensor]],
    wanted: Mapping[int, int],
    max_tokens: int | None = None,
    rows_at_most: int | None = None,
) -> list[list[tuple[int, Tensor]]]:
    """Rows in batches whose rows want the same experts.

    Greedy: a batch begins with the longest row that is left, and takes the row that adds the fewest experts to it (of
    equals the one that shares the most, then the longest) until it is full. No row is shorter than half of the first.

    Args:
        rows: (position, token ids [S]).
        wanted: position -> bits of experts.
        max_tokens: of a batch, padding included; one row may have more. None: any number.
        rows_at_most: of a batch; None: any number.
    """
    left = sorted(rows, key=lambda row: (-len(row[1]), row[0]))
    batches = []
    while left:
        batch = [left.pop(0)]
        longest, union = len(batch[0][1]), wanted[batch[0][0]]
        while (max_tokens is None or (len(batch) + 1) * longest <= max_tokens) and len(batch) != rows_at_most:
            fitting = [row for row in left if len(row[1]) >= LEAST_LENGTH * longest]
            if not fitting:
                break

            def cost(row: tuple[int, Tensor], union: int = union) -> tuple[Any, ...]:
                own = wanted[row[0]]
                return (own & ~union).bit_count(), -(own & union).bit_count(), -len(row[1]), row[0]

            best = min(fitting, key=cost)
            left = [row for row in left if row is not best]
            batch.append(best)
            union |= wanted[best[0]]
        batches.append(batch)
    return batches
