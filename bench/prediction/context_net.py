"""A predictor that knows nothing of the model's structure: what the shadow is compared with."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sida_ext.prediction.hash_predictor import HashPredictor

_MASKED = -1e9  # finite, so that a row without any token gives numbers and not NaN


class ContextBlock(nn.Module):
    """Mixes neighbours (depthwise convolution) and the whole sentence (attention), then a feed-forward step."""

    def __init__(self, hidden: int, heads: int, reach: int, kernel: int) -> None:
        super().__init__()
        self.heads, self.reach = heads, reach
        self.mix_norm, self.ff_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.conv = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.distance_bias = nn.Embedding(2 * reach + 1, heads)
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor, real: Tensor, distance: Tensor) -> Tensor:
        y = self.mix_norm(x)
        local = self.conv((y * real[..., None]).transpose(1, 2)).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, dim=-1))
        bias = self.distance_bias(distance).permute(2, 0, 1)[None]
        attended = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~real[:, None, None, :], _MASKED))
        x = x + local + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ff_norm(x))))


class ContextNet(nn.Module):
    """Every token sees both directions, and each layer's head sees the previous layer's prediction."""

    def __init__(
        self,
        d_model: int,
        layers: int,
        experts: int,
        hidden: int = 256,
        blocks: int = 2,
        heads: int = 4,
        reach: int = 32,
        kernel: int = 5,
    ) -> None:
        super().__init__()
        self.layers, self.experts, self.reach = layers, experts, reach
        self.enter_norm = nn.RMSNorm(d_model, elementwise_affine=False)
        self.enter = nn.Linear(d_model, hidden)
        self.blocks = nn.ModuleList(ContextBlock(hidden, heads, reach, kernel) for _ in range(blocks))
        self.leave_norm = nn.RMSNorm(hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, experts) for _ in range(layers))
        self.carry = nn.ModuleList(nn.Linear(experts, hidden, bias=False) for _ in range(layers - 1))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Logits [B, S, layers, experts] for embeddings x [B, S, d_model] whose real tokens stand first in each row."""
        x = self.enter(self.enter_norm(x))
        place = torch.arange(x.shape[1], device=x.device)
        distance = (place[None] - place[:, None]).clamp(-self.reach, self.reach) + self.reach
        for block in self.blocks:
            x = block(x, real, distance)
        logits: list[Tensor] = []
        for layer, head in enumerate(self.heads):
            if layer:
                x = x + self.carry[layer - 1](logits[-1].softmax(dim=-1))
            logits.append(head(self.leave_norm(x)))
        return torch.stack(logits, dim=2)


class ContextPredictor(HashPredictor):
    """HashPredictor with one more variant, "context"."""

    nets: ClassVar[dict[str, type[nn.Module]]] = {**HashPredictor.nets, "context": ContextNet}
