"""A store's identity: a hash of all bytes, computed once; scratch folders of processes that are gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sida_ext import StoreError
from sida_ext.experts import folders, identity
from sida_ext.experts.cache import check_source, ensure_store
from sida_ext.experts.identity import identity_of
from sida_ext.experts.store import open_store
from sida_ext.models.packing import pack, source_of
from tests.support.checkpoints import edit_weights
from tests.support.families import tiny_model


def flip(path: Path, position: int) -> None:
    """Change a byte and leave size and time of modification as they were."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def settle() -> None:
    time.sleep(identity.SETTLED_NS / 1e9 + 0.02)


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that were read to be hashed."""
    found: list[Path] = []
    real = identity._hash
    monkeypatch.setattr(identity, "_hash", lambda path: (found.append(path), real(path))[1])
    return found


def test_every_byte_counts(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3 << 20))
    before = identity_of([file])
    settle()
    for position in (0, 1_234_567, (3 << 20) - 1):
        flip(file, position)
        assert identity_of([file]) != before
        flip(file, position)
        assert identity_of([file]) == before


def test_names_and_order_do_not(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    before = identity_of(paths)
    assert identity_of(reversed(paths)) == before
    shutil.move(paths[0], tmp_path / "z")
    assert identity_of([*paths[1:], tmp_path / "z"]) == before
    assert identity_of(paths[1:]) != before


def test_a_file_is_read_once(tmp_path, hashed):
    file = tmp_path / "a"
    file.write_text("x")
    identity_of([file])
    identity_of([file])
    assert len(hashed) == 2  # it may have changed again within the clock's granularity: not remembered yet
    settle()
    found = identity_of([file])
    assert identity_of([file]) == found
    (tmp_path / "link").symlink_to(file)
    assert identity_of([tmp_path / "link"]) == found
    assert len(hashed) == 3
    flip(file, 0)
    assert identity_of([file]) != found
    assert len(hashed) == 4


def test_what_is_remembered_may_be_damaged_or_not_writable(tmp_path, hashed):
    file, cache = tmp_path / "a", tmp_path / "cache"
    file.write_text("x")
    settle()
    found = identity_of([file], cache)
    (entry,) = cache.iterdir()
    for text in ("{", "[]", "{}", entry.read_text().replace('"sha256": "', '"sha256": "0')):
        entry.write_text(text)
        assert identity_of([file], cache) == found
    assert len(hashed) == 5
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert identity_of([file], cache) == found


def test_a_file_that_changes_meanwhile_is_no_identity(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_text("x")
    real = identity._hash

    def grows(path: Path) -> str:
        digest = real(path)
        with open(path, "a") as more:
            more.write("y")
        return digest

    monkeypatch.setattr(identity, "_hash", grows)
    with pytest.raises(ValueError, match="changed while it was read"):
        identity_of([file])


def test_one_changed_expert_is_another_checkpoint(tmp_path):
    """Sizes, header and time are the same, and so were the blocks that once were sampled."""
    tiny_model("olmoe")[1].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with source_of(tmp_path) as source:
        first = ensure_store(source, "float32")
    settle()
    with source_of(tmp_path) as source:
        assert ensure_store(source, "float32") == first
    size = file.stat().st_size
    flip(file, size - 1001)
    with source_of(tmp_path) as source:
        second = ensure_store(source, "float32")
        assert second != first
        with pytest.raises(StoreError, match="packed from a checkpoint with fingerprint"):
            check_source(open_store(first)[1], source, str(first))


def test_a_store_of_an_older_version_is_known_by_its_records(tmp_path):
    """It says no family, and its fingerprint was made of samples."""
    tiny_model("olmoe")[1].save_pretrained(tmp_path)
    header = pack(tmp_path, tmp_path / "x.sida", "bfloat16")
    old = replace(header, family="", fingerprint="0" * 32)
    with source_of(tmp_path) as source:
        check_source(old, source, "x.sida")
        with pytest.raises(StoreError, match="packed from a checkpoint with fingerprint 000"):
            check_source(replace(old, family="olmoe"), source, "x.sida")
        with pytest.raises(StoreError, match="packed from"):
            check_source(replace(old, layers=old.layers[::-1]), source, "x.sida")

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.2.mlp.experts.7.down_proj.weight"][-1, -1] += 1

    edit_weights(tmp_path, change)
    with source_of(tmp_path) as source, pytest.raises(StoreError, match="packed from"):
        check_source(old, source, "x.sida")


def test_scratch_folders_of_killed_processes_go_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDA_CACHE", str(tmp_path))
    code = "from sida_ext.experts.folders import scratch_folder as f; import time; x = f(); print(x.path, flush=True); "
    process = subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        (theirs / "experts.sida").write_text("x")
        ours = folders.scratch_folder()
        assert theirs.is_dir(), "a living process lost its folder"
        process.send_signal(signal.SIGKILL)
        process.wait()
        ours.cleanup()
        assert (theirs / "experts.sida").exists()
        again = folders.scratch_folder()
        assert list(tmp_path.iterdir()) == [again.path]
        again.cleanup()
        again.cleanup()
        assert not list(tmp_path.iterdir())
    finally:
        process.kill()
        process.wait()
