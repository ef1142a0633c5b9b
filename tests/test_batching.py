"""The one batcher: windows, a cut by length, padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sida_ext.batching import cut_by_length, padded, windows


@given(st.lists(st.integers(), max_size=20), st.integers(1, 7))
def test_windows_are_the_items_in_order(items, size):
    found = list(windows(iter(items), size))
    assert [item for window in found for item in window] == items
    assert all(len(window) == size for window in found[:-1])


def test_windows_take_no_more_than_they_give():
    taken = []
    source = windows((taken.append(n) or n for n in range(10)), 3)
    assert next(source) == [0, 1, 2]
    assert taken == [0, 1, 2]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=20), st.integers(1, 5))
def test_a_cut_by_length_keeps_every_row_and_no_batch_is_over_full(rows, size):
    batches = cut_by_length(rows, len, lambda batch, row: len(batch) == size)
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    assert all(len(batch) == size for batch in batches[:-1])
    lengths = [len(row) for batch in batches for row in batch]
    assert lengths == sorted(lengths)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(0, 9))
def test_the_mask_gives_the_rows_back(rows, pad):
    ids, mask = padded(rows, pad)
    assert ids.dtype == mask.dtype == torch.int64
    assert [ids[n][mask[n].bool()].tolist() for n in range(len(rows))] == rows
    assert bool((ids[mask == 0] == pad).all())
    # Behind the tokens, not among them.
    assert [row.tolist() for row in mask] == [row.sort(descending=True).values.tolist() for row in mask]
