"""Sequences of different lengths in batches of similar ones: windows, a cut by length, padding on the right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["cut_by_length", "padded", "windows"]

T = TypeVar("T")


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``, the last one shorter; taken lazily, one window at a time."""
    source = iter(items)
    while window := list(itertools.islice(source, size)):
        yield window


def cut_by_length(rows: Iterable[T], key: Callable[[T], Any], full: Callable[[list[T], T], bool]) -> list[list[T]]:
    """``rows`` sorted by ``key`` and cut into batches: a row begins a new one where ``full(batch, row)`` says that the
    one before takes it no more."""
    batches: list[list[T]] = []
    for row in sorted(rows, key=key):
        if batches and not full(batches[-1], row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def padded(rows: Sequence[Sequence[int] | Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] int64, ``pad`` behind each row, and the mask [B, S] int64 with 1 for tokens."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.as_tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask
