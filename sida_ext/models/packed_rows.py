"""Texts that stand one behind the other in one row, without padding between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Packing"]


class Packing:
    """Where the texts of a packed row [1, T, ...] are, T being the sum of their lengths.

    Args:
        lengths: tokens of each text.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        counts = torch.tensor(list(lengths))
        ends = counts.cumsum(0)
        steps = torch.arange(int(counts.max()))
        self.lengths = list(lengths)
        self.bounds = list(zip((ends - counts).tolist(), ends.tolist(), strict=True))
        # What stands behind a text in its row of a padded batch: its own last token.
        self._places = (ends - counts)[:, None] + torch.minimum(steps, counts[:, None] - 1)
        self._own = (steps < counts[:, None]).flatten().nonzero().flatten()

    def rows(self, packed: Tensor) -> Tensor:
        """[1, T, ...] as a batch [B, S, ...] of a text a row; behind each its last token is repeated."""
        return packed[0][self._places]

    def packed(self, rows: Tensor) -> Tensor:
        """[B, S, ...] as [1, T, ...]."""
        return rows.flatten(0, 1)[self._own][None]
