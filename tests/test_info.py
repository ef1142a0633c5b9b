"""What ``sida info`` measures with: a part of what is free, or nothing, and then it says why."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from sida_ext import _C
from sida_ext.experts import budget
from sida_ext.experts.read_plan import default_plan
from sida_ext.info import collect


@pytest.fixture
def asked(monkeypatch):
    """The sizes that were measured with; the plan of the reads is left out."""
    sizes: dict[str, list[int]] = {"memory": [], "disk": []}

    def memory_bandwidth(threads, bytes=2 << 30):
        sizes["memory"].append(bytes)
        return 2e10

    def disk_rate(folder, bytes=1 << 30):
        sizes["disk"].append(bytes)
        return SimpleNamespace(bytes_per_second=2e9, direct=True)

    monkeypatch.setattr(_C, "measure_memory_bandwidth", memory_bandwidth)
    monkeypatch.setattr(_C, "measure_disk_rate", disk_rate)
    monkeypatch.setattr("sida_ext.experts.read_plan.read_plan", lambda path, again: default_plan("not asked"))
    return sizes


def machine_with(monkeypatch, memory: int, disk: int) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=disk))


@pytest.mark.parametrize(
    ("memory", "disk", "sizes"),
    [
        (64 << 30, 64 << 30, (2 << 30, 1 << 30)),
        (1 << 30, 800 << 20, (256 << 20, 200 << 20)),
        (256 << 20, 256 << 20, (64 << 20, 64 << 20)),
    ],
)
def test_it_measures_with_a_quarter_of_what_is_free(monkeypatch, asked, tmp_path, memory, disk, sizes):
    machine_with(monkeypatch, memory, disk)
    measured = collect(tmp_path)["measured"]
    assert (asked["memory"], asked["disk"]) == ([sizes[0]], [sizes[1]])
    assert measured["memory bandwidth, GB/s"] == 20.0
    assert measured[f"disk read rate of {tmp_path}, GB/s"] == 2.0


def test_a_machine_that_is_full_is_left_alone(monkeypatch, asked, tmp_path):
    machine_with(monkeypatch, 200 << 20, 100 << 20)
    found = collect(tmp_path)
    assert asked == {"memory": [], "disk": []}
    assert found["measured"] == {
        "memory bandwidth": "not measured: 200.0 MiB of memory are free, least 256.0 MiB",
        f"disk read rate of {tmp_path}": "not measured: 100.0 MiB are free there, least 256.0 MiB",
    }
    assert found["reads of an expert store there"]["why"].startswith("the defaults: not measured: 100.0 MiB are")
    assert not list(tmp_path.iterdir())
