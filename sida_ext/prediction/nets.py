"""The published network behind HashPredictor: an LSTM with SparseMax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MASKED = -1e9  # finite, so that a row without any token gives numbers and not NaN


def sparsemax(scores: Tensor) -> Tensor:
    """Projection of ``scores`` onto the probability simplex along the last dimension: a softmax with exact zeros.

    Source: Martins and Astudillo, "From Softmax to Sparsemax" (2016), closed form over sorted scores.
    """
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    ordered, _ = shifted.sort(dim=-1, descending=True)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    cumulated = ordered.cumsum(dim=-1)
    supported = 1 + rank * ordered > cumulated
    size = supported.sum(dim=-1, keepdim=True).clamp(min=1)  # NaN supports nothing, and stays NaN
    threshold = (cumulated.gather(-1, size - 1) - 1) / size
    return (shifted - threshold).clamp(min=0)


def pack_left(real: Tensor) -> tuple[Tensor, Tensor]:
    """The order that moves each row's real tokens to its front, and how many there are.

    Args:
        real: [B, S] bool.

    Returns:
        order [B, S] int64 (gather indices, stable) and length [B] int64.
    """
    order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
    return order, real.sum(dim=1)


class PaperNet(nn.Module):
    """SiDA-MoE's predictor: FC + ReLU, 2-layer LSTM in one direction, SparseMax self-attention, residual, linear heads.

    Source: arXiv 2310.18859, section on the hash function. q = k = v = the LSTM's output, scores scaled by
    1/sqrt(hidden).
    """

    def __init__(self, d_model: int, layers: int, experts: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers, self.experts = layers, experts
        self.reduce = nn.Linear(d_model, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True)
        self.heads = nn.Linear(hidden, layers * experts)  # one head for each layer, as one product

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Logits [B, S, layers, experts] for embeddings x [B, S, d_model] whose real tokens stand first in each row."""
        state, _ = self.lstm(F.relu(self.reduce(x)))
        scores = state @ state.transpose(1, 2) * state.shape[-1] ** -0.5
        weights = sparsemax(scores.masked_fill(~real[:, None, :], _MASKED))
        return self.heads(state + weights @ state).unflatten(-1, (self.layers, self.experts))
