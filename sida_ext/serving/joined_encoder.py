"""Texts of different lengths through one encoder together, each with the bits that it has alone.

The texts are padded on the right and share every dense matrix and every expert; attention and pooling see each text's
own tokens only, computed by the functions that the model uses for one text. Where rows share every call they are not
padded (:mod:`sida_ext.serving.packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.batching import padded
from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.serving.attention import SwitchedAttention
from sida_ext.serving.packed import PackedEncoder
from sida_ext.serving.row_exact import RowExact
from sida_ext.serving.shared import attend_shared, is_long

__all__ = ["JoinedEncoder", "batches", "packed_batches", "spare_tokens"]

PADDING = 0.25  # the most padding, as a share of a batch's tokens
SPARE_PRODUCTS = 5_000_000  # see spare_tokens
MOST_SPARE = 512


class JoinedEncoder:
    """Runs texts of one classifier together; used by one thread.

    Args:
        model: a model for which :meth:`fits` is true.
        shared: its rows share every call (:mod:`sida_ext.serving.shared`).
    """

    def __init__(self, model: Any, shared: bool = False) -> None:
        self.model = model
        self.shared = shared
        self.spare = spare_tokens(model)
        self.attention = SwitchedAttention(model)
        packs = shared and PackedEncoder.fits(model.encoder)
        self.packed = PackedEncoder(model.encoder, self.attention) if packs else None

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model's texts can be joined."""
        return isinstance(model, SwitchTransformersForSequenceClassification)

    @torch.no_grad()
    def logits(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The logits [labels] of each text, in the order of the texts."""
        lengths = list(map(len, prompts))
        found: list[Tensor | None] = [None] * len(prompts)
        for batch in batches(lengths, self.spare) if self.packed is None else packed_batches(lengths):
            for place, logits in zip(batch, self._batch([prompts[place] for place in batch]), strict=True):
                found[place] = logits
        return [logits for logits in found if logits is not None]

    def _batch(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        if len(prompts) == 1:
            ids, mask = padded(prompts)
            return [self.model(input_ids=ids, attention_mask=mask).logits[0].float()]
        if self.packed is not None:
            hidden, packing = self.packed.hidden(prompts)
            texts = [hidden[:, first:last] for first, last in packing.bounds]
        else:
            texts = self._padded(prompts)
        pooled = self.model.dropout(_means(texts))
        if self.shared:  # the classifier's rows too
            return list(self.model.classifier(pooled).float())
        return [self.model.classifier(row)[0].float() for row in pooled.split(1)]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The last hidden states of each text, of a batch with padding behind the shorter ones."""
        lengths = list(map(len, prompts))
        longest = max(lengths)
        ids, mask = padded(prompts)
        spans = torch.tensor([(row, 0, length, 0) for row, length in enumerate(lengths)])

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
        ) -> tuple[Tensor, None]:
            bias = options.pop("position_bias", None)
            if self.shared and not is_long(longest, longest):
                return attend_shared(module, query, key, value, spans, False, options, bias), None
            alone = self.attention.alone(module)
            output = query.new_zeros(query.shape[0], longest, query.shape[1], value.shape[3])
            for row, length in enumerate(lengths):
                own = (slice(row, row + 1), slice(None), slice(length))
                if bias is not None:
                    options["position_bias"] = bias[:, :, :length, :length]
                row_mask = None if mask is None or self.shared else mask[row : row + 1, ..., :length]
                output[row, :length] = alone(module, query[own], key[own], value[own], row_mask, **options)[0][0]
            return output, None

        with self.attention.switched(attend), nullcontext() if self.shared else RowExact(lengths):
            hidden = self.model.encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return [hidden[row : row + 1, :length] for row, length in enumerate(lengths)]


def _means(texts: Sequence[Tensor]) -> Tensor:
    """:func:`~sida_ext.models.classification.masked_mean` of texts [1, tokens, d_model] without padding: [texts,
    d_model]."""
    totals = torch.cat([text.sum(dim=1, dtype=torch.float32) for text in texts])
    return (totals / torch.tensor([[text.shape[1]] for text in texts])).to(texts[0].dtype)


def spare_tokens(model: nn.Module) -> int:
    """How many tokens of padding cost no more than the calls of a batch of their own.

    A matrix's call and what surrounds it is counted as :data:`SPARE_PRODUCTS` multiply-adds, some 0.2 ms: much beside
    the products of a small model, nothing beside those of a large one.
    """
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum(matrix.in_features * matrix.out_features for matrix in matrices)
    return min(MOST_SPARE, SPARE_PRODUCTS * len(matrices) // max(products, 1))


def packed_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Positions of texts that are packed together: all but the long ones, whose attention is torch's."""
    found: list[list[int]] = [[], *([place] for place, length in enumerate(lengths) if is_long(length, length))]
    found[0] = [place for place, length in enumerate(lengths) if not is_long(length, length)]
    return [batch for batch in found if batch]


def batches(lengths: Sequence[int], spare: int = 0) -> list[list[int]]:
    """Positions of texts that run together: of similar length, so that little of a batch is padding.

    Args:
        spare: tokens of padding that a batch may have in any case.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    found: list[list[int]] = []
    tokens = 0
    for place in order:
        batch = found[-1] if found else None
        if batch is not None:
            whole = lengths[batch[0]] * (len(batch) + 1)
            padding = whole - tokens - lengths[place]
            if padding <= max(PADDING * whole, spare):
                batch.append(place)
                tokens += lengths[place]
                continue
        found.append([place])
        tokens = lengths[place]
    return found
