"""How the lanes read: measured once, remembered, never a reason for a load to fail."""

from __future__ import annotations

import json

import pytest
from transformers import SwitchTransformersEncoderModel

import sida_ext
from sida_ext import _C
from sida_ext.experts import read_plan
from sida_ext.experts.read_plan import DEFAULT_LANES, DEFAULT_READ_BYTES, ReadPlan, choose
from tests.support.reference import build, small_config

MIB = 1 << 20


@pytest.fixture
def store(tmp_path):
    """A file that is large enough to measure with, and takes no room."""
    path = tmp_path / "store"
    with path.open("wb") as file:
        file.truncate(read_plan.SMALLEST_STORE_BYTES)
    return path


def test_the_cheapest_of_the_good_ones_is_chosen():
    rates = [(MIB, 1, 4.4e9), (MIB, 2, 3.0e9), (4 * MIB, 2, 4.25e9), (8 * MIB, 2, 4.3e9), (MIB, 4, 4.4e9)]
    plan = choose(rates)  # one lane would leave the disk idle while it checks
    assert (plan.lanes, plan.read_bytes) == (2, 4 * MIB)
    assert "4.25 GB/s" in plan.why
    assert "4.40 GB/s" in plan.why
    assert plan.lane_rate == 4.25e9  # one lane alone is no faster than what is planned with
    assert choose([(MIB, 1, 1e9), (4 * MIB, 1, 2e9), (MIB, 4, 3e9)]).lane_rate == 2e9
    assert choose([(MIB, 4, 3e9)]).lane_rate == 0.75e9  # not measured: its share


@pytest.mark.parametrize("rates", [[], [(MIB, 1, 1e7)]])
def test_a_disk_too_slow_to_compare_gets_the_defaults(rates):
    plan = choose(rates)
    assert (plan.lanes, plan.read_bytes) == (DEFAULT_LANES, DEFAULT_READ_BYTES)
    assert "too slow" in plan.why


def test_it_is_measured_once(store, tmp_path, monkeypatch):
    calls = []

    def measure(path, seconds):
        calls.append(path)
        return [(2 * MIB, 8, 1e9)], True

    monkeypatch.setattr(_C, "measure_read_rates", measure)
    monkeypatch.setattr(_C, "measure_memory_bandwidth", lambda threads, bytes: 20e9)
    cache = tmp_path / "cache" / "plans.json"
    first = read_plan.read_plan(store, cache)
    assert (first.lanes, first.read_bytes, first.disk_rate, first.memory_rate) == (8, 2 * MIB, 1e9, 20e9)
    assert read_plan.read_plan(store, cache) == first
    assert len(calls) == 1
    assert read_plan.read_plan(store, cache, again=True) == first
    cache.write_text("{ not JSON")
    assert read_plan.read_plan(store, cache) == first
    assert len(calls) == 3
    older = json.loads(cache.read_text())
    for known in older.values():
        del known["lane_rate"]
    cache.write_text(json.dumps(older))
    assert read_plan.read_plan(store, cache) == first
    assert len(calls) == 4
    older = {
        name: {"lanes": 3, "read_bytes": MIB, "why": "memory was not measured"}
        for name in json.loads(cache.read_text())
    }
    cache.write_text(json.dumps(older))
    assert read_plan.read_plan(store, cache) == first
    assert len(calls) == 5
    monkeypatch.setattr(read_plan, "_machine", lambda path: "another machine")
    read_plan.read_plan(store, cache)
    assert len(calls) == 6


def test_memory_is_measured_over_a_small_part_of_what_is_free(monkeypatch):
    asked = []
    monkeypatch.setattr(_C, "measure_memory_bandwidth", lambda threads, bytes: asked.append(bytes) or 5e9)
    for free, size in ((64 << 30, 256 << 20), (1 << 30, 128 << 20)):
        monkeypatch.setattr(read_plan, "available_memory", lambda free=free: free)
        assert read_plan._memory_rate() == 5e9
        assert asked.pop() == size
    monkeypatch.setattr(read_plan, "available_memory", lambda: 100 << 20)
    assert read_plan._memory_rate() == 0
    assert not asked


