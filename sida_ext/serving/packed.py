"""Texts of any lengths through the encoder of a Switch Transformers model one behind the other, as one row without
padding. Only where rows share every call (:mod:`sida_ext.serving.shared`): then a text has the bits that it has alone.

Attention and the count of an expert's tokens see each text's own tokens; everything else goes token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersStack

from sida_ext.models.layers import swapped_layers
from sida_ext.models.packed_rows import Packing
from sida_ext.models.switch import SparseMLP, SwitchFamily
from sida_ext.serving.attention import SwitchedAttention
from sida_ext.serving.shared import attend_shared

__all__ = ["PackedEncoder"]


class PackedEncoder:
    """Used by one thread.

    Args:
        stack: a SwitchTransformersStack for which :meth:`fits` is true.
        attention: of its model.
    """

    def __init__(self, stack: Any, attention: SwitchedAttention) -> None:
        self._stack = stack
        self._attention = attention
        self._routers: list[Any] = [layer.router for layer in swapped_layers(stack)]

    @staticmethod
    def fits(stack: nn.Module) -> bool:
        """Whether it is that of a Switch Transformers model whose experts are served and chosen by its own routers."""
        layers = SwitchFamily.layers(stack).values()
        return isinstance(stack, SwitchTransformersStack) and all(
            isinstance(layer, SparseMLP) and layer.routing == "router" for layer in layers
        )

    @torch.no_grad()
    def hidden(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Packing]:
        """The last hidden states [1, T, d_model] of all texts, and where each text is.

        Args:
            texts: token ids, none longer than :data:`~sida_ext.serving.shared.LONG`.
        """
        packing = Packing(list(map(len, texts)))
        ids = torch.tensor([[token for text in texts for token in text]])
        spans = torch.tensor([(0, first, last, 0, first, last) for first, last in packing.bounds])

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
        ) -> tuple[Tensor, None]:
            bias = options.pop("position_bias")
            return attend_shared(module, query, key, value, spans, False, options, bias), None

        with self._told(packing), self._attention.switched(attend):
            return self._stack(input_ids=ids, return_dict=True).last_hidden_state, packing

    @contextmanager
    def _told(self, packing: Packing) -> Iterator[None]:
        """Inside, the routers know where the texts are, and the learned bias is that of one text: of the longest, whose
        first rows and columns are those of all others."""
        first = self._stack.block[0].layer[0].SelfAttention
        longest = max(packing.lengths)
        bias = first.compute_bias(longest, longest).contiguous()
        first.compute_bias = lambda *given, **options: bias
        for router in self._routers:
            router.packing = packing
        try:
            yield
        finally:
            for router in self._routers:
                router.packing = None
            del first.compute_bias
