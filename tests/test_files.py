"""Files written whole: the old one or the new one, never a part, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sida_ext.files import written_whole


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "report.json"
    with written_whole(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.suffix == ".json"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sync", [False, True])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, sync):
    path = tmp_path / "report.json"
    path.write_text("old")

    def interrupted():
        with written_whole(path, sync=sync) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "plans.json"
    with written_whole(path) as first:
        with written_whole(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_what_took_long_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """The file is synced before it is renamed, its folder after."""
    done = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Path, "replace", lambda self, other: (done.append("renamed"), replace(self, other)))
    path = tmp_path / "predictor"
    with written_whole(path, sync=True) as partial:
        partial.write_text("weights")
    assert done == [str(partial), "renamed", str(tmp_path)]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "file"):
        pass
