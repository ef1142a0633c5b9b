"""The network that predicts a decoder's routing: recurrent over steps, with one look at what the encoder said.

A decoder's router reads the token's embedding, what its self-attention recalls of earlier tokens, what its
cross-attention brings from the encoder, and what earlier experts added. A gated recurrent unit stands in for the first
kind of attention, so that a step costs the same however long the text has become; one cross-attention of its own, whose
keys and values are computed once, stands in for the second; shadow layers (see shadow_net) stand in for the experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sida_ext.prediction.shadow_net import ShadowMoE

_MASKED = -1e9  # finite, so that a row whose encoder saw no token gives numbers and not NaN
_MOST_HIDDEN = 160


@dataclass(frozen=True)
class DecoderState:
    """What the network knows of B rows before their next token; row i of every tensor belongs to row i of the batch.

    Attributes:
        keys, values: [B, cells, heads, S, hidden / heads], of the encoder's result.
        bias: [B, 1, 1, S], 0 for tokens and very negative for padding.
        memory: [B, cells, hidden], of the recurrent units.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    memory: Tensor

    @property
    def rows(self) -> int:
        return self.memory.shape[0]

    def select(self, index: Tensor) -> DecoderState:
        """Row i of the result is row index[i]; index [n] integer."""
        return DecoderState(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))


class DecoderCell(nn.Module):
    """Recalls earlier tokens (recurrent unit), then looks at the encoder's result (cross-attention); both residual."""

    def __init__(self, d_model: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.recall_norm, self.look_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.recall = nn.GRU(hidden, hidden, batch_first=True)
        self.recalled = nn.Linear(hidden, hidden, bias=False)
        self.encoder_norm = nn.RMSNorm(d_model)
        self.key_value = nn.Linear(d_model, 2 * hidden, bias=False)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        nn.init.normal_(self.recalled.weight, std=0.3 * hidden**-0.5)
        nn.init.normal_(self.out.weight, std=0.3 * hidden**-0.5)

    def keys_values(self, encoder_output: Tensor) -> Tensor:
        """[2, B, heads, S, hidden / heads] of the encoder's result [B, S, d_model]."""
        both = self.key_value(self.encoder_norm(encoder_output)).unflatten(-1, (2, self.heads, -1))
        return both.permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, hidden] and memory [B, hidden] -> x and the memory after the last token."""
        recalled, memory = self.recall(self.recall_norm(x), memory[None].contiguous())
        x = x + self.recalled(recalled)
        if keys.shape[2]:
            query = self.query(self.look_norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
            x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x, memory[0]


class DecoderNet(nn.Module):
    """Cells and shadow layers over the embeddings of the tokens that the decoder reads.

    Args:
        d_model: of the embeddings and of the encoder's result.
        layers, experts: MoE layers of the decoder, experts in each.
        hidden: width; d_model means no projection. stand_in: inner width of the stand-ins for the experts.
        heads: of the cross-attentions. cells: one before each of the first ``cells`` MoE layers.
        eps: of the model's norms, as a string, so that it is the same number on every machine.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        experts: int,
        hidden: int,
        stand_in: int,
        heads: int = 4,
        cells: int = 1,
        eps: str = "1e-06",
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden is {hidden}, heads is {heads}, expected a width that the heads divide")
        if not 1 <= cells <= layers:
            raise ValueError(f"cells is {cells}, expected 1..{layers} (the number of MoE layers)")
        self.hidden, self.heads = hidden, heads
        self.enter = None if hidden == d_model else nn.Linear(d_model, hidden)
        self.cells = nn.ModuleList(DecoderCell(d_model, hidden, heads) for _ in range(cells))
        self.moe = nn.ModuleList(ShadowMoE(d_model, experts, hidden, stand_in, float(eps)) for _ in range(layers))

    def start(self, encoder_output: Tensor, mask: Tensor) -> DecoderState:
        """State before the first token.

        Args:
            encoder_output: [B, S, d_model] float32; S may be 0.
            mask: [B, S] bool, False for padding.
        """
        both = torch.stack([cell.keys_values(encoder_output) for cell in self.cells], dim=2)  # type: ignore[operator]
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, _MASKED)[:, None, None]
        memory = encoder_output.new_zeros(encoder_output.shape[0], len(self.cells), self.hidden)
        return DecoderState(both[0], both[1], bias, memory)

    def forward(self, embedding: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Logits [B, T, layers, experts] for embeddings [B, T, d_model], and the state after the last of them."""
        x = embedding if self.enter is None else self.enter(embedding)
        logits: list[Tensor] = []
        memory: list[Tensor] = []
        for number, moe in enumerate(self.moe):
            if number < len(self.cells):
                cell = (state.keys[:, number], state.values[:, number], state.bias, state.memory[:, number])
                x, after = self.cells[number](x, *cell)
                memory.append(after)
            layer_logits, x = moe(x, embedding)
            logits.append(layer_logits)
        after_all = DecoderState(state.keys, state.values, state.bias, torch.stack(memory, dim=1))
        return torch.stack(logits, dim=2), after_all


def decoder_options(stack: Any, layers: int, hidden: int | None = None, **given: Any) -> dict[str, Any]:
    """The sizes of a DecoderNet for the decoder ``stack``: as wide as the model up to 160.

    Args:
        stack: a Switch decoder stack.
        layers: its MoE layers.
        hidden: width; None means d_model, at most 160.
        given: overrides any other size.
    """
    hidden = hidden or min(stack.config.d_model, _MOST_HIDDEN)
    heads = next(heads for heads in (4, 3, 2, 1) if hidden % heads == 0)
    eps = repr(float(stack.config.layer_norm_epsilon))
    return {"hidden": hidden, "stand_in": hidden, "heads": heads, "cells": min(2, layers), "eps": eps, **given}


@torch.no_grad()
def copy_routers(net: DecoderNet, stack: Any, blocks: tuple[int, ...]) -> None:
    """Start the shadow layers with the decoder's own routers and the norms before them."""
    shadow: Any
    for shadow, number in zip(net.moe, blocks, strict=True):
        layer = stack.block[number].layer[-1]
        shadow.norm.weight.copy_(layer.layer_norm.weight.detach().float())
        shadow.router.weight.copy_(layer.mlp.router.classifier.weight.detach().float())
        if layer.mlp.router.classifier.bias is not None:
            shadow.router.bias.copy_(layer.mlp.router.classifier.bias.detach().float())
