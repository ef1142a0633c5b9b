"""Writes what a training run measured: report.json for programs, report.png for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

REPORT_FILE = "report.json"
PICTURE_FILE = "report.png"


def write_report(path: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Writes PATH/report.json and PATH/report.png, each under a temporary name first.

    Args:
        path: folder of the predictor.
        report: must hold `held_out` with the summaries of "predictor" and "token_table" (see `Evaluation.summary`).
    """
    folder = Path(path)
    temporary = folder / f".{REPORT_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, folder / REPORT_FILE)
    _draw(report, folder)


def _draw(report: dict[str, Any], folder: Path) -> None:
    # The object interface, so that no window system is asked for and no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours, table = report["held_out"]["predictor"], report["held_out"]["token_table"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    hits, trust = figure.subplots(1, 2)
    layers = range(len(ours["top1"]))
    for name, summary, offset, shade in (("predictor", ours, -0.2, 1.0), ("token table", table, 0.2, 0.45)):
        places = [layer + offset for layer in layers]
        hits.bar(places, summary["top3"], 0.36, color="tab:blue", alpha=0.35 * shade, label=f"{name}, top 3")
        hits.bar(places, summary["top1"], 0.36, color="tab:blue", alpha=shade, label=f"{name}, top 1")
    hits.set(xlabel="MoE layer", ylabel="share of tokens", title="Hits on held-out text", xticks=list(layers))
    hits.set_ylim(0, 1)
    hits.legend(loc="lower left", fontsize=8)
    trust.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for layer, curve in enumerate(ours["reliability"]):
        trust.plot(
            [point["confidence"] for point in curve],
            [point["accuracy"] for point in curve],
            marker="o",
            markersize=3,
            label=f"layer {layer} (ECE {ours['ece'][layer]:.3f})",
        )
    trust.set(xlabel="predicted probability", ylabel="share that came true", title="Reliability of the first candidate")
    trust.legend(fontsize=8)
    temporary = folder / f".{os.getpid()}.{PICTURE_FILE}"
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, folder / PICTURE_FILE)
