"""A small shadow of the model's own stack: its attention and dense layers, with a cheap stand-in for every MoE layer.

A router's choice depends on the token, on what attention brought to it and on what earlier experts added. The shadow
computes the first two as the model does (its weights start as copies where the sizes agree) and learns a stand-in for
the third: a narrow feed-forward step and one vector for each expert, weighted by the routing it has just predicted, so
that every layer is conditioned on the prediction of the layers before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

_MASKED = -1e9  # finite, so that a row without any token gives numbers and not NaN
_MOST_HIDDEN = 160


class ShadowAttention(nn.Module):
    """Self-attention as in T5 and Switch: a learned bias by relative position, scores not scaled, pre-norm."""

    def __init__(self, hidden: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.qkv = nn.Linear(hidden, 3 * inner, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)
        # As transformers starts such layers: queries take the scale that the scores do without.
        nn.init.normal_(self.qkv.weight[:inner], std=(hidden * inner / heads) ** -0.5)
        nn.init.normal_(self.qkv.weight[inner:], std=hidden**-0.5)
        nn.init.normal_(self.out.weight, std=0.3 * inner**-0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class ShadowDense(nn.Module):
    """The dense feed-forward layer of a block without experts."""

    def __init__(self, hidden: int, d_ff: int, activation: str, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.wi = nn.Linear(hidden, d_ff, bias=False)
        self.wo = nn.Linear(d_ff, hidden, bias=False)
        self.activation = ACT2FN[activation]
        nn.init.normal_(self.wi.weight, std=hidden**-0.5)
        nn.init.normal_(self.wo.weight, std=0.3 * d_ff**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wo(self.activation(self.wi(self.norm(x))))


class ShadowMoE(nn.Module):
    """A copy of the router, and a stand-in for what its experts add.

    The router reads the model's width. A narrower shadow does not carry all of a token's embedding, so there the router
    reads the embedding itself plus what the shadow says has been added to it.
    """

    def __init__(self, d_model: int, experts: int, hidden: int, stand_in: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.router = nn.Linear(d_model, experts)
        self.lift = nn.Linear(hidden, d_model) if hidden != d_model else None
        self.expert_mean = nn.Linear(experts, hidden, bias=False)
        self.inner_norm = nn.RMSNorm(hidden, eps=eps)
        self.wi = nn.Linear(hidden, stand_in)
        self.wo = nn.Linear(stand_in, hidden, bias=False)
        nn.init.normal_(self.router.weight, std=d_model**-0.5)
        nn.init.zeros_(self.router.bias)
        # Starts as a layer that adds nothing.
        nn.init.zeros_(self.expert_mean.weight)
        nn.init.zeros_(self.wo.weight)
        if self.lift is not None:
            nn.init.normal_(self.lift.weight, std=0.1 * hidden**-0.5)
            nn.init.zeros_(self.lift.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner_norm(x)
        residual = x if self.lift is None else embedding + self.lift(y)
        logits = self.router(self.norm(residual))
        return logits, x + self.expert_mean(logits.softmax(dim=-1)) + self.wo(F.gelu(self.wi(y)))


class ShadowNet(nn.Module):
    """The shadow of one encoder stack.

    Args:
        d_model: of the embeddings that are read.
        layers, experts: MoE layers, experts in each.
        pattern: one letter a block, "d" dense or "m" MoE, up to the last MoE block.
        hidden: width of the shadow; d_model means no projection.
        inner, heads: of attention. d_ff, activation: of the dense layers. stand_in: width of the MoE stand-ins.
        reach: relative positions further than this are taken as this far.
        eps: of the norms, as a string, so that it is the same number on every machine.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        experts: int,
        pattern: str,
        hidden: int,
        inner: int,
        heads: int,
        d_ff: int,
        stand_in: int,
        reach: int = 128,
        activation: str = "relu",
        eps: str = "1e-06",
    ) -> None:
        super().__init__()
        if set(pattern) - {"d", "m"} or pattern.count("m") != layers:
            raise ValueError(f"pattern is {pattern!r}, expected letters 'd' and 'm', with {layers} 'm'")
        if inner % heads:
            raise ValueError(f"inner is {inner}, expected a multiple of heads, {heads}")
        self.reach = reach
        self.enter = nn.Linear(d_model, hidden) if hidden != d_model else None
        self.distance_bias = nn.Embedding(2 * reach + 1, heads)
        nn.init.zeros_(self.distance_bias.weight)
        self.attention = nn.ModuleList(ShadowAttention(hidden, inner, heads, float(eps)) for _ in pattern)
        self.feed_forward = nn.ModuleList(
            ShadowMoE(d_model, experts, hidden, stand_in, float(eps))
            if letter == "m"
            else ShadowDense(hidden, d_ff, activation, float(eps))
            for letter in pattern
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Logits [B, S, layers, experts] for embeddings x [B, S, d_model] whose real tokens stand first in each row."""
        embedding = x
        if self.enter is not None:
            x = self.enter(F.rms_norm(x, x.shape[-1:]))
        place = torch.arange(x.shape[1], device=x.device)
        distance = (place[None] - place[:, None]).clamp(-self.reach, self.reach) + self.reach
        bias = self.distance_bias(distance).permute(2, 0, 1)[None].masked_fill(~real[:, None, None, :], _MASKED)
        logits: list[Tensor] = []
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            x = attention(x, bias)
            if isinstance(feed_forward, ShadowMoE):
                layer_logits, x = feed_forward(x, embedding)
                logits.append(layer_logits)
            else:
                x = feed_forward(x)
        return torch.stack(logits, dim=2)


def shadow_options(stack: Any, moe_blocks: tuple[int, ...], hidden: int | None = None, **given: Any) -> dict[str, Any]:
    """The sizes of a shadow of ``stack``: the model's own where it is narrow, else a fixed small width.

    Args:
        stack: a Switch encoder stack.
        moe_blocks: the numbers of its MoE blocks.
        hidden: width; None means d_model, at most 160.
        given: overrides any other size.
    """
    config = stack.config
    hidden = hidden or min(config.d_model, _MOST_HIDDEN)
    own = hidden == config.d_model
    heads = config.num_heads if own else max(hidden // 64, 1)
    return {
        "pattern": "".join("m" if n in moe_blocks else "d" for n in range(moe_blocks[-1] + 1)),
        "hidden": hidden,
        "inner": config.num_heads * config.d_kv if own else 64 * heads if hidden >= 64 else hidden,
        "heads": heads,
        "d_ff": config.d_ff if own else 2 * hidden,
        "stand_in": hidden,
        "reach": config.relative_attention_max_distance,
        "activation": config.dense_act_fn,
        "eps": repr(float(config.layer_norm_epsilon)),
        **given,
    }


@torch.no_grad()
def copy_backbone(net: ShadowNet, stack: Any) -> None:
    """Start the shadow from the model: its routers always, attention and dense layers where the widths agree."""
    device = net.distance_bias.weight.device

    def copy(target: Tensor, source: Tensor) -> None:
        if target.shape == source.shape:
            target.copy_(source.detach().to(device, torch.float32))

    own_width = net.enter is None
    first = stack.block[0].layer[0].SelfAttention
    table = first.relative_attention_bias.weight.detach()
    distance = torch.arange(-net.reach, net.reach + 1, device=table.device)
    bucket = first._relative_position_bucket(
        distance, True, first.relative_attention_num_buckets, first.relative_attention_max_distance
    )
    if own_width:
        copy(net.distance_bias.weight, table[bucket])
    attention: Any
    feed_forward: Any
    for block, attention, feed_forward in zip(stack.block, net.attention, net.feed_forward, strict=False):
        mlp = block.layer[-1].mlp
        if isinstance(feed_forward, ShadowMoE):
            copy(feed_forward.norm.weight, block.layer[-1].layer_norm.weight)
            copy(feed_forward.router.weight, mlp.router.classifier.weight)
            if mlp.router.classifier.bias is not None:
                copy(feed_forward.router.bias, mlp.router.classifier.bias)
        if not own_width:
            continue
        theirs = block.layer[0].SelfAttention
        copy(attention.norm.weight, block.layer[0].layer_norm.weight)
        copy(attention.qkv.weight, torch.cat([theirs.q.weight, theirs.k.weight, theirs.v.weight]))
        copy(attention.out.weight, theirs.o.weight)
        if isinstance(feed_forward, ShadowDense):
            copy(feed_forward.norm.weight, block.layer[-1].layer_norm.weight)
            copy(feed_forward.wi.weight, mlp.wi.weight)
            copy(feed_forward.wo.weight, mlp.wo.weight)
