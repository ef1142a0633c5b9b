"""A model larger than memory: the encoder of a checkpoint under a control group's memory limit.

``python -m bench.engine.limited_memory CHECKPOINT --prepare`` packs the stores and records the true routing, untimed.
Then, as root, ``python -m bench.engine.limited_memory CHECKPOINT`` runs each way in a process of its own, cold (page
cache dropped), one after the other, and prints a table: the first forwards from the cold start, then the forwards
after a warm-up.

  mmap         transformers, experts memory-mapped from safetensors: the page cache is the expert cache
  accelerate   transformers, experts offloaded to disk by accelerate (a package of its own); a few forwards suffice
  ours         sida_ext, no predictor: experts are read on demand
  oracle       sida_ext, hash tables that know the true routing, four batches ahead
  overlap      as oracle, order="overlap"
  ...-int8     the same with int8 experts, where the others have bfloat16

``--reuse 40`` draws the sentences from that many. ``--limit 0`` runs without a limit; ``--tight`` lowers it, once the
libraries are imported, to what the engine says it needs: slots, the other weights, the import's memory and 5 % of the
slots. Our ways also tell what bounds them: the computation with every expert in memory, the bytes at the disk's rate,
both measured in the same process after the run (the disk by reading the run's records once more; the run's own reads
where those were faster), how long reads were under way, and what Belady's optimum would have read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.engine.memory_group import MemoryGroup, Peak, cached_bytes, drop_page_cache

LOOKAHEAD = 4
POLL_SECONDS = 0.05
WAY_NAMES = ("mmap", "accelerate", "ours", "oracle", "ours-int8", "oracle-int8", "overlap", "overlap-int8")


def routing_file(arguments: argparse.Namespace, dtype: str) -> Path:
    from sida_ext.experts.folders import default_cache

    count = arguments.cold + arguments.warm_up + arguments.runs
    name = f"{arguments.checkpoint.name}-{dtype}-{count}x{arguments.batch}-of-{arguments.reuse}.pt"
    return default_cache() / "limited_memory" / name


def prepare(arguments: argparse.Namespace) -> None:
    """Stores and true routings of our ways; neither timed nor limited."""
    import torch

    from bench.engine.limited_ways import WAYS, Known, batches, load_ours

    torch.set_num_threads(arguments.threads)
    count = arguments.cold + arguments.warm_up + arguments.runs
    inputs = list(batches(count, arguments.batch, reuse=arguments.reuse))
    for dtype in sorted({WAYS[name].dtype for name in arguments.ways if WAYS[name].kind == "ours"}):
        model = load_ours(arguments.checkpoint, dtype, arguments.expert_memory)
        Known.of(model, inputs).save(routing_file(arguments, dtype))
        model.sida.close()
        print(f"{dtype}: {model.sida.store_path}, {routing_file(arguments, dtype)}")


def disk_rate(path: Path, records: list[int], header: Any, plan: Any, most: int = 2 << 30) -> float:
    """Bytes a second of plain direct reads of some records of a store, with the lanes and the read size of the engine's
    plan, nothing checked.

    The records are those that the run read, in its order: what a disk gives depends on where and how much. The buffers
    are of huge pages, as the engine's slots are: a direct read into small ones is cut into many requests and slower.
    """
    import mmap
    from itertools import count

    import torch

    size = header.record_bytes
    piece = min(plan.read_bytes or size, size)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    # Records stand one behind the other at the end of the file.
    first = os.fstat(descriptor).st_size - header.total_experts * size
    turn = count()
    records = records[: max(1, most // size)]

    def run() -> None:
        huge = 2 << 20
        buffer = mmap.mmap(-1, (piece + 2 * huge - 1) // huge * huge)  # never closed before the views of it
        buffer.madvise(mmap.MADV_HUGEPAGE)
        start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % huge
        view = memoryview(buffer)[start : start + piece]
        while (number := next(turn)) < len(records):
            for begin in range(0, size, piece):
                part = view[: min(piece, size - begin)]
                os.preadv(descriptor, [part], first + records[number] * size + begin)

    begin = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(plan.lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    os.close(descriptor)
    return len(records) * size / seconds


def compute_ms(model: Any, inputs: list[dict[str, Any]]) -> float:
    """A forward whose experts are all in memory: the second and third one of the same sentence."""
    import torch

    times = []
    with torch.inference_mode():
        for batch in inputs:
            model(**batch)
            for _ in range(2):
                model.sida.reset_stats()
                begin = time.perf_counter()
                model(**batch)
                times.append(time.perf_counter() - begin - model.sida.stats().stall_seconds)
    return median(times) * 1e3


def together(events: list[Any]) -> float:
    """Milliseconds in which at least one read was under way."""
    total, until = 0, 0
    for begin, end in sorted((event.begin, event.end) for event in events if event.kind == "copy"):
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return total / 1e6


def measure(outputs: Iterator[Any], cold: int, warm_up: int, at_warm: Any) -> dict[str, Any]:
    """Milliseconds of the first ``cold`` outputs and of those after ``warm_up`` more; one run, nothing drained."""
    begin = time.perf_counter()
    ends = []
    for number, _ in enumerate(outputs, 1):
        ends.append((time.perf_counter() - begin) * 1e3)
        if number == cold + warm_up:
            at_warm()
    warm = [b - a for a, b in zip(ends[cold + warm_up - 1 : -1], ends[cold + warm_up :], strict=True)]
    return {
        "cold_ms": ends[cold - 1] / cold,
        "warm_ms": mean(warm),
        "warm_median_ms": median(warm),
        "warm_p95_ms": sorted(warm)[int(0.95 * len(warm))],
    }


def plainly(model: Any, inputs: list[dict[str, Any]]) -> Iterator[Any]:
    import torch

    with torch.inference_mode():
        for batch in inputs:
            yield model(**batch)


def child(arguments: argparse.Namespace) -> None:
    """One way, in this process; prints one JSON line."""
    from bench.engine.limited_ways import WAYS

    way = WAYS[arguments.child]
    group = MemoryGroup() if arguments.limit else None
    if group is not None:
        group.enter()
    import torch
    import transformers

    import sida_ext  # noqa: F401 - part of what an import takes
    from bench.engine.limited_ways import batches, load_accelerate, load_mmap

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    cold, warm_up, runs = arguments.cold, arguments.warm_up, arguments.runs
    inputs = list(batches(cold + warm_up + runs, arguments.batch, reuse=arguments.reuse))
    if way.kind != "ours" and getattr(arguments, way.kind) is not None:
        warm_up, runs = getattr(arguments, way.kind)
        inputs = inputs[: cold + warm_up + runs]
    imported = group.memory() if group is not None else None
    result: dict[str, Any] = {"way": way.name, "forwards": [cold, warm_up, runs]}
    if way.kind == "ours":
        result |= run_ours(arguments, way, inputs, group, imported)
    else:
        model = (load_mmap if way.kind == "mmap" else load_accelerate)(arguments.checkpoint)
        result |= measure(plainly(model, inputs), cold, warm_up, lambda: None)
    print(json.dumps(result), flush=True)


def run_ours(
    arguments: argparse.Namespace,
    way: Any,
    inputs: list[dict[str, Any]],
    group: MemoryGroup | None,
    imported: dict[str, int] | None,
) -> dict[str, Any]:
    import sida_ext
    from bench.engine.limited_ways import Known, dense_bytes, load_ours
    from sida_ext import _C
    from sida_ext.experts.budget import parse_bytes

    known = Known.load(routing_file(arguments, way.dtype))
    dense = dense_bytes(arguments.checkpoint)
    if arguments.tight:
        if group is None or imported is None:
            raise SystemExit("--tight needs a limit to lower")
        # Slots are whole; a part of one that the budget leaves over is not needed.
        slots_bytes = parse_bytes(arguments.expert_memory)
        group.set_limit(int(1.05 * slots_bytes) + dense + imported["all"])
    model = load_ours(arguments.checkpoint, way.dtype, arguments.expert_memory)
    runtime, record = model.sida, model.sida.header.record_bytes
    outputs = sida_ext.stream(model, inputs, known if way.oracle else None, LOOKAHEAD, way.order)
    read = []

    def at_warm() -> None:
        read.append(runtime.stats().bytes_read)
        runtime.reset_stats()
        runtime.start_trace()

    result = measure(outputs, arguments.cold, arguments.warm_up, at_warm)
    stats, events = runtime.stats(), runtime.take_trace()
    used = known.used(inputs)
    layers, experts = len(runtime.header.layers), runtime.header.num_experts
    wanted, optimal, _ = _C.run_optimal(layers, experts, used, runtime.slots)
    warm_read = stats.bytes_read / arguments.runs
    result |= {
        "slots": runtime.slots,
        "lanes": [runtime.read_plan.lanes, runtime.read_plan.read_bytes],
        "wanted": wanted / len(used),
        "read_mib": warm_read / 2**20,
        "stall_ms": stats.stall_seconds / arguments.runs * 1e3,
        "hit_rate": stats.hit_rate,
        "read_x_optimal": (read[0] + stats.bytes_read) / (optimal * record),
        "store_in_page_cache_mib": cached_bytes(runtime.store_path) / 2**20,
        "direct": stats.direct,
    }
    if imported is not None:
        slots_bytes = runtime.slots * record
        result |= {
            "slots_mib": slots_bytes / 2**20,
            "dense_mib": dense / 2**20,
            "import_mib": imported["anonymous"] / 2**20,
            "allowed_mib": (1.05 * slots_bytes + dense + imported["anonymous"]) / 2**20,
        }
    computed = compute_ms(model, inputs[-6:])
    # Once more what the run read, for a disk's rate differs from place to place and from hour to hour.
    names = {name: layer * experts for layer, name in enumerate(runtime.header.layers)}
    copied = [event.name.split(" expert ") for event in events if event.kind == "copy"]
    records = [names[layer] + int(expert) for layer, expert in copied]
    rate = disk_rate(runtime.store_path, records or [0], runtime.header, runtime.read_plan)
    # The engine's own reads may have been faster: then those are what the disk can do.
    reading_ms = together(events) / arguments.runs
    disk_ms = min(warm_read / rate * 1e3, reading_ms)
    result |= {
        "compute_ms": computed,
        "disk_gb_per_second": rate / 1e9,
        "disk_ms": disk_ms,
        "reading_ms": reading_ms,
        "x_bound": result["warm_ms"] / max(computed, disk_ms),
    }
    model.sida.close()
    return result


def run_way(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one way in a new process; its group's memory is watched from here."""
    group = MemoryGroup() if arguments.limit else None
    if group is not None:
        group.set_limit(int(arguments.limit * 2**30))
        drop_page_cache()
    command = [sys.executable, "-m", "bench.engine.limited_memory", *sys.argv[1:], "--child", way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = Peak(group) if group is not None else None
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if peak is not None:
                peak.look()
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if group is not None:
        group.remove()
    if process.returncode != 0:
        raise SystemExit(f"{way} ended with {process.returncode}: killed by the limit, if that is {-9}")
    result = json.loads(lines[-1])
    if peak is not None:
        result |= {f"peak_{name}_mib": value / 2**20 for name, value in peak.bytes.items()}
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAY_NAMES, default=list(WAY_NAMES[:6]))
    parser.add_argument("--prepare", action="store_true", help="pack, record the true routing, and end")
    parser.add_argument("--limit", type=float, default=3.0, help="GiB; 0: none")
    parser.add_argument("--tight", action="store_true", help="our ways: the limit is what the engine says it needs")
    parser.add_argument("--expert-memory", default="2GiB")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cold", type=int, default=4, help="forwards from the cold start")
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--runs", type=int, default=100, help="forwards measured after the warm-up")
    parser.add_argument("--accelerate", type=int, nargs=2, default=(2, 6), help="its warm-up and runs")
    parser.add_argument("--mmap", type=int, nargs=2, help="its warm-up and runs, if fewer; said in the table")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all ways; medians are printed")
    parser.add_argument("--reuse", type=int, default=0, help="draw the sentences from so many; 0: all are new")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here; those of other ways in it are kept")
    parser.add_argument("--child", choices=WAY_NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        child(arguments)
        return
    if arguments.prepare:
        prepare(arguments)
        return
    results: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.exists():
        results = [r for r in json.loads(arguments.json.read_text()) if r["way"] not in arguments.ways]
    for _ in range(arguments.repeat):
        for way in arguments.ways:
            results.append(run_way(way, arguments))
            print(results[-1], file=sys.stderr)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def print_table(results: list[dict[str, Any]]) -> None:
    ways = [way for way in WAY_NAMES if any(r["way"] == way for r in results)]

    def middle(way: str, key: str) -> float | None:
        found = [r[key] for r in results if r["way"] == way and key in r]
        return median(found) if found else None

    def cell(value: float | None, form: str = ".0f") -> str:
        return "-" if value is None else format(value, form)

    def ratio(way: str, other: str) -> str:
        here, there = middle(way, "warm_ms"), middle(other, "warm_ms")
        return "-" if here is None or there is None else f"{there / here:.2f}"

    print(
        "| way | forwards: cold, warm-up, measured | first, ms each | warm, ms | 95 % | x mmap | x accelerate | "
        "read, MiB | x OPT's reads | stalled, ms | reading, ms | computing alone, ms | its reads alone, ms | "
        "x the larger |"
    )
    print("|---" * 14 + "|")
    for way in ways:
        forwards = next(r["forwards"] for r in results if r["way"] == way)
        print(
            f"| {way} | {', '.join(map(str, forwards))} | {cell(middle(way, 'cold_ms'))} | "
            f"{cell(middle(way, 'warm_ms'))} | {cell(middle(way, 'warm_p95_ms'))} | {ratio(way, 'mmap')} | "
            f"{ratio(way, 'accelerate')} | {cell(middle(way, 'read_mib'))} | "
            f"{cell(middle(way, 'read_x_optimal'), '.3f')} | {cell(middle(way, 'stall_ms'))} | "
            f"{cell(middle(way, 'reading_ms'))} | {cell(middle(way, 'compute_ms'))} | {cell(middle(way, 'disk_ms'))} | "
            f"{cell(middle(way, 'x_bound'), '.2f')} |"
        )
    if not any("peak_all_mib" in r for r in results):
        return
    print(
        "\n| way | peak: anonymous, MiB | allowed | slots | other weights | import | page cache | all | "
        "of the store in the page cache, MiB | disk, GB/s |"
    )
    print("|---" * 10 + "|")
    for way in ways:
        keys = ("peak_anonymous", "allowed", "slots", "dense", "import", "peak_file", "peak_all", "store_in_page_cache")
        cells = " | ".join(cell(middle(way, f"{key}_mib")) for key in keys)
        print(f"| {way} | {cells} | {cell(middle(way, 'disk_gb_per_second'), '.2f')} |")


if __name__ == "__main__":
    main()
