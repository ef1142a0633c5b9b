"""findings/: every entry has the form that its README states. The entries themselves are run by hand and nightly."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "findings"
ENTRIES = sorted(FOLDER.glob("*.sh"))


def test_the_table_names_every_entry_and_no_other():
    named = re.findall(r"^\| `(\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert named == [path.stem for path in ENTRIES]
    assert len(named) >= 6


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_has_the_form(path):
    text = path.read_text()
    assert os.access(path, os.X_OK)
    head = text.split("set -euo pipefail")[0]
    assert re.search(r"^# Expected: \S", head, re.MULTILINE)
    assert re.search(r"^# Seen: +\S", head, re.MULTILINE)
    (packages,) = re.findall(r"^packages=\((.*)\)$", text, re.MULTILINE)
    assert re.search(r"==\d", packages), f"{path.name} pins {packages!r}, expected releases"
    assert "sida" not in text, "an entry runs without this project"
    assert "behaviour changed" in text
    assert "://" not in text, "an entry names no host"
    subprocess.run(["bash", "-n", str(path)], check=True)
