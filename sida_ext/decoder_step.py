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

from .decoder_net import DecoderNet, DecoderState
from .shadow_net import ShadowMoE


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
                of_embedding = [self._of_embedding(layer) for layer in moe]
                self.embedding_weight = torch.cat([weight for weight, _ in of_embedding])
                self.embedding_bias = torch.cat([bias for _, bias in of_embedding])

    @staticmethod
    def _cell(cell: Any) -> tuple[Tensor, ...]:
        gru = cell.recall
        return (
            gru.weight_ih_l0 * cell.recall_norm.weight,
            gru.weight_hh_l0.detach(),
            gru.bias_ih_l0.detach(),
            gru.bias_hh_l0.detach(),
            cell.recalled.weight.detach(),
            cell.query.weight * cell.look_norm.weight,
            cell.out.weight.detach(),
        )

    @staticmethod
    def _layer(layer: ShadowMoE) -> tuple[Tensor, ...]:
        """The product of norm(x) without its weight, and what is added to x of softmax and activation."""
        router, inner = layer.router.weight * layer.norm.weight, layer.inner_norm.weight
        rows, biases = [], []
        if layer.lift is None:
            rows.append(router)
            biases.append(layer.router.bias)
        else:
            lift = layer.lift.weight * inner
            rows += [router @ lift, lift.T @ lift]
            biases += [torch.zeros(router.shape[0]), torch.zeros(lift.shape[1])]
        rows.append(layer.wi.weight * inner)
        biases.append(layer.wi.bias)
        back = torch.cat([layer.expert_mean.weight, layer.wo.weight], dim=1)
        return torch.cat(rows).contiguous(), torch.cat(biases), back, layer.router.bias.detach()

    @staticmethod
    def _of_embedding(layer: ShadowMoE) -> tuple[Tensor, Tensor]:
        """What a lifted layer needs of the embedding e: its router, 2 L' (e + b), and 2 e . b + b . b."""
        assert layer.lift is not None  # for the type checker: only lifted layers come here
        router, bias = layer.router.weight * layer.norm.weight, layer.lift.bias
        lift = 2 * (layer.lift.weight * layer.inner_norm.weight).T
        return torch.cat([router, lift, 2 * bias[None]]), torch.cat([router @ bias, lift @ bias, (bias @ bias)[None]])

    def __call__(self, embedding: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As DecoderNet.forward for embedding [B, 1, d_model]: logits [B, 1, layers, experts] and the state after."""
        e = embedding[:, 0]
        x = e if self.enter is None else F.linear(e, *self.enter)
        width, experts = (x.shape[1],), self.experts
        if self.lifted:
            told = (
                F.linear(e, self.embedding_weight, self.embedding_bias).unflatten(1, (len(self.layers), -1)).unbind(1)
            )
            length = e.square().sum(1, keepdim=True)
        logits, memory = [], []
        for number, (weight, bias, back, router_bias) in enumerate(self.layers):
            if number < len(self.cells):
                x, after = self._recall(x, state, number)
                memory.append(after)
            y = F.rms_norm(x, width, eps=self.eps)
            found = F.linear(y, weight, bias)
            if self.lifted:
                of_router, of_lift, rest = told[number].split([experts, width[0], 1], dim=1)
                chosen, lifted, inner = found.split([experts, width[0], found.shape[1] - experts - width[0]], dim=1)
                mean = (length + rest + ((of_lift + lifted) * y).sum(1, keepdim=True)) / e.shape[1]
                chosen = torch.addcmul(router_bias, of_router + chosen, (mean + self.eps).rsqrt())
            else:
                chosen, inner = found.split([experts, found.shape[1] - experts], dim=1)
            logits.append(chosen)
            x = x + F.linear(torch.cat([chosen.softmax(1), F.gelu(inner)], dim=1), back)
        after_all = DecoderState(state.keys, state.values, state.bias, torch.stack(memory, dim=1))
        return torch.stack(logits, dim=1)[:, None], after_all

    def _recall(self, x: Tensor, state: DecoderState, number: int) -> tuple[Tensor, Tensor]:
        from_x, from_memory, bias_x, bias_memory, recalled, query, out = self.cells[number]
        width = (x.shape[1],)
        memory = torch.gru_cell(F.rms_norm(x, width), state.memory[:, number], from_x, from_memory, bias_x, bias_memory)
        x = x + F.linear(memory, recalled)
        keys = state.keys[:, number]
        if keys.shape[2]:
            asked = F.linear(F.rms_norm(x, width), query).unflatten(1, (keys.shape[1], 1, -1))
            seen = F.scaled_dot_product_attention(asked, keys, state.values[:, number], attn_mask=state.bias)
            x = x + F.linear(seen.flatten(1), out)
        return x, memory
