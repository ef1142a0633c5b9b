"""The picture of `make paper`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.paper.tables import PREDICTORS, base_experts, medians

COLOURS = {"none": "tab:gray", "token table": "tab:orange", "hash predictor": "tab:blue", "oracle": "tab:green"}


def draw(path: Path, found: dict[str, Any]) -> None:
    timed = any(name.startswith("time base-") for name in found)
    figure = Figure(figsize=(15, 12 if timed else 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3 if timed else 1, 3, squeeze=False)
    for place, (needed, drawn) in enumerate(
        (("models", draw_hits), ("sparsity", draw_touched), ("language", draw_language))
    ):
        if needed in found:
            drawn(axes[0, place], found)
        else:
            axes[0, place].set_axis_off()
    experts = base_experts(found)
    for column in range(3 if timed else 0):
        if column >= len(experts) or f"time base-{experts[column]}" not in found:
            axes[1, column].set_axis_off()
            axes[2, column].set_axis_off()
            continue
        name = f"base-{experts[column]}"
        draw_budget(axes[1, column], found[f"time {name}"], "tokens_per_s", f"{name} shapes: throughput", "tokens/s")
        draw_budget(
            axes[2, column], found[f"time {name}"], "median_ms", f"{name} shapes: latency", "ms a sentence, median"
        )
    figure.savefig(path, dpi=100)


def draw_hits(axes: Axes, found: dict[str, Any]) -> None:
    rows = [
        (name.split(" experts")[0].split(", ")[-1], r["token_table"], r["predictor"])
        for name, r in found["models"].items()
    ]
    rows.sort(key=lambda row: int(row[0]))
    rows = [(f"{name}\ntrained", table, ours) for name, table, ours in rows]
    for experts in base_experts(found):
        part = found[f"base-{experts}"]
        rows.append((f"{experts}\nrandom", part["token table"], part["hash predictor"]))
    for offset, (n, label) in ((-0.2, (1, "token table")), (0.2, (2, "hash predictor"))):
        heights = [row[n]["mean_top3"] for row in rows]
        axes.bar([x + offset for x in range(len(rows))], heights, 0.38, label=label, color=COLOURS[label])
    axes.axhspan(0.9049, 0.99, color="tab:red", alpha=0.15, label="published range")
    axes.set(
        title="Top-3 hits on held-out text", xlabel="experts in a layer, weights", ylabel="share of tokens", ylim=(0, 1)
    )
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    axes.legend(fontsize=8, loc="lower left")


def draw_touched(axes: Axes, found: dict[str, Any]) -> None:
    columns = {"bundled, 32 experts": found["sparsity"]["touched"]}
    columns |= {f"base-{experts}": found[f"base-{experts}"]["touched"] for experts in base_experts(found)}
    bounds = sorted(
        {bound for touched in columns.values() for bound in touched}, key=lambda bound: int(bound.split("-")[0])
    )
    for label, touched in columns.items():
        points = [(bounds.index(bound), value[1]) for bound, value in touched.items()]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(
        title="Experts that a sentence touches", xlabel="tokens", ylabel="share of a layer's experts", ylim=(0, 1.02)
    )
    axes.set_xticks(range(len(bounds)), bounds)
    axes.legend(fontsize=8)


def draw_language(axes: Axes, found: dict[str, Any]) -> None:
    rows = {"denoiser": found["language"]["denoiser"]}
    if "masked" in found["language"]:
        rows["masked language model"] = found["language"]["masked"]["rows"]
    shown = ["predicted", "predicted, token table", "experts by chance", "no experts"]
    for offset, (model, part) in zip((-0.2, 0.2), rows.items(), strict=False):
        axes.bar(
            [x + offset for x in range(len(shown))],
            [part[name]["ratio"] - 1 for name in shown],
            0.38,
            bottom=1,
            label=model,
        )
    axes.axhline(1.3, color="black", linestyle=":", label="aim: 1.3")
    axes.axhline(2.41, color="tab:red", linestyle="--", label="published, C4, base-128: 2.41")
    axes.set(title="Perplexity against the router's", ylabel="ratio")
    axes.set_yscale("log")
    top = max([2.6, *(part[name]["ratio"] * 1.1 for part in rows.values() for name in shown)])
    axes.set_ylim(0.95, top)
    ticks = [tick for tick in (1, 1.3, 2, 3, 5, 10, 20, 50) if tick < top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(shown)), [name.replace(", ", ",\n").replace(" by", "\nby") for name in shown])
    axes.legend(fontsize=8, loc="upper left")


def draw_budget(axes: Axes, timed: dict[str, Any], field: str, title: str, label: str) -> None:
    rows = medians(timed)
    for name in PREDICTORS:
        points = sorted((budget, row[field]) for (budget, predictor), row in rows.items() if predictor == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLOURS[name])
    if timed.get("transformers") is not None:
        axes.axhline(
            timed["transformers"][field], color="tab:purple", linestyle="--", label="transformers, all in memory"
        )
    axes.set(title=title, xlabel="expert memory, % of all experts", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
