"""``python -m bench``: what it hands to pytest is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.__main__ import main


def test_the_kernel_benchmarks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def run(flags: list[str], plugins: list[object]) -> int:
        given.extend(flags)
        return 3

    monkeypatch.setattr(pytest, "main", run)
    monkeypatch.setattr(sys, "argv", ["bench", "--minutes", "1"])
    assert main() == 3
    assert Path(given[0]).is_file()
