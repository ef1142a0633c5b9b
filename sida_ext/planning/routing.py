"""Routings that stand in where none was recorded: the least local one that is plausible, and the most local.

*Least local*: every token draws its experts anew and evenly, as random weights route. *Most local*: some experts of a
layer are in demand far more often than others (their shares follow Zipf's law with exponent 1, in an order of each
layer's own), and each choice repeats one of the token before with probability 0.3. Both come from a fixed seed: the
same every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["LEAST_LOCAL", "MOST_LOCAL", "Batches", "Recorded", "prompts", "steps"]

Batches = list[list[tuple[int, list[int]]]]  # of each batch: (MoE layer, distinct experts), as run_clock takes them
LEAST_LOCAL, MOST_LOCAL = "least local", "most local"


@dataclass(frozen=True)
class Recorded:
    """The routing of a run: its batches in order, of which the first ``warm_up`` only fill the expert memory."""

    batches: Batches
    warm_up: int


ZIPF_EXPONENT, REPEATED = 1.0, 0.3


def _shares(kind: str, layers: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """[layers, experts], rows sum to 1: how often a choice falls on an expert."""
    if kind == LEAST_LOCAL:
        return np.full((layers, experts), 1 / experts)
    if kind != MOST_LOCAL:
        raise ValueError(f"kind is {kind!r}, expected {LEAST_LOCAL!r} or {MOST_LOCAL!r}")
    ranked = np.arange(1, experts + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    return np.stack([rng.permutation(ranked / ranked.sum()) for _ in range(layers)])


def steps(kind: str, layers: int, experts: int, top_k: float, count: int, seed: int = 0) -> Batches:
    """Single tokens one after the other, as a decoder makes them: ``top_k`` distinct experts in each layer.

    A ``top_k`` between two whole numbers (layers that differ) is met on average.
    """
    rng = np.random.default_rng(seed)
    logs = np.log(_shares(kind, layers, experts, rng))
    repeated = REPEATED if kind == MOST_LOCAL else 0.0
    before: np.ndarray | None = None
    found: Batches = []
    for _ in range(count):
        keys = logs + rng.gumbel(size=logs.shape)
        if before is not None and repeated:
            kept = rng.random(before.shape) < repeated
            rows = np.repeat(np.arange(layers), before.shape[1]).reshape(before.shape)
            keys[rows[kept], before[kept]] = np.inf
        most = int(np.ceil(top_k))
        order = np.argsort(-keys, axis=1)[:, :most]
        before = order
        used = [most if rng.random() < top_k - (most - 1) else most - 1 for _ in range(layers)]
        found.append([(layer, order[layer, : max(1, used[layer])].tolist()) for layer in range(layers)])
    return found


def prompts(kind: str, layers: int, experts: int, top_k: float, tokens: int, count: int, seed: int = 0) -> Batches:
    """Batches of ``tokens`` tokens at once: in each layer the distinct experts that any of them chose."""
    rng = np.random.default_rng(seed)
    shares = _shares(kind, layers, experts, rng)
    # The chance that one token has an expert among its top_k draws, then that any of the tokens has.
    one = 1 - (1 - shares) ** top_k
    one *= np.minimum(1.0, top_k / one.sum(axis=1, keepdims=True))
    any_token = 1 - (1 - np.minimum(one, 1.0)) ** tokens
    found: Batches = []
    for _ in range(count):
        drawn = rng.random(any_token.shape) < any_token
        found.append([(layer, np.flatnonzero(row).tolist() or [0]) for layer, row in enumerate(drawn)])
    return found
