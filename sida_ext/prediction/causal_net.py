"""A shadow of a decoder-only model: its attention layers and routers, with a cheap stand-in for every MoE layer.

Nothing in it reads a later token, as nothing in the model does: one table made of a whole prompt is the one that would
have been made token by token. A router of such a model chooses several experts. What the network says of an expert is
therefore not how its share compares with the others', but whether it is among the chosen ones: the distance of its
router logit from the middle between the last that is chosen and the first that is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sida_ext.prediction.moe_facts import StackFacts, router_matrix

_MOST_HIDDEN = 160
_RANKED = 768  # inner width of the experts' own stand-ins, over all experts of a layer
_THETA = 10_000.0


class CausalAttention(nn.Module):
    """Causal self-attention with rotary positions, pre-norm, residual; keys and values may be shared by heads.

    Args:
        norms: of queries and keys: "none", "head" (each head's part on its own) or "all" (all heads' parts together).
    """

    def __init__(
        self, hidden: int, heads: int, shared: int, head_dim: int, norms: str, theta: float, eps: float
    ) -> None:
        super().__init__()
        self.heads, self.shared, self.head_dim, self.norms = heads, shared, head_dim, norms
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.q = nn.Linear(hidden, heads * head_dim)
        self.kv = nn.Linear(hidden, 2 * shared * head_dim)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        width = {"none": None, "head": (head_dim, head_dim), "all": (heads * head_dim, shared * head_dim)}[norms]
        self.q_norm = nn.RMSNorm(width[0], eps=eps) if width else None
        self.k_norm = nn.RMSNorm(width[1], eps=eps) if width else None
        self.register_buffer(
            "frequency", theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), persistent=False
        )
        for linear in (self.q, self.kv):
            nn.init.normal_(linear.weight, std=hidden**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.out.weight, std=0.3 * (heads * head_dim) ** -0.5)

    frequency: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, (k, v) = self.q(y), self.kv(y).chunk(2, dim=-1)
        if self.norms == "all":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.norms == "head":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequency
        cos, sin = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
        q, k = (
            t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k)
        )
        if self.shared != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.shared, dim=1) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class CausalDense(nn.Module):
    """Stands in for the feed-forward layer of a block without experts."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.wi = nn.Linear(hidden, 2 * hidden)
        self.wo = nn.Linear(2 * hidden, hidden, bias=False)
        nn.init.normal_(self.wi.weight, std=hidden**-0.5)
        nn.init.zeros_(self.wo.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wo(F.gelu(self.wi(self.norm(x))))


class CausalMoE(nn.Module):
    """A copy of the router, and a stand-in for what its experts add.

    The stand-in is linear in features of what the experts read: a few hidden units for every expert, which count as
    much as the expert is thought to be chosen, some for all tokens, the routing itself, and what is read as it is. It
    starts as a layer that adds nothing.
    """

    def __init__(self, d_model: int, experts: int, choices: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.experts, self.choices, self.hidden = experts, choices, hidden
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.router = nn.Linear(d_model, experts)
        # A narrow shadow does not carry all of a token's embedding: the router reads the embedding itself plus what the
        # shadow says has been added to it.
        self.inner_norm = nn.RMSNorm(hidden, eps=eps) if hidden != d_model else None
        self.lift = nn.Linear(hidden, d_model) if hidden != d_model else None
        ranked = experts * max(1, _RANKED // experts)
        self.inner = nn.Linear(hidden, ranked + hidden)
        self.out = nn.Linear(ranked + 2 * hidden + experts, hidden, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(4.0))
        self.offset = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.router.weight, std=d_model**-0.5)
        nn.init.zeros_(self.router.bias)
        nn.init.normal_(self.inner.weight, std=hidden**-0.5)
        nn.init.zeros_(self.out.weight)
        if self.lift is not None:
            nn.init.normal_(self.lift.weight, std=0.1 * hidden**-0.5)
            nn.init.zeros_(self.lift.bias)

    def route(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """For what the router reads, [..., d_model]: the logit of being among the chosen ones and the weight that an
        expert's output is thought to have, both [..., experts]."""
        logits = self.router(y)
        best = logits.topk(min(self.choices + 1, self.experts), dim=-1).values
        between = best[..., self.choices - 1 :].mean(dim=-1, keepdim=True)
        chosen = self.sharpness * (logits - between) + self.offset
        return chosen, (logits + F.logsigmoid(chosen)).softmax(dim=-1)

    def features(self, y: Tensor, weight: Tensor) -> Tensor:
        """What the stand-in is linear in, for what the experts read and the experts' weights."""
        ranked, common = F.silu(self.inner(y)).split([self.inner.out_features - self.hidden, self.hidden], dim=-1)
        ranked = (ranked.unflatten(-1, (self.experts, -1)) * weight.unsqueeze(-1)).flatten(-2)
        return torch.cat([ranked, common, weight, y], dim=-1)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        if self.lift is None or self.inner_norm is None:
            y = self.norm(x)
            chosen, weight = self.route(y)
        else:
            y = self.inner_norm(x)
            chosen, weight = self.route(self.norm(embedding + self.lift(y)))
        return chosen, x + self.out(self.features(y, weight))


class CausalNet(nn.Module):
    """The shadow of a decoder-only model.

    Args:
        d_model: of the embeddings that are read.
        layers, experts, choices: MoE layers, experts in each, and how many of them a token's router chooses.
        pattern: one letter a block, "d" without experts or "m" with, up to the last with.
        hidden: width of the shadow; d_model means no projection.
        heads, shared, head_dim: of attention; ``shared`` heads of keys and values.
        norms: of queries and keys, see CausalAttention.
        theta, eps: of the rotary positions and of the norms, as strings, so that they are the same numbers everywhere.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        experts: int,
        pattern: str,
        choices: int,
        hidden: int,
        heads: int,
        shared: int,
        head_dim: int,
        norms: str = "none",
        theta: str = "10000.0",
        eps: str = "1e-06",
    ) -> None:
        super().__init__()
        if set(pattern) - {"d", "m"} or pattern.count("m") != layers:
            raise ValueError(f"pattern is {pattern!r}, expected letters 'd' and 'm', with {layers} 'm'")
        if not 1 <= choices <= experts:
            raise ValueError(f"choices is {choices}, expected 1..{experts} (the number of experts)")
        if heads % shared or head_dim % 2:
            raise ValueError(
                f"heads is {heads}, shared {shared}, head_dim {head_dim}, expected an even head_dim and heads that "
                "share keys and values in equal parts"
            )
        if norms not in ("none", "head", "all"):
            raise ValueError(f"norms is {norms!r}, expected 'none', 'head' or 'all'")
        self.choices = choices
        self.enter = nn.Linear(d_model, hidden) if hidden != d_model else None
        self.attention = nn.ModuleList(
            CausalAttention(hidden, heads, shared, head_dim, norms, float(theta), float(eps)) for _ in pattern
        )
        self.feed_forward = nn.ModuleList(
            CausalMoE(d_model, experts, choices, hidden, float(eps))
            if letter == "m"
            else CausalDense(hidden, float(eps))
            for letter in pattern
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """For each expert the logit of being among the chosen, [B, S, layers, experts], for embeddings x
        [B, S, d_model] whose real tokens stand first in each row: what comes behind them changes nothing before it."""
        embedding = x
        if self.enter is not None:
            x = self.enter(F.rms_norm(x, x.shape[-1:]))
        chosen: list[Tensor] = []
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            x = attention(x)
            if isinstance(feed_forward, CausalMoE):
                layer, x = feed_forward(x, embedding)
                chosen.append(layer)
            else:
                x = feed_forward(x)
        return torch.stack(chosen, dim=2)


def _blocks(model: Any, facts: StackFacts) -> list[Any]:
    """The model's decoder blocks up to the last with experts; empty where they are not found in one list."""
    last = facts.blocks[-1]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > last]
    places = list(zip(facts.blocks, facts.routers, strict=True))
    inside = [m for m in lists if all(any(part is router for part in m[at].modules()) for at, router in places)]
    return list(inside[0])[: last + 1] if inside else []


def _attention_of(block: Any) -> Any:
    """A block's attention where it is of the common form, else None."""
    found = getattr(block, "self_attn", None)
    wanted = ("q_proj", "k_proj", "v_proj", "o_proj")
    plain = all(isinstance(getattr(found, name, None), nn.Linear) for name in wanted)
    return found if plain and isinstance(getattr(found, "head_dim", None), int) else None


def _rotary_base(config: Any) -> float | None:
    """The base of the rotary positions where they are of the plain kind, over the whole head."""
    given = getattr(config, "rope_parameters", None) or {}
    plain = given.get("rope_type", "default") == "default" and given.get("partial_rotary_factor", 1.0) == 1.0
    base = given.get("rope_theta", getattr(config, "rope_theta", None))
    return float(base) if plain and base is not None else None


def causal_options(model: Any, facts: StackFacts, hidden: int | None = None, **given: Any) -> dict[str, Any]:
    """The sizes of a shadow of ``model``: the model's own where it is narrow, else a fixed small width.

    Args:
        hidden: width; None means d_model, at most 160.
        given: overrides any other size.
    """
    config = model.config.get_text_config()
    d_model = facts.embedding.shape[1]
    hidden = hidden or min(d_model, _MOST_HIDDEN)
    options: dict[str, Any] = {
        "pattern": "".join("m" if n in facts.blocks else "d" for n in range(facts.blocks[-1] + 1)),
        "choices": facts.choices,
        "hidden": hidden,
        "heads": max(hidden // 32, 1),
        "shared": max(hidden // 32, 1),
        "head_dim": 32 if hidden >= 32 else 2 * max(hidden // 2, 1),
        "norms": "none",
        "theta": repr(_THETA),
        "eps": repr(float(getattr(config, "rms_norm_eps", None) or 1e-6)),
    }
    blocks, base = _blocks(model, facts), _rotary_base(config)
    first = _attention_of(blocks[0]) if blocks else None
    if hidden == d_model and first is not None and base is not None and first.head_dim % 2 == 0:
        norm = getattr(first, "q_norm", None)
        heads = first.q_proj.out_features // first.head_dim
        wide = None if norm is None else norm.weight.numel()
        options |= {
            "heads": heads,
            "shared": first.k_proj.out_features // first.head_dim,
            "head_dim": first.head_dim,
            "norms": "none" if wide is None else "head" if wide == first.head_dim else "all",
            "theta": repr(base),
        }
    return options | given


@torch.no_grad()
def copy_causal(net: CausalNet, model: Any, facts: StackFacts) -> None:
    """Start the shadow from the model: its routers always, attention and norms where the shapes agree."""
    device = next(net.parameters()).device
    d_model = facts.embedding.shape[1]

    def copy(target: Any, source: Any) -> None:
        if target is not None and source is not None and target.shape == source.shape:
            target.copy_(source.detach().to(device, torch.float32))

    moe = [part for part in net.feed_forward if isinstance(part, CausalMoE)]
    for layer, router in zip(moe, facts.routers, strict=True):
        copy(layer.router.weight, router_matrix(router, facts.experts, d_model))
        copy(layer.router.bias, getattr(router, "bias", None))
    for block, attention, feed_forward in zip(_blocks(model, facts), net.attention, net.feed_forward, strict=False):
        if isinstance(feed_forward, CausalMoE):
            behind = getattr(block, "post_attention_layernorm", None)
            copy(feed_forward.norm.weight, getattr(behind, "weight", None))
        theirs = _attention_of(block)
        if net.enter is not None or theirs is None:
            continue
        before: Any = getattr(block, "input_layernorm", None)
        own: Any = attention
        copy(own.norm.weight, getattr(before, "weight", None))
        copy(own.q.weight, theirs.q_proj.weight)
        copy(own.q.bias, theirs.q_proj.bias)
        copy(own.kv.weight, torch.cat([theirs.k_proj.weight, theirs.v_proj.weight]))
        if theirs.k_proj.bias is not None and theirs.v_proj.bias is not None:
            copy(own.kv.bias, torch.cat([theirs.k_proj.bias, theirs.v_proj.bias]))
        copy(own.out.weight, theirs.o_proj.weight)
        for name in ("q_norm", "k_norm"):
            if getattr(own, name) is not None:
                copy(getattr(own, name).weight, getattr(getattr(theirs, name, None), "weight", None))
