"""`make paper`: every table and the picture come out, each beside the published numbers."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_papers_tables_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from bench import paper

    paper.main(["--smoke", "--out", str(tmp_path)])
    text = (tmp_path / "paper.md").read_text()
    sections = text.split("\n## ")[1:]
    assert len(sections) == 5
    for section in sections:
        assert "published" in section
        assert "What differs:" in section
        assert section.count("\n|") > 4
    assert (tmp_path / "paper.png").read_bytes()[:4] == b"\x89PNG"
