"""`make paper`: every table and the picture come out, each beside the published numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.paper import __main__ as paper

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.check
def test_the_papers_tables_are_made_in_parts(tmp_path, capsys):
    """The subset that `--smoke` is: few sentences, base-8 shapes of four blocks."""
    out, work = tmp_path / "docs", tmp_path / "work"
    kept = tmp_path / "paper.json"
    given = ["--smoke", "--out", str(out), "--work", str(work), "--record", str(kept)]
    paper.main([*given, "--part", "prepare"])
    assert "to do: time bundled, time base-8" in capsys.readouterr().out
    first = (out / "paper.md").read_text()
    assert "Not measured yet: time bundled, time base-8." in first
    assert "Throughput" not in first
    record = json.loads(kept.read_text())
    before = record["stages"]["base-8"]
    paper.main(given)
    assert json.loads(kept.read_text())["stages"]["base-8"] == before  # kept, not made again
    text = (out / "paper.md").read_text()
    assert "Not measured" not in text
    *sections, took = text.split("\n## ")[1:]
    assert [section.splitlines()[0].split(":")[0] for section in sections] == [
        "Hit rates by number of experts",
        "Hit rates by layer",
        "Fidelity of predicted routing",
        "Perplexity of predicted routing",
        "Sparsity of activation by sentence length",
        "Memory saved",
        "Throughput and latency by memory budget",
        "Throughput and latency by memory budget",
    ]
    for section in sections:
        assert "published" in section
        assert "What differs:" in section
        assert section.count("\n|") >= 4
    assert took.count("\n| ") == len(record["stages"]) + 4  # the two of timings, the head and the sum
    rows = [line for line in text.splitlines() if line.startswith("| 25 % | ")]
    assert [row.split(" | ")[1] for row in rows] == ["none", "token table", "hash predictor", "oracle"] * 2
    assert (out / "paper.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stage_that_is_none_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper.main(["--smoke", "--out", str(tmp_path), "--record", str(tmp_path / "r"), "--stages", "base-9"])
    assert "there is no stage base-9; known: models, fidelity" in capsys.readouterr().err
