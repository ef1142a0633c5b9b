"""The table that `make gpu-check` writes: what was measured on a card, beside the modelled times."""

from __future__ import annotations

from typing import Any


def document(card: str, parts: list[str], figures: dict[str, Any], modelled: list[dict[str, Any]]) -> str:
    """Markdown of one run. `figures` has what its parts found, keys missing where a part failed; `modelled` is
    ``bench/results/cuda_modelled.json``."""
    lines = [
        "# Dry run: nothing here was measured on a GPU" if card == "dry" else f"# Measured on: {card}",
        "",
        "Made by `make gpu-check`; do not edit.",
        "",
        *(f"- {part}" for part in parts),
    ]
    if "copy_rates" in figures:
        lines += ["", "## Copies from host memory, GB/s", "", "| | " + " | ".join(_sizes(figures)) + " |"]
        lines.append("|---" * (1 + len(_sizes(figures))) + "|")
        for kind, rates in figures["copy_rates"].items():
            cells = [f"{rates[size] / 1e9:.1f}" if size in rates else "" for size in _sizes(figures)]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    if figures.get("layer"):
        lines += ["", "## One layer", "", "| shape | ms | GB/s | TFLOP/s | x floor | torch's grouped product, ms |"]
        lines.append("|---|---|---|---|---|---|")
        for row in figures["layer"]:
            grouped = f"{row['grouped_ms']:.4f}" if row.get("grouped_ms") is not None else ""
            lines.append(
                f"| {row['case']} | {row['ms']:.4f} | {row['gb_per_s']:.0f} | {row['tflop_per_s']:.1f} | "
                f"{row['x_floor']:.2f} | {grouped} |"
            )
    if "whole_model" in figures:
        lines += [
            "",
            "## A whole encoder, one sentence of 32 tokens at a time",
            "",
            whole_model_table(figures["whole_model"]),
        ]
    rows = [row for row in modelled if row["model"] == "switch-base-128"]
    lines += [
        "",
        "## Modelled, for comparison",
        "",
        "MoE layers of one sentence of switch-base-128, without attention, dense layers and predictor; none of these "
        "was measured (docs/cuda_modelled.md).",
        "",
        "| GPU | PCIe | budget | overlapped, ms | on demand, ms |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['gpu']} | {row['pcie']}.0 | {row['share']:.0%} | {row['modelled_overlapped_seconds'] * 1e3:.2f} | "
        f"{row['modelled_on_demand_seconds'] * 1e3:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _sizes(figures: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(size for rates in figures["copy_rates"].values() for size in rates))


def whole_model_table(results: dict[str, dict[str, Any]]) -> str:
    """What ``bench.gpu.whole_model`` found, a row for each way to serve the model."""
    lines = [
        "| | tokens/s | median, ms | p95, ms | GPU memory, GB | hit rate | stalled, ms | copies beside kernels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | | |")
            continue
        optional = (
            f"{row['hit_rate']:.1%}" if "hit_rate" in row else "",
            f"{row['stall_s_each'] * 1e3:.2f}" if "stall_s_each" in row else "",
            f"{row['copies_beside_kernels']:.0%} of {row['copy_s'] * 1e3:.0f} ms" if "copy_s" in row else "",
        )
        lines.append(
            f"| {name} | {row['tokens_per_s']:.0f} | {row['median_s'] * 1e3:.2f} | {row['p95_s'] * 1e3:.2f} | "
            f"{row['gpu_bytes'] / 1e9:.2f} | " + " | ".join(optional) + " |"
        )
    return "\n".join(lines)