def test_what_cannot_be_measured_says_so(store, tmp_path, monkeypatch):
    cache = tmp_path / "plans.json"
    small = tmp_path / "small"
    small.write_bytes(bytes(5000))
    assert "4.9 KiB is too small" in read_plan.read_plan(small, cache).why
    monkeypatch.setattr(_C, "measure_read_rates", lambda path, seconds: ([(MIB, 8, 1e9)], False))
    plan = read_plan.read_plan(store, cache, again=True)
    assert (plan.lanes, plan.read_bytes) == (DEFAULT_LANES, DEFAULT_READ_BYTES)
    assert "no direct reads" in plan.why

    def fail(path, seconds):
        raise OSError("no such luck")

    monkeypatch.setattr(_C, "measure_read_rates", fail)
    assert "no such luck" in read_plan.read_plan(store, cache, again=True).why
    assert "measuring failed" in read_plan.read_plan(tmp_path / "nothing", cache).why


@pytest.mark.parametrize("large", [True, False])
def test_no_home_and_no_figure_of_the_memory_are_no_reason_to_fail(store, tmp_path, monkeypatch, large):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    small = tmp_path / "small"
    small.write_bytes(bytes(5000))
    monkeypatch.setattr(read_plan, "default_cache", homeless)
    plan = read_plan.read_plan(store if large else small)
    assert (plan.lanes, plan.read_bytes) == (DEFAULT_LANES, DEFAULT_READ_BYTES)
    assert "home directory" in plan.why
    monkeypatch.setattr(_C, "measure_read_rates", lambda path, seconds: ([(MIB, 8, 1e9)], True))

    def unknown():
        raise RuntimeError("/proc/meminfo has no MemAvailable")

    monkeypatch.setattr(read_plan, "available_memory", unknown)
    assert "MemAvailable" in read_plan.read_plan(store, tmp_path / "plans.json").why


def test_a_cache_that_cannot_be_written_costs_nothing_else(store, tmp_path, monkeypatch):
    monkeypatch.setattr(_C, "measure_read_rates", lambda path, seconds: ([(MIB, 8, 1e9)], True))
    (tmp_path / "file").write_text("")
    plan = read_plan.read_plan(store, tmp_path / "file" / "plans.json")
    assert plan.lanes == 8
    assert "not remembered" in plan.why


def test_a_real_file_is_measured(store, tmp_path):
    rates, _ = _C.measure_read_rates(str(store), 0.2)
    assert rates
    assert all(rate > 0 for _, _, rate in rates)
    assert {lanes for _, lanes, _ in rates} <= {1, 2, 4, 8}
    with pytest.raises(OSError, match="nothing"):
        _C.measure_read_rates(str(tmp_path / "nothing"), 0.2)
    small = tmp_path / "small"
    small.write_bytes(bytes(5000))
    with pytest.raises(ValueError, match="5000 bytes, expected at least"):
        _C.measure_read_rates(str(small), 0.2)


def test_each_can_be_set_by_hand(tmp_path):
    build(SwitchTransformersEncoderModel, small_config()).save_pretrained(tmp_path)

    def plan(**given):
        model = sida_ext.from_pretrained(tmp_path, expert_memory="50%", **given)
        model.sida.close()
        return model.sida.read_plan

    assert plan(lanes=3, read_bytes=8192) == ReadPlan(3, 8192, "set by hand")
    assert "too small" in plan().why
    assert plan(lanes=3).why.startswith("lanes set by hand; read size: the defaults")
    assert plan(read_bytes=0).read_bytes == 0
    with pytest.raises(ValueError, match="read_bytes is 100, expected a multiple of 4096"):
        plan(read_bytes=100)
