"""Texts of different lengths through one encoder together, each with the bits that it has alone.

The texts are padded on the right and share every dense matrix and every expert; attention and pooling see each text's
own tokens only, computed by the functions that the model uses for one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.models.classification import SwitchTransformersForSequenceClassification, masked_mean
from sida_ext.serving.attention import SwitchedAttention
from sida_ext.serving.row_exact import RowExact

__all__ = ["JoinedEncoder"]

PADDING = 0.25  # the most padding, as a share of a batch's tokens


class JoinedEncoder:
    """Runs texts of one classifier together; used by one thread.

    Args:
        model: a model for which :meth:`fits` is true.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.attention = SwitchedAttention(model)

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model's texts can be joined."""
        return isinstance(model, SwitchTransformersForSequenceClassification)

    @torch.no_grad()
    def logits(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The logits [labels] of each text, in the order of the texts."""
        found: list[Tensor | None] = [None] * len(prompts)
        for batch in batches(list(map(len, prompts))):
            for place, logits in zip(batch, self._batch([prompts[place] for place in batch]), strict=True):
                found[place] = logits
        return [logits for logits in found if logits is not None]

    def _batch(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        lengths = list(map(len, prompts))
        longest = max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
            mask[row, : len(prompt)] = 1
        if len(prompts) == 1:
            return [self.model(input_ids=ids, attention_mask=mask).logits[0].float()]

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
        ) -> tuple[Tensor, None]:
            alone = self.attention.alone(module)
            bias = options.pop("position_bias", None)
            output = query.new_zeros(query.shape[0], longest, query.shape[1], value.shape[3])
            for row, length in enumerate(lengths):
                own = (slice(row, row + 1), slice(None), slice(length))
                if bias is not None:
                    options["position_bias"] = bias[:, :, :length, :length]
                row_mask = None if mask is None else mask[row : row + 1, ..., :length]
                output[row, :length] = alone(module, query[own], key[own], value[own], row_mask, **options)[0][0]
            return output, None

        with self.attention.switched(attend), RowExact(lengths):
            hidden = self.model.encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        pooled = [
            masked_mean(hidden[row : row + 1, :length], mask[row : row + 1, :length])
            for row, length in enumerate(lengths)
        ]
        return [self.model.classifier(self.model.dropout(part))[0].float() for part in pooled]


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Positions of texts that run together: of similar length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    found: list[list[int]] = []
    tokens = 0
    for place in order:
        batch = found[-1] if found else None
        if batch is not None:
            whole = lengths[batch[0]] * (len(batch) + 1)
            if tokens + lengths[place] >= (1 - PADDING) * whole:
                batch.append(place)
                tokens += lengths[place]
                continue
        found.append([place])
        tokens = lengths[place]
    return found
