"""``python -m bench``: the kernel benchmarks, one line for each case, and a roofline picture.

``--minutes`` ends the run after the case that is in progress then. Results go to bench/results/NAME.json (as
pytest-benchmark writes them) and NAME.png. ``--add`` keeps the cases that the file has already, so that a long run can
be made in pieces (``-k`` picks the cases); each case carries the machine's rates as its own process measured them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


class Deadline:
    """Skips, by name, the cases that would start after the time is up."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.until = minutes, time.monotonic() + 60 * minutes

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.until:
            pytest.skip(f"the {self.minutes:g} minutes are over; --minutes gives more")


def case_key(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["extra_info"]["instruction_set"], entry["name"]


def write_record(new: Path, record: Path, add: bool) -> list[dict[str, Any]]:
    """Moves pytest-benchmark's file to ``record``, without the host's name; its cases, with those kept."""
    made = json.loads(new.read_text())
    new.unlink()
    made["machine_info"].pop("node", None)
    entries = {case_key(entry): entry for entry in made["benchmarks"]}
    if add and record.exists():
        kept = {case_key(entry): entry for entry in json.loads(record.read_text())["benchmarks"]}
        entries = kept | entries
    made["benchmarks"] = list(entries.values())
    record.write_text(json.dumps(made, indent=1) + "\n")
    return [entry["extra_info"] for entry in made["benchmarks"]]


def print_table(found: list[dict[str, Any]]) -> None:
    """One line a case. "x transformers" is transformers in the weights' dtype; "x fp32" transformers in float32."""
    by_shape = {
        (c["instruction_set"], c["shape"], c["tokens"]): c["peer_ms"].get("transformers")
        for c in found
        if c["dtype"] == "float32"
    }
    middle = {kind: statistics.median(case[kind] for case in found) / 1e9 for kind in ("bandwidth", "gemm")}
    first = found[0]
    columns = f"{'shape':20} {'weights':9} {'tokens':>6} {'experts':>7} {'ms':>9} {'GB/s':>6} {'of':>6} "
    columns += (
        f"{'GFLOP/s':>8} {'of':>6} {'x floor':>8} {'x transformers':>15} {'x fp32':>7} {'x grouped':>10} undisturbed"
    )
    print(
        f"\n{first['instruction_set']}, {first['threads']} threads; medians of the run: {middle['bandwidth']:.1f} GB/s "
        f"read, {middle['gemm']:.0f} GFLOP/s torch.mm float32; {first['multiply_add'] / 1e9:.0f} GFLOP/s multiply-adds "
        f"in registers\n{columns}"
    )
    for case in found:
        peers = []
        fp32 = by_shape.get((case["instruction_set"], case["shape"], case["tokens"]))
        for value in (case["peer_ms"].get("transformers"), fp32, case["peer_ms"].get("grouped")):
            peers.append("-" if value is None else f"{value / case['ms']:.2f}")
        print(
            f"{case['shape']:20} {case['dtype']:9} {case['tokens']:6d} {case['distinct_experts']:7.1f} "
            f"{case['ms']:9.3f} {case['gb_per_s']:6.1f} {case['bandwidth'] / 1e9:6.1f} {case['gflop_per_s']:8.1f} "
            f"{case['gemm'] / 1e9:6.0f} {case['x_floor']:8.2f} "
            f"{peers[0]:>15} {peers[1]:>7} {peers[2]:>10} {case['undisturbed']:>6}/{case['rounds']}"
        )


def draw_roofline(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 5.5))
    bandwidth, gemm = (max(case[kind] for case in found) / 1e9 for kind in ("bandwidth", "gemm"))
    intensity = np.logspace(-1, 3, 200)
    axes.loglog(intensity, np.minimum(intensity * bandwidth, gemm), color="black", label="floor: read rate, fp32 GEMM")
    peak = found[0]["multiply_add"] / 1e9
    axes.axhline(peak, color="gray", linestyle=":", label="fused multiply-adds in registers")
    for dtype, marker in (("float32", "o"), ("bfloat16", "s"), ("float16", "^"), ("int8", "D")):
        chosen = [c for c in found if c["dtype"] == dtype]
        points = [(c["flops_per_byte"], c["gflop_per_s"]) for c in chosen]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, label=dtype, alpha=0.8)
    axes.set_xlabel("floating-point operations per byte of the distinct experts")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"moe_ffn, {found[0]['instruction_set']}, {found[0]['threads']} threads")
    axes.legend()
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--name", default="latest", help="of the files in bench/results")
    parser.add_argument("--add", action="store_true", help="keep the cases that the record has already")
    parser.add_argument("-k", default="", help="cases, as in pytest -k")
    arguments = parser.parse_args()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    record, picture = results / f"{arguments.name}.json", results / f"{arguments.name}.png"
    new = results / f"{arguments.name}.new.json"
    flags = [f"--rootdir={HERE}", f"--confcutdir={HERE}", "-c", str(HERE.parent / "pyproject.toml"), "-k", arguments.k]
    flags += ["--benchmark-enable", f"--benchmark-json={new}", "--benchmark-columns=median"]
    flags += ["-q", "-p", "no:cacheprovider"]
    # Huge pages where the system gives them on request, as the slots of the engine have. torch reads it when loaded.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    status = pytest.main([str(HERE / "kernels" / "bench_moe_ffn.py"), *flags], plugins=[Deadline(arguments.minutes)])
    if status != 0:
        return int(status)
    found = write_record(new, record, arguments.add)
    print_table(found)
    draw_roofline(found, picture)
    print(f"\nrecord: {record}\nroofline: {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
