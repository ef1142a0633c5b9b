"""The DecoderNet's step for one token a row, with its weights multiplied out: the same function in fewer calls.

A step of one token is bound by the number of calls, not by arithmetic. What of a layer is linear is joined here: the
norms' weights go into the products behind them; the router, which reads norm(embedding + lift(y)), becomes a product of
the embedding, made for all layers at once, and one of y, whose norm follows from inner products:

    |e + L y|^2 = |e|^2 + 2 (L' e) . y + y . (L' L) y

so that nothing of the model's width is computed for each layer. The result differs from the network's by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sida_ext.prediction.decoder_net import DecoderNet, DecoderState
from sida_ext.prediction.shadow_net import ShadowMoE


class FoldedStep:
    """A DecoderNet's weights as they are at construction, folded.

    Args:
        net: in eval mode; changing its weights later changes nothing here.
    """

    def __init__(self, net: DecoderNet) -> None:
        with torch.no_grad():
            self.enter = None if net.enter is None else (net.enter.weight.detach(), net.enter.bias.detach())
            self.cells = [self._cell(cell) for cell in net.cells]
            moe: list[Any] = list(net.moe)
            self.layers = [self._layer(layer) for layer in moe]
            self.experts = moe[0].router.weight.shape[0]
            self.lifted = moe[0].lift is not None
            self.eps = moe[0].norm.eps
            if self.lifted:
                # One product for all layers: first what each router takes of the embedding, then each lift, then each
                # lift's bias.
                parts = [self._of_embedding(layer) for layer in moe]
                self.embedding_weight = torch.cat([*(w for w, _, _, _ in parts), *(w for _, _, w, _ in parts)])
                self.embedding_bias = torch.cat([*(b for _, b, _, _ in parts), *(b for _, _, _, b in parts)])

    @staticmethod
    def _cell(cell: Any) -> tuple[Tensor, ...]:
        gru = cell.recall
        return (
            gru.weight_ih_l0 * cell.recall_norm.weight,
            gru.weight_hh_l0.detach(),
            gru.bias_ih_l0.detach(),
            gru.bias_hh_l0.detach(),
            cell.recalled.weight.detach().T.contiguous(),
            cell.query.weight * cell.look_norm.weight,
            cell.out.weight.detach().T.contiguous(),
        )

    @staticmethod
    def _layer(layer: ShadowMoE) -> tuple[Tensor, ...]:
        """The product of norm(x) without its weight, and what is added to x of softmax and activation."""
        router, inner = layer.router.weight * layer.norm.weight, layer.inner_norm.weight
        rows: list[Tensor] = []
        biases: list[Tensor] = []
        if layer.lift is None:
            rows.append(router)
            biases.append(layer.router.bias)
        else:
            lift = layer.lift.weight * inner
            rows += [router @ lift, lift.T @ lift / lift.shape[0]]
            biases += [router.new_zeros(router.shape[0]), router.new_zeros(lift.shape[1])]
        rows.append(layer.wi.weight * inner)
        biases.append(layer.wi.bias)
        back = torch.cat([layer.expert_mean.weight, layer.wo.weight], dim=1).T.contiguous()
        return torch.cat(rows), torch.cat(biases), back, layer.router.bias.detach()

    @staticmethod
    def _of_embedding(layer: ShadowMoE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a lifted layer needs of the embedding e, with L and b of its lift: weight and bias of its router's share
        and of 2 L' (e + b) / d_model, and those of (2 e . b + b . b) / d_model."""
        assert layer.lift is not None  # for the type checker: only lifted layers come here
        router, bias = layer.router.weight * layer.norm.weight, layer.lift.bias
        lift = 2 * (layer.lift.weight * layer.inner_norm.weight).T / bias.shape[0]
        joined = torch.cat([router, lift])
        return joined, joined @ bias, 2 * bias[None] / bias.shape[0], (bias @ bias)[None] / bias.shape[0]

    def __call__(self, embedding: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As DecoderNet.forward for embedding [B, 1, d_model]: logits [B, 1, layers, experts] and the state after."""
        e = embedding[:, 0]
        x = e if self.enter is None else F.linear(e, *self.enter)
        hidden, experts, count = x.shape[1], self.experts, len(self.layers)
        if self.lifted:
            told = F.linear(e, self.embedding_weight, self.embedding_bias)
            *of_layer, rest = told.split([*[experts + hidden] * count, count], dim=1)
            # The mean square of embedding + lift, less what depends on y; for all layers.
            means = (rest + (e.square().mean(1, keepdim=True) + self.eps)).split(1, dim=1)
        logits, memory = [], []
        for number, (weight, bias, back, router_bias) in enumerate(self.layers):
            if number < len(self.cells):
                x, after = self._recall(x, state, number)
                memory.append(after)
            y = F.rms_norm(x, (hidden,), eps=self.eps)
            found = F.linear(y, weight, bias)
            if self.lifted:
                found, inner = found.split([experts + hidden, found.shape[1] - experts - hidden], dim=1)
                chosen, lifted = (found + of_layer[number]).split([experts, hidden], dim=1)
                scale = (means[number] + torch.linalg.vecdot(lifted, y)[:, None]).rsqrt()
                chosen = torch.addcmul(router_bias, chosen, scale)
            else:
                chosen, inner = found.split([experts, found.shape[1] - experts], dim=1)
            logits.append(chosen)
            x = torch.addmm(x, torch.cat([chosen.softmax(1), F.gelu(inner)], dim=1), back)
        after_all = DecoderState(state.keys, state.values, state.bias, torch.stack(memory, dim=1))
        return torch.stack(logits, dim=1)[:, None], after_all

    def _recall(self, x: Tensor, state: DecoderState, number: int) -> tuple[Tensor, Tensor]:
        from_x, from_memory, bias_x, bias_memory, recalled, query, out = self.cells[number]
        width = (x.shape[1],)
        memory = torch.gru_cell(F.rms_norm(x, width), state.memory[:, number], from_x, from_memory, bias_x, bias_memory)
        x = torch.addmm(x, memory, recalled)
        keys = state.keys[:, number]
        if keys.shape[2]:
            asked = F.linear(F.rms_norm(x, width), query).unflatten(1, (keys.shape[1], 1, -1))
            seen = F.scaled_dot_product_attention(asked, keys, state.values[:, number], attn_mask=state.bias)
            x = torch.addmm(x, seen.flatten(1), out)
        return x, memory
