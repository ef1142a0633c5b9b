"""The modelled times: arithmetic, labels, and that the document is what the recorded counts give."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.gpu import modelled_time as model

ROOT = Path(__file__).resolve().parents[2]

GPU = model.Card("a device", 100e9, 1e12, (4,), "made up")


@pytest.fixture(scope="module")
def counts() -> dict:
    return json.loads(model.COUNTS.read_text())


def test_document_and_record_are_up_to_date(counts: dict) -> None:
    assert model.DOCUMENT.read_text() == model.render(counts), "run `python -m bench.gpu.modelled_time`"
    assert json.loads(model.MODELLED.read_text()) == [asdict(row) for row in model.modelled(counts)]


def test_every_figure_of_time_says_that_it_is_modelled(counts: dict) -> None:
    lines = model.render(counts).splitlines()
    heads = [line for line, below in itertools.pairwise(lines) if re.fullmatch(r"(\|-+)+\|", below)]
    columns = [
        column for head in heads for column in head.split("|") if re.search(r", ms|ratio|slowdown|seconds", column)
    ]
    assert len(columns) > 12
    assert [column for column in columns if "modelled" not in column] == []
    for row in json.loads(model.MODELLED.read_text()):
        assert all("modelled" in name for name in row if "seconds" in name)


def test_roofline_takes_the_longer_of_bytes_and_products() -> None:
    by_bytes = {"bytes_read": 60e6, "bytes_written": 40e6, "mma_m16n8k16": 0}
    by_products = {"bytes_read": 0, "bytes_written": 0, "mma_m16n8k16": 1e9 / 4096 * 2}
    expected = 2 * model.LAUNCH_SECONDS + 1e-3 + 2e-3
    assert model.layer_seconds([by_bytes, by_products], GPU) == pytest.approx(expected)


def test_copy_is_its_bytes_and_its_calls() -> None:
    counts = {"transfer": {"copies": 10, "calls": {"copy_to_device": 10, "stream_wait": 20}}}
    assert model.copy_seconds(counts, 25_000_000, 4) == pytest.approx(1e-3 + 3 * model.CALL_SECONDS)
    assert model.copy_seconds(counts, 25_000_000, 5) == pytest.approx(0.5e-3 + 3 * model.CALL_SECONDS)


def test_orders_that_must_hold(counts: dict) -> None:
    for row in model.modelled(counts):
        assert row.modelled_compute_seconds <= row.modelled_overlapped_seconds <= row.modelled_on_demand_seconds
        assert row.modelled_on_demand_seconds <= row.modelled_nothing_kept_seconds
        assert row.copies <= row.copies_lru
