"""What `make gpu-check` makes of its figures: overlapping times, and the table, whole or in parts."""

from __future__ import annotations

import itertools
import random

import pytest

from bench.gpu.intervals import common, length, union
from bench.gpu.report import document

MODELLED = [
    {
        "gpu": "a card", "pcie": 4, "model": "switch-base-128", "share": 0.1, "modelled_overlapped_seconds": 0.039,
        "modelled_on_demand_seconds": 0.062,
    }
]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_intervals_are_what_counting_ticks_gives(seed):
    print(f"seed {seed}")
    draw = random.Random(seed)
    first, second = ([(begin, begin + draw.randrange(6)) for begin in draw.choices(range(60), k=12)] for _ in range(2))
    ticks = [{tick for begin, end in part for tick in range(begin, end)} for part in (first, second)]
    assert length(first) == len(ticks[0])
    assert common(first, second) == len(ticks[0] & ticks[1])
    assert all(before[1] < after[0] for before, after in itertools.pairwise(union(first)))


def test_a_run_in_which_all_failed_still_has_its_table():
    text = document("a card", ["build: FAILED, 3 s: no nvcc"], {}, MODELLED)
    assert text.startswith("# Measured on: a card\n")
    assert document("dry", [], {}, MODELLED).startswith("# Dry run: nothing here was measured on a GPU\n")
    assert "- build: FAILED, 3 s: no nvcc" in text
    assert "| a card | 4.0 | 10% | 39.00 | 62.00 |" in text


def test_every_figure_is_in_the_table():
    row = {"tokens_per_s": 1234.0, "median_s": 0.025, "p95_s": 0.03, "gpu_bytes": 2e9}
    ours = {"hit_rate": 0.5, "stall_s_each": 0.001, "copy_s": 0.2, "kernel_s": 0.3, "copies_beside_kernels": 0.75}
    figures = {
        "copy_rates": {"pinned": {"int8 expert": 20e9, "large": 25e9}, "pageable": {"large": 6e9}},
        "layer": [
            {
                "case": "decode-8-bfloat16-k1", "ms": 0.05, "gb_per_s": 2000.0, "tflop_per_s": 1.5, "x_floor": 1.25,
                "grouped_ms": 0.08,
            }
        ],
        "whole_model": {"sida_ext, 10 %": row | ours, "transformers": row, "accelerate": {"error": "OSError: full"}},
    }  # fmt: skip
    text = document("a card", [], figures, MODELLED)
    for line in (
        "| pinned | 20.0 | 25.0 |",
        "| pageable |  | 6.0 |",
        "| decode-8-bfloat16-k1 | 0.0500 | 2000 | 1.5 | 1.25 | 0.0800 |",
        "| sida_ext, 10 % | 1234 | 25.00 | 30.00 | 2.00 | 50.0% | 1.00 | 75% of 200 ms |",
        "| transformers | 1234 | 25.00 | 30.00 | 2.00 |  |  |  |",
        "| accelerate | OSError: full | | | | | | |",
    ):
        assert line in text
