"""Routings that stand in where none was recorded: the least local one that is plausible, and the most local.

*Least local*: every token draws its experts anew and evenly, as random weights route. *Most local*: some experts of a
layer are in demand far more often than others (their shares follow Zipf's law with exponent 1, in an order of each
layer's own), and each choice repeats one of the token before with probability 0.3. Both come from a fixed seed: the
same every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["LEAST_LOCAL", "MOST_LOCAL", "Batches", "Recorded", "Tokens", "prompts", "steps"]

Batches = list[list[tuple[int, list[int]]]]  # of each batch: (MoE layer, distinct experts), as run_clock takes them
Tokens = list[list[list[int]]]  # of the same batches and layers: how many tokens each of these experts has
LEAST_LOCAL, MOST_LOCAL = "least local", "most local"


@dataclass(frozen=True)
class Recorded:
    """The routing of a run: its batches in order, of which the first ``warm_up`` only fill the expert memory.

    Attributes:
        tokens: of each expert; None: not recorded, the tokens of a batch are spread evenly.
    """

    batches: Batches
    warm_up: int
    tokens: Tokens | None = None


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


def _chosen(shares: np.ndarray, top_k: float) -> np.ndarray:
    """[layers, experts], rows sum to ``top_k``: the chance that an expert is among one token's distinct choices.

    Drawn again and again until ``top_k`` distinct ones are found: the number of draws that finds so many on average is
    searched for; it is the same in all layers, whose shares are the same in another order.
    """
    fewest, most = 0.0, 1.0
    while (1 - (1 - shares[0]) ** most).sum() < top_k and most < 1e9:
        most *= 2
    for _ in range(60):
        draws = (fewest + most) / 2
        if (1 - (1 - shares[0]) ** draws).sum() < top_k:
            fewest = draws
        else:
            most = draws
    return 1 - (1 - shares) ** most


def prompts(
    kind: str, layers: int, experts: int, top_k: float, tokens: int, count: int, seed: int = 0
) -> tuple[Batches, Tokens]:
    """Batches of ``tokens`` tokens at once: in each layer the distinct experts that any of them chose, and how many
    did.

    Tokens choose one by one, so some experts have several times as many as others even where all are chosen evenly.
    """
    rng = np.random.default_rng(seed)
    shares = _shares(kind, layers, experts, rng)
    one = _chosen(shares, min(top_k, experts))
    found: Batches = []
    numbers: Tokens = []
    for _ in range(count):
        drawn = rng.binomial(tokens, one)
        drawn[drawn.sum(axis=1) == 0, 0] = 1  # somebody computes
        found.append([(layer, np.flatnonzero(row).tolist()) for layer, row in enumerate(drawn)])
        numbers.append([row[row > 0].tolist() for row in drawn])
    return found, numbers
