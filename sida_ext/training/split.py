"""Which documents are trained on, which decide when to stop, and which nothing but the report reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sida_ext.training.objective import TrainingOptions
from sida_ext.training.traces import Trace, TraceStore

__all__ = ["HELD_OUT", "TRAIN", "VALIDATION", "SplitPart", "split_of"]

TRAIN, VALIDATION, HELD_OUT = 0, 1, 2


def split_of(document: Tensor, options: TrainingOptions) -> Tensor:
    """[n] int64: TRAIN, VALIDATION or HELD_OUT of each document; depends on its number and the seed alone.

    Negative numbers are documents that were given as held out.
    """
    parts = []
    for number in document.tolist():
        digest = hashlib.sha256(f"{options.seed}:{number}".encode()).digest()
        place = int.from_bytes(digest[:8], "little") / 2**64
        if number < 0 or place < options.held_out:
            parts.append(HELD_OUT)
        else:
            parts.append(VALIDATION if place < options.held_out + options.validation else TRAIN)
    return torch.tensor(parts, dtype=torch.int64)


class SplitPart:
    """One part of the split, as a callable that streams it: ``part()`` yields a Trace for each shard that has rows."""

    def __init__(self, store: TraceStore, options: TrainingOptions, part: int) -> None:
        self.store, self.options, self.part = store, options, part

    def __call__(self) -> Iterator[Trace]:
        for number in range(len(self.store)):
            trace = self.shard(number)
            if trace.rows:
                yield trace

    def shard(self, number: int) -> Trace:
        """What of shard ``number`` falls into this part."""
        trace = self.store.shard(number)
        return trace.select((split_of(trace.document, self.options) == self.part).nonzero()[:, 0])

    def __len__(self) -> int:
        return len(self.store)
