"""Notices at run time that a model no longer routes as its predictor learned, for instance after fine-tuning."""

from __future__ import annotations

import threading
import warnings
from collections import deque

from torch import Tensor

from sida_ext.prediction.hash_table import HashTable


class DriftWarning(UserWarning):
    """The predictor hits less often than its report says."""


class DriftWatch:
    """Compares the rolling top-1 hit rate with the one that was reported on held-out text, and warns once.

    Args:
        expected: the reported mean top-1 share, in (0, 1].
        tolerance: how far the rolling rate may fall below it; text of another domain alone can cost some points.
        window: tokens that the rolling rate looks back on; nothing is said before that many were seen.
        retrain: the command that the warning recommends.
    """

    def __init__(
        self,
        expected: float,
        tolerance: float = 0.1,
        window: int = 4096,
        retrain: str = "sida train MODEL TEXT... -o PREDICTOR",
    ) -> None:
        if not 0 < expected <= 1:
            raise ValueError(f"expected is {expected}, expected a share of hits in (0, 1]")
        if window < 1:
            raise ValueError(f"window is {window}, expected at least 1 token")
        self.expected, self.tolerance, self.window, self.retrain = expected, tolerance, window, retrain
        self.warned = False
        self._batches: deque[tuple[float, int]] = deque()
        self._hits, self._tokens = 0.0, 0
        self._lock = threading.Lock()  # several threads may stream through one model

    @property
    def rate(self) -> float | None:
        """The rolling top-1 hit rate, or None before the first token."""
        return self._hits / self._tokens if self._tokens else None

    def observe(self, table: HashTable, chosen: Tensor) -> None:
        """Take one batch's prediction and what the router chose.

        Args:
            table: [B, S, layers, top_k].
            chosen: [B, S, layers] integer, the router's choice, -1 where there is none; or [B, S, layers, choices] of
                a router that makes several, where a table's first candidate hits if it is one of them.
        """
        if tuple(chosen.shape[:3]) != tuple(table.expert_index.shape[:3]) or chosen.dim() not in (3, 4):
            raise ValueError(
                f"chosen has shape {tuple(chosen.shape)}, expected the table's {tuple(table.expert_index.shape[:3])}, "
                "with or without a further dimension of several choices"
            )
        first = table.expert_index[..., :1]
        chosen = chosen if chosen.dim() == 4 else chosen.unsqueeze(-1)
        judged = (first >= 0) & (chosen >= 0).any(-1, keepdim=True)
        layers = table.layers
        tokens = int(judged.sum()) // layers
        if not tokens:
            return
        self.count(float(((first == chosen).any(-1, keepdim=True) & judged).sum()) / layers, tokens)

    def count(self, hits: float, tokens: int) -> None:
        """Take that of so many tokens so many were hit, mean over the layers."""
        with self._lock:
            drifted = self._add(hits, tokens)
        if drifted is not None:
            rate, seen = drifted
            warnings.warn(
                f"the predictor's first choice is right for {rate:.1%} of the last {seen} tokens; its report says "
                f"{self.expected:.1%}. Was the model fine-tuned, or is the text of another kind? Train a predictor "
                f"again: {self.retrain}",
                DriftWarning,
                stacklevel=3,
            )

    def _add(self, hits: float, tokens: int) -> tuple[float, int] | None:
        """Take one batch's hits; the rolling rate and its tokens where they are to be warned of now."""
        self._batches.append((hits, tokens))
        self._hits, self._tokens = self._hits + hits, self._tokens + tokens
        while self._tokens - self._batches[0][1] >= self.window:
            old_hits, old_tokens = self._batches.popleft()
            self._hits, self._tokens = self._hits - old_hits, self._tokens - old_tokens
        rate = self._hits / self._tokens
        if self.warned or self._tokens < self.window or rate >= self.expected - self.tolerance:
            return None
        self.warned = True
        return rate, self._tokens
