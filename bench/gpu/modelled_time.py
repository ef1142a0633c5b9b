"""Modelled times of serving one sentence at a time on GPUs that this project was never run on.

    python -m bench.gpu.modelled_time [--record PROGRAM]

Counts come from a recording run (``tests/cuda/record_counts.cpp``): launches, bytes and tensor-core instructions of a
layer executed by the test harness, expert copies of the engine's Residency at each budget, runtime calls of a copy.
They lie in ``bench/results/cuda_counts.json``; ``--record`` makes them again with a built ``cuda_record_counts``. This
file turns them into times with published peaks and writes ``bench/results/cuda_modelled.json`` and
``docs/cuda_modelled.md``. Every figure of time is modelled: none was measured, and a roofline is the least time that
the counted work can take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sida_ext.planning.gpu import CALL_SECONDS, GPUS, LAUNCH_SECONDS, LINKS, Card

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ROOT / "bench/results/cuda_counts.json"
MODELLED = ROOT / "bench/results/cuda_modelled.json"
DOCUMENT = ROOT / "docs/cuda_modelled.md"

MMA_FLOPS = 2 * 16 * 8 * 16  # of one m16n8k16

PUBLISHED = (
    ("throughput over the mean of HF, DeepSpeed and Tutel, base-128", "2.60x", "2.52x", "1.26x"),
    ("the same, base-256", "3.93x", "3.83x", "1.57x"),
    ("GPU memory saved, base-128", "> 60 %", "> 60 %", "20 %"),
    ("GPU memory saved, base-256", "> 80 %", "> 80 %", "40 %"),
)


@dataclass(frozen=True)
class Row:
    """One device, link, model and budget; times are modelled, of all MoE layers of one sentence."""

    gpu: str
    pcie: int
    model: str
    share: float  # of all experts that fit in GPU memory
    expert_memory_bytes: int
    copies: float  # a sentence, predicted: next_use with a lookahead of four sentences
    copies_lru: float  # the same without a prediction
    modelled_compute_seconds: float
    modelled_overlapped_seconds: float
    modelled_on_demand_seconds: float
    modelled_nothing_kept_seconds: float


def layer_seconds(launches: list[dict[str, Any]], gpu: Card) -> float:
    """Modelled roofline of a layer's launches, one after another."""
    return sum(
        LAUNCH_SECONDS
        + max(
            (launch["bytes_read"] + launch["bytes_written"]) / gpu.bandwidth,
            launch["mma_m16n8k16"] * MMA_FLOPS / gpu.flops,
        )
        for launch in launches
    )


def copy_seconds(counts: dict[str, Any], record_bytes: int, pcie: int) -> float:
    """Modelled time of one expert's copy: its bytes at the link's rate and its runtime calls."""
    transfer = counts["transfer"]
    calls = sum(transfer["calls"].values()) / transfer["copies"]
    return record_bytes / LINKS[pcie] + calls * CALL_SECONDS


def modelled(counts: dict[str, Any]) -> list[Row]:
    """All rows, in the order of the document."""
    rows = []
    for gpu in GPUS:
        for pcie in gpu.links:
            for model in counts["models"]:
                compute = model["moe_layers"] * layer_seconds(model["layer"]["launches"], gpu)
                copy = copy_seconds(counts, model["record_bytes"], pcie)
                for budget in model["budgets"]:
                    copies = budget["copies"]
                    rows.append(
                        Row(
                            gpu.name,
                            pcie,
                            model["name"],
                            budget["share"],
                            budget["slots"] * model["record_bytes"],
                            copies["next_use"],
                            copies["lru"],
                            compute,
                            max(compute, copies["next_use"] * copy),
                            compute + copies["lru"] * copy,
                            compute + budget["wanted"] * copy,
                        )
                    )
    return rows


