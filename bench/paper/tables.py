"""The page of `make paper` as Markdown: every table from measured figures, beside the published numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

PREDICTORS = ("none", "token table", "hash predictor", "oracle")
DIFFERS = {
    "bundled": [
        "",
        "An expert of this classifier is a hundred kilobytes that are read in tens of microseconds, and its predictor "
        "repeats most of what the model does outside its experts: prediction can take more time here than it saves.",
    ]
}
PUBLISHED_HITS = [
    "| published, base-8: SST2, MRPC, MultiRC | | top-3: 99.00 %, 97.41 %, 91.74 % |",
    "| published, base-128: SST2, MRPC, MultiRC | | top-3: 98.78 %, 98.65 %, 90.49 % |",
]


def medians(timed: dict[str, Any]) -> dict[tuple[int, str], dict[str, float]]:
    """(budget, predictor) -> the median of each figure over the rounds."""
    found = {}
    for key, runs in timed["rows"].items():
        budget, name = key.split(" ", 1)
        found[int(budget), name] = {field: statistics.median(run[field] for run in runs) for field in runs[0]}
    return found


def base_experts(found: dict[str, Any]) -> list[int]:
    return sorted(int(name.removeprefix("base-")) for name in found if name.startswith("base-"))


def hit_rates(found: dict[str, Any]) -> list[str]:
    lines = ["| model | token table, top-1 / top-3 | hash predictor, top-1 / top-3 |", "|---|---|---|"]

    def row(name: str, table: dict[str, float], ours: dict[str, float]) -> None:
        cells = [f"{f['mean_top1']:.2%} / {f['mean_top3']:.2%}" for f in (table, ours)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")

    for name, rates in found["models"].items():
        row(name, rates["token_table"], rates["predictor"])
    if "masked" in found.get("language", {}):
        masked = found["language"]["masked"]
        name = f"masked language model, {masked['experts']} experts, {masked['layers']} MoE layers"
        row(name, masked["hits"]["token table"], masked["hits"]["trained"])
    for experts in base_experts(found):
        part = found[f"base-{experts}"]
        row(f"base-{experts} shapes, random weights", part["token table"], part["hash predictor"])
    shapes = [found[f"base-{experts}"] for experts in base_experts(found)]
    words = [f"{part['train_tokens']:,} tokens" for part in shapes] or ["no tokens"]
    return [
        *lines,
        *PUBLISHED_HITS,
        "",
        "What differs: the first rows are of models of at most 10 million parameters, trained here from scratch on the "
        "sentences' own kind of text; a small model with few layers is easier to predict. The base shapes have the "
        "published sizes and random weights: nothing in them was trained to route by token, every block mixes what it "
        f"reads at random, and their predictors saw {words[0]} each. A trained Switch model lies between the two. All "
        "shares are means over the MoE layers of the encoder, on sentences that neither model nor predictor saw.",
    ]


def by_layer(found: dict[str, Any]) -> list[str]:
    layers = max(len(found[f"base-{experts}"]["token table"]["top3"]) for experts in base_experts(found))
    lines = [
        "| model | predictor | " + " | ".join(f"layer {n}" for n in range(layers)) + " |",
        "|---|---|" + "---|" * layers,
    ]
    for experts in base_experts(found):
        for name in ("token table", "hash predictor"):
            rates = found[f"base-{experts}"][name]["top3"]
            lines.append(f"| base-{experts} shapes | {name} | " + " | ".join(f"{rate:.1%}" for rate in rates) + " |")
    return [
        *lines,
        "",
        "Top-3. What differs: the published figures are means over the layers, and their models are trained. With "
        "random weights a token's routing hangs on its neighbours from the first block on.",
    ]


def fidelity(found: dict[str, Any]) -> list[str]:
    rows, sentences = found["fidelity"]["rows"], found["fidelity"]["sentences"]
    base = rows["router"]["accuracy"]
    lines = ["| routing | accuracy | score kept | same class |", "|---|---|---|---|"]
    for name, row in rows.items():
        kept = f"{row['accuracy'] / base:.2%}" if base else "none to keep"
        lines.append(f"| {name} | {row['accuracy']:.4f} | {kept} | {row['same']:.2%} |")
    lost = 1 - rows["no experts"]["accuracy"] / base if base else 0.0
    return [
        *lines,
        "| published, predicted, base-8: SST2, MRPC, MultiRC | | 98.25 %, 97.49 %, 98.95 % | |",
        "| published, predicted, base-128: SST2, MRPC, MultiRC | | 93.02 %, 92.59 %, 92.56 % | |",
        "",
        f"What differs: {sentences} held-out movie-review sentences and a classifier trained here. A score can rise "
        "when a few sentences change class, so the share that keeps its class is given too. The last rows are "
        f"controls: with no experts at all this classifier still keeps {1 - lost:.1%} of its score, so its score is "
        "no hard test. The default, the model's own router, loses nothing and "
        "is what the paper does not have.",
    ]


def language(found: dict[str, Any]) -> list[str]:
    parts = {"masked language model": found["language"].get("masked", {}).get("rows", {})}
    parts["denoiser"] = found["language"]["denoiser"]
    lines = [
        "| model | routing | perplexity | ratio | choices by the table | transfers on demand saved |",
        "|---|---|---|---|---|---|",
    ]
    for model, rows in parts.items():
        for name, row in rows.items():
            saved = f"{row['transfers_saved']:.1%}" if "transfers_saved" in row else ""
            lines.append(
                f"| {model} | {name} | {row['perplexity']:.3f} | {row['ratio']:.3f} | {row['by_table']:.1%} | {saved} |"
            )
    return [
        *lines,
        "| published | C4, base-128: router, predicted | 4.86, 11.73 | 2.41 | 100 % | |",
        "",
        "What differs: models trained here on the bundled sentences. The masked language model "
        "(bench/paper/masked_language.py) guesses 15 % of the tokens and has no feed-forward layer "
        "but its experts; the denoiser is the bundled encoder-decoder, whose perplexity is of the next token under "
        "teacher forcing, with encoder and decoder predicted. The last rows of each are controls, experts chosen by "
        "chance and no experts at all: they say how much there is to lose. The denoiser has little to lose, so its "
        "ratio alone says little.",
    ]


def sparsity(found: dict[str, Any]) -> list[str]:
    columns = {"bundled, 32": found["sparsity"]["touched"]}
    columns |= {f"base-{experts} shapes": found[f"base-{experts}"]["touched"] for experts in base_experts(found)}
    bounds = list(dict.fromkeys(bound for touched in columns.values() for bound in touched))
    bounds.sort(key=lambda bound: int(bound.split("-")[0]))
    lines = [
        "| tokens of the sentence | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for bound in bounds:
        cells = [
            f"{touched[bound][1]:.1%} ({touched[bound][0]})" if bound in touched else "" for touched in columns.values()
        ]
        lines.append(f"| {bound} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "| published: base-128 / base-256 | below 40 % / below 20 %" + " |" * len(columns),
        "",
        "Share of a layer's experts that a sentence touches, mean over layers; in brackets how many sentences. What "
        "differs: a sentence cannot touch more experts than it has tokens, so the fewer experts a layer has, the "
        "larger is the share; random weights spread the tokens more evenly over the experts than training does.",
    ]


def memory(found: dict[str, Any]) -> list[str]:
    lines = ["| model | budget of expert memory | experts in memory at once | weights in memory | saved |"]
    lines += ["|---|---|---|---|---|"]
    names = ["bundled", *(f"base-{experts}" for experts in base_experts(found))]
    for name in names:
        part = found["sparsity" if name == "bundled" else name]
        for budget, row in part["memory"].items():
            lines.append(
                f"| {name} | {budget} % | {row['slots']:.0f} of {row['experts']:.0f} | {row['used'] / 1e6:,.0f} MB of "
                f"{row['whole'] / 1e6:,.0f} MB | {1 - row['used'] / row['whole']:.1%} |"
            )
        touched = part["touched"]
        count = sum(n for n, _ in touched.values())
        share = sum(n * value for n, value in touched.values()) / count
        row = next(iter(part["memory"].values()))
        record = (row["whole"] - row["used"]) / (row["experts"] - row["slots"]) if row["experts"] > row["slots"] else 0
        rest = row["whole"] - record * row["experts"]
        used = rest + share * record * row["experts"]
        lines.append(
            f"| {name} | what a sentence touches, on average | {share * row['experts']:.0f} of {row['experts']:.0f} | "
            f"{used / 1e6:,.0f} MB of {row['whole'] / 1e6:,.0f} MB | {1 - used / row['whole']:.1%} |"
        )
    return [
        *lines,
        "| published, base-128 / base-256: SST2 and MRPC | | | | above 60 % / above 80 % |",
        "| published, base-128 / base-256: MultiRC | | | | 20 % / 40 % |",
        "",
        "What differs: the budget is a hard limit that the user sets, held by the engine, copies in flight "
        "included; in the paper it follows from the experts that a batch touches, which is each model's last row. "
        "Here experts are bf16 and everything else float32; encoders alone; activations are not counted.",
    ]


def throughput(found: dict[str, Any], name: str) -> list[str]:
    timed = found[f"time {name}"]
    rows = medians(timed)
    lines = [
        "| budget | predictor | tokens/s | against none | range over rounds | latency of a sentence, median / p95 | "
        "stalled, a sentence | read, a sentence | hit rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (budget, predictor), row in rows.items():
        ratio = row["tokens_per_s"] / rows[budget, "none"]["tokens_per_s"]
        rates = [run["tokens_per_s"] for run in timed["rows"][f"{budget} {predictor}"]]
        lines.append(
            f"| {budget} % | {predictor} | {row['tokens_per_s']:,.0f} | {ratio:.2f}x | {min(rates):,.0f} to "
            f"{max(rates):,.0f} | {row['median_ms']:.1f} / {row['p95_ms']:.1f} ms | {row['stall_ms']:.1f} ms | "
            f"{row['read_mb']:,.1f} MB | {row['hit_rate']:.1%} |"
        )
    plain = timed.get("transformers")
    if plain is not None:
        lines.append(
            f"| all | transformers, float32, every expert in memory | {plain['tokens_per_s']:,.0f} | | | "
            f"{plain['median_ms']:.1f} / {plain['p95_ms']:.1f} ms | 0 | 0 | |"
        )
    return [
        *lines,
        "| published | SST2, base-128 / base-256 | | 2.60x / 3.93x | | up to 72 % lower | | | |",
        "",
        f"{timed['sentences']} sentences one by one, after {timed['warm_up']} that are not counted, from a cold "
        f"start; medians of {timed['rounds']} rounds. What differs: experts are read from a disk into RAM and "
        "computed on a CPU; the published ratios are against engines that keep every expert in GPU memory or move "
        "all of them, these are against this engine without prediction, at the same budget.",
        *DIFFERS.get(name, []),
    ]


def page(found: dict[str, Any], seconds: dict[str, float], stages: list[str], arguments: str = "") -> str:
    """All of docs/paper.md.

    Args:
        found: stage -> its figures.
        seconds: stage -> what it took.
        stages: all that there are; a table whose stage is missing is left out, and the page says so.
        arguments: of bench/paper/__main__.py.
    """
    text = [
        "# The paper's tables, on models trained here",
        "",
        f"Written by `make paper` (`python -m bench.paper{arguments}`). Published numbers: SiDA-MoE, "
        "MLSys 2024, arXiv 2310.18859, on one A100 with 80 GB, batch 1.",
        "",
        "![The figures of this page](paper.png)",
        "",
    ]

    missing = [name for name in stages if name not in found]
    if missing:
        text += [
            f"Not measured yet: {', '.join(missing)}. `python -m bench.paper` goes on with what is missing.",
            "",
        ]

    def section(title: str, needed: list[str], lines: Callable[[], list[str]]) -> None:
        if all(name in found for name in needed):
            text.extend([f"## {title}", "", *lines(), ""])

    bases = [f"base-{experts}" for experts in base_experts(found)]
    section("Hit rates by number of experts", ["models"], lambda: hit_rates(found))
    section("Hit rates by layer", bases or ["base"], lambda: by_layer(found))
    section("Fidelity of predicted routing", ["fidelity"], lambda: fidelity(found))
    section("Perplexity of predicted routing", ["language"], lambda: language(found))
    section("Sparsity of activation by sentence length", ["sparsity"], lambda: sparsity(found))
    section("Memory saved", ["sparsity"], lambda: memory(found))
    title = "Throughput and latency by memory budget"
    for base in bases:
        section(f"{title}: {base} shapes", [f"time {base}"], lambda base=base: throughput(found, base))
    section(f"{title}: the bundled classifier", ["time bundled"], lambda: throughput(found, "bundled"))
    text += [
        "## How long it took",
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.0f} |" for name, value in seconds.items()),
        f"| all | {sum(seconds.values()):.0f} |",
    ]
    return "\n".join(text).rstrip() + "\n"
