"""How the lanes read the expert store: how many, and how much at once; measured once for each file system and CPU."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sida_ext._load import _C
from sida_ext.experts.budget import available_memory, format_bytes
from sida_ext.experts.folders import default_cache
from sida_ext.files import written_whole

__all__ = ["DEFAULT_LANES", "DEFAULT_READ_BYTES", "ReadPlan", "choose", "folder_plan", "read_plan"]

DEFAULT_LANES, DEFAULT_READ_BYTES = 4, 4 << 20
# Below this a store is read in a moment whatever the plan, and the measuring would take longer than it saves.
SMALLEST_STORE_BYTES = 256 << 20
MEASURE_SECONDS = 1.0
# A plan is as good as the best if it comes this near: what reads of less memory and fewer threads are worth.
NEAR_BEST = 0.95
# With one lane the disk would rest while the lane checks what it read.
FEWEST_LANES = 2
# Memory's rate is measured over an array of this size at the most, and not at all where so little is free.
MOST_MEMORY_BYTES, LEAST_MEMORY_BYTES = 256 << 20, 32 << 20


@dataclass(frozen=True)
class ReadPlan:
    """Lanes, the largest single read in bytes, and why; the rates that were measured, bytes a second, 0: not.

    ``disk_rate`` is of all lanes together, ``lane_rate`` of one that reads while the others rest.
    """

    lanes: int
    read_bytes: int
    why: str
    disk_rate: float = 0.0
    memory_rate: float = 0.0
    lane_rate: float = 0.0


def default_plan(why: str) -> ReadPlan:
    return ReadPlan(DEFAULT_LANES, DEFAULT_READ_BYTES, f"the defaults: {why}")


def choose(rates: list[tuple[int, int, float]]) -> ReadPlan:
    """The fewest lanes, then the smallest reads, that come near the best of the measured rates.

    Args:
        rates: (bytes of each read, lanes, bytes a second).
    """
    usable = [rate for rate in rates if rate[1] >= FEWEST_LANES]
    if not usable:
        return default_plan("the disk is too slow to compare numbers of lanes in the time given")
    best = max(rate for _, _, rate in usable)
    lanes, size, rate = min((lanes, size, rate) for size, lanes, rate in usable if rate >= NEAR_BEST * best)
    why = f"measured {rate / 1e9:.2f} GB/s; the best of {len(rates)} pairs of lanes and read size {best / 1e9:.2f} GB/s"
    alone = max((one for _, count, one in rates if count == 1), default=rate / lanes)
    return ReadPlan(lanes, size, why, rate, lane_rate=min(alone, rate))


def _machine(path: Path) -> str:
    """What a measurement holds for: the file system and the CPU."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    status = os.stat(path)
    system = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}/{os.statvfs(path).f_fsid:x}"
    return f"{system}, {cpu}, {len(os.sched_getaffinity(0))} cores"


def _remembered(cache: Path, machine: str) -> ReadPlan | None:
    try:
        plan = ReadPlan(**json.loads(cache.read_text())[machine])
        # Of an earlier version, which did not measure memory, or kept no rate of a single lane.
        return plan if plan.memory_rate > 0 and (plan.lane_rate > 0 or plan.disk_rate == 0) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never measured here, or written by something else: measured again


def _memory_rate() -> float:
    """Of as many threads as compute, over an array that is a small part of what is free; 0 where that is too little."""
    room = available_memory() // 8
    if room < LEAST_MEMORY_BYTES:
        return 0.0
    torch = sys.modules.get("torch")  # planning measures without it
    threads = len(os.sched_getaffinity(0)) if torch is None else torch.get_num_threads()
    return _C.measure_memory_bandwidth(threads, min(room, MOST_MEMORY_BYTES))


def _remember(cache: Path, machine: str, plan: ReadPlan) -> None:
    try:
        known: Any = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    known[machine] = asdict(plan)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(cache) as partial:
        partial.write_text(json.dumps(known, indent=1) + "\n")


def read_plan(path: Path, cache: Path | None = None, again: bool = False) -> ReadPlan:
    """The plan for a file: remembered from an earlier measurement on this file system and CPU, or measured now.

    Measuring reads the file at random places for about a second, and memory for a fraction of one. Where it cannot
    measure, the plan is the default one, and says why.

    Args:
        path: an expert store, or another file on the same file system.
        cache: where plans are remembered; None: ``read_plans.json`` in the cache folder (``$SIDA_CACHE`` or
            ``~/.cache/sida``).
        again: measure though a plan is remembered.
    """
    try:
        cache = cache if cache is not None else default_cache() / "read_plans.json"
        bytes_there = path.stat().st_size
        if bytes_there < SMALLEST_STORE_BYTES:
            return default_plan(
                f"a store of {format_bytes(bytes_there)} is too small to measure with (least: "
                f"{format_bytes(SMALLEST_STORE_BYTES)})"
            )
        machine = _machine(path)
        known = None if again else _remembered(cache, machine)
        if known is not None:
            return known
        rates, direct = _C.measure_read_rates(str(path), MEASURE_SECONDS)
        plan = choose(rates) if direct else default_plan("the file system has no direct reads to measure")
        plan = replace(plan, memory_rate=_memory_rate())
    except (OSError, RuntimeError) as error:  # RuntimeError: no home for the cache, no figure of the free memory
        return default_plan(f"measuring failed: {error}")
    try:
        _remember(cache, machine, plan)
    except OSError as error:
        plan = replace(plan, why=f"{plan.why}; not remembered: {error}")
    return plan


def folder_plan(folder: Path, again: bool = False) -> ReadPlan:
    """The plan for stores in a folder: remembered, or measured with a file of our own that is removed again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = None if again else _remembered(default_cache() / "read_plans.json", _machine(folder))
        if known is not None:
            return known
        free = shutil.disk_usage(folder).free
        if free < 4 * SMALLEST_STORE_BYTES:
            least = format_bytes(4 * SMALLEST_STORE_BYTES)
            return default_plan(f"not measured: {format_bytes(free)} are free in {folder}, least {least}")
        piece = os.urandom(1 << 20)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".read-plan-") as file:
            for _ in range(SMALLEST_STORE_BYTES >> 20):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            return read_plan(Path(file.name), again=True)
    except OSError as error:
        return default_plan(f"no file to measure with: {error}")
