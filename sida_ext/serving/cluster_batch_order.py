"""An order of rows in which those that want the same experts stand together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["by_experts"]

STEPS = 12  # of the power iteration; the axis need not be exact
SMALL = 8  # rows that are not told apart any further


def by_experts(wanted: Sequence[Collection[tuple[int, int]]]) -> list[int]:
    """Positions of the rows: halved again and again along the axis on which the experts of their half differ most.

    Args:
        wanted: of each row the (MoE layer, expert) pairs.

    Returns:
        A permutation of the rows; the same rows give the same one.
    """
    columns = {pair: at for at, pair in enumerate(sorted(set().union(*wanted)))}
    table = torch.zeros(len(wanted), max(len(columns), 1))
    for row, pairs in enumerate(wanted):
        table[row, [columns[pair] for pair in pairs]] = 1
    return _halved(table, torch.arange(len(wanted))).tolist()


def _halved(table: Tensor, rows: Tensor) -> Tensor:
    if len(rows) <= SMALL:
        return rows
    part = table[rows] - table[rows].mean(0)
    along = part @ _axis(part)
    order = rows[along.sort(stable=True).indices]
    middle = len(rows) // 2
    return torch.cat([_halved(table, order[:middle]), _halved(table, order[middle:])])


def _axis(part: Tensor) -> Tensor:
    """The direction [columns] of the largest variance of centred rows, nearly."""
    found = part.square().sum(0)  # whatever varies most is in it
    for _ in range(STEPS):
        found = part.T @ (part @ found)
        found = found / found.norm().clamp_min(1e-30)
    return found