def render(counts: dict[str, Any]) -> str:
    """The document."""
    traffic = counts["traffic"]
    rows = modelled(counts)
    lines = [
        "# Modelled times on GPUs",
        "",
        "Made by `python -m bench.gpu.modelled_time`; do not edit. **Every time and every ratio of times here is "
        "modelled.** None was measured: nothing of this has run on a GPU.",
        "",
        "What is counted, by a recording run on the CPU (`tests/cuda/record_counts.cpp`, figures in "
        "`bench/results/cuda_counts.json`):",
        "",
        "- one MoE layer of real size through the real kernels in the test harness: launches, distinct bytes read and "
        "written by each, tensor-core instructions; every layer of the model is taken to cost the same;",
        f"- {traffic['sentences'] - traffic['warm_up']} sentences of {traffic['tokens']} tokens, one at a time, after "
        f"{traffic['warm_up']} others, through the engine's own Residency at each budget: experts copied;",
        "- the runtime calls of a copy and of its waits, on the recording runtime.",
        "",
        f"The routing is synthetic: tokens follow a Zipf law over {traffic['types']:,} types, a type names its expert "
        f"{traffic['by_type']:.0%} of the time (what a table of token types predicts of a small trained encoder), the "
        "rest is uniform. Real text repeats itself more or less than that, and copies go with it. Every prediction is "
        "right. Attention, dense layers, the predictor and disk reads are left out: all experts lie in pinned memory.",
        "",
        "What is assumed: kernels at their roofline (the least time that the counted work can take), "
        f"{LAUNCH_SECONDS * 1e6:g} µs for each launch and {CALL_SECONDS * 1e6:g} µs for each runtime call, pinned "
        f"copies at {LINKS[4] / 1e9:g} GB/s over PCIe 4.0 x16 and {LINKS[5] / 1e9:g} GB/s over 5.0 (the links' own "
        "rates are 31.5 and 63 GB/s). Peaks:",
        "",
        "| GPU | memory, GB/s | bf16, TFLOP/s | source |",
        "|---|---|---|---|",
    ]
    lines += [f"| {g.name} | {g.bandwidth / 1e9:g} | {g.flops / 1e12:g} | {g.source} |" for g in GPUS]
    lines += [
        "",
        "## Counted",
        "",
        "| model | kernel | blocks | MB read | MB written | mma |",
        "|---|---|---|---|---|---|",
    ]
    for model in counts["models"]:
        layer = model["layer"]
        name = f"{model['name']}, {layer['tokens']} tokens, {layer['distinct_experts']} experts"
        for launch in layer["launches"]:
            lines.append(
                f"| {name} | `{launch['kernel']}` | {launch['blocks']} | {launch['bytes_read'] / 1e6:.3f} | "
                f"{launch['bytes_written'] / 1e6:.3f} | {launch['mma_m16n8k16']} |"
            )
    transfer = counts["transfer"]
    calls = ", ".join(f"{count / transfer['copies']:g} {call}" for call, count in transfer["calls"].items() if count)
    lines += ["", f"Runtime calls of a copy, with the wait and the record of a layer that reads it: {calls}.", ""]
    lines += [
        "## Modelled step",
        "",
        "MoE layers of one sentence. *Overlapped*: copies predicted in time run beside the kernels, the longer of the "
        "two counts. *On demand*: no prediction, least recently used goes, copies and kernels one after the other. The "
        "last column is the modelled on-demand step that keeps no expert at all over the modelled overlapped one.",
    ]
    few_bits = [row for row in rows if " " in row.model]
    rows = [row for row in rows if " " not in row.model]
    half = next(row for row in rows if row.share == 0.4)
    shares = half.modelled_compute_seconds / half.modelled_overlapped_seconds
    lines += [
        "",
        f"What it says: one sentence at a time gives a copy almost nothing to hide behind. On {half.gpu} with "
        f"{half.share:.0%} of {half.model} in memory the kernels are {shares:.0%} of the modelled step, so bytes that "
        "are not copied (hits, smaller weights, larger batches over the same experts) decide; overlap helps little.",
    ]
    group = None
    for row in rows:
        if group != (row.gpu, row.pcie, row.model):
            group = (row.gpu, row.pcie, row.model)
            lines += [
                "",
                f"### {row.model}, {row.gpu}, PCIe {row.pcie}.0 (modelled)",
                "",
                "| budget | expert memory, GB | copies, predicted | copies, LRU | modelled kernels, ms | "
                "modelled overlapped, ms | modelled on demand, ms | modelled ratio |",
                "|---|---|---|---|---|---|---|---|",
            ]
        lines.append(
            f"| {row.share:.0%} | {row.expert_memory_bytes / 1e9:.2f} | {row.copies:.1f} | {row.copies_lru:.1f} | "
            f"{row.modelled_compute_seconds * 1e3:.2f} | {row.modelled_overlapped_seconds * 1e3:.2f} | "
            f"{row.modelled_on_demand_seconds * 1e3:.2f} | "
            f"{row.modelled_nothing_kept_seconds / row.modelled_overlapped_seconds:.2f}x |"
        )
    lines += [
        "",
        "## Weights of 4 bits (modelled)",
        "",
        "The same model, routing and kernels with experts in int4 and mxfp4, activations in bf16. The last column is "
        "the modelled overlapped step of bf16 experts with the same share of them in memory over this one.",
        "",
        "| model | GPU | budget | expert memory, GB | modelled kernels, ms | modelled overlapped, ms "
        "| modelled ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (one for one in few_bits if one.share in (0.2, 0.4, 1.0)):
        plain = (row.gpu, row.pcie, row.model.split(" ")[0], row.share)
        whole = next(one for one in rows if (one.gpu, one.pcie, one.model, one.share) == plain)
        lines.append(
            f"| {row.model} | {row.gpu}, PCIe {row.pcie}.0 | {row.share:.0%} | {row.expert_memory_bytes / 1e9:.2f} | "
            f"{row.modelled_compute_seconds * 1e3:.2f} | {row.modelled_overlapped_seconds * 1e3:.2f} | "
            f"{whole.modelled_overlapped_seconds / row.modelled_overlapped_seconds:.2f}x |"
        )
    lines += [
        "",
        "## Beside SiDA's published figures",
        "",
        "SiDA-MoE (MLSys 2024, arXiv 2310.18859), one A100 80 GB, batch 1, as published:",
        "",
        "| | SST2 | MRPC | MultiRC |",
        "|---|---|---|---|",
        *(f"| {name} | {' | '.join(values)} |" for name, *values in PUBLISHED),
        "",
        "Those are measured ratios to systems that hold every expert in GPU memory and visit all of them; the modelled "
        "ratios above are to a modelled step that copies every expert it uses. They must not be divided by each other. "
        "What can be set side by side is memory: the modelled cost of keeping the share of experts that SiDA kept, on "
        "an A100. *All resident* is the modelled time of the kernels alone.",
        "",
        "| model | GPU memory saved | modelled overlapped, ms | modelled all resident, ms | modelled slowdown |",
        "|---|---|---|---|---|",
    ]
    for name, share in (("switch-base-128", 0.4), ("switch-base-256", 0.2)):
        own = [row for row in rows if row.gpu == GPUS[0].name and row.model == name]
        kept = next(row for row in own if row.share == share)
        seconds, resident = kept.modelled_overlapped_seconds, kept.modelled_compute_seconds
        lines.append(
            f"| {name} | {1 - share:.0%} | {seconds * 1e3:.2f} | {resident * 1e3:.2f} | {seconds / resident:.1f}x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="a built cuda_record_counts: count again first (minutes, 5 GiB)")
    options = parser.parse_args()
    if options.record is not None:
        COUNTS.parent.mkdir(exist_ok=True)
        COUNTS.write_text(subprocess.run([options.record], check=True, capture_output=True, text=True).stdout)
    if not COUNTS.exists():
        parser.error(f"{COUNTS} does not exist; build cuda_record_counts (SIDA_CPP_TESTS=ON) and pass it to --record")
    counts = json.loads(COUNTS.read_text())
    MODELLED.write_text(json.dumps([asdict(row) for row in modelled(counts)], indent=1) + "\n")
    DOCUMENT.write_text(render(counts))
    print(f"wrote {MODELLED.relative_to(ROOT)} and {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
