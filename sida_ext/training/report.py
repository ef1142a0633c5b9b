"""Writes what a training run measured: report.json for programs, report.png for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sida_ext.files import written_whole

REPORT_FILE = "report.json"
PICTURE_FILE = "report.png"


def write_report(path: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Write PATH/report.json and PATH/report.png, each whole or not at all.

    Args:
        path: folder of the predictor.
        report: must hold ``held_out`` with the summaries of "predictor" and "token_table" (``Evaluation.summary``).
            With ``confident``, what ``routing_curve`` gives, its curves are drawn too; a decoder's report has none, as
            its table never replaces the router.
    """
    folder = Path(path)
    with written_whole(folder / REPORT_FILE, sync=True) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")
    _draw(report, folder)


def _draw(report: dict[str, Any], folder: Path) -> None:
    # The object interface, so that no window system is asked for and no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours, table = report["held_out"]["predictor"], report["held_out"]["token_table"]
    panels = 3 if "confident" in report else 2
    figure = Figure(figsize=(16 / 3 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    hits, trust = axes[:2]
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
    if "confident" in report:
        _draw_confident(report["confident"], axes[2])
    with written_whole(folder / PICTURE_FILE) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _draw_confident(curve: list[dict[str, Any]], routed: Any) -> None:
    # The threshold above 1 is the router, which every curve is relative to.
    points = [point for point in curve if point["threshold"] <= 1]
    for field, label in (
        ("same_class", "same class as with the router"),
        ("by_table", "choices made by the table"),
        ("transfers_saved", "unpredicted transfers saved"),
    ):
        if all(field in point for point in points):
            routed.plot([p["threshold"] for p in points], [p[field] for p in points], marker="o", label=label)
    kept = [1 - point["output_error"] for point in points]
    routed.plot([p["threshold"] for p in points], kept, marker="o", label="1 - error of the encoder's output")
    routed.set(xlabel="threshold", ylabel="share", title='routing="confident" against the router')
    routed.legend(fontsize=8)
