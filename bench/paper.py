"""The tables of the SiDA-MoE paper, ours: the published numbers beside those of models trained here.

    python bench/paper.py            # docs/paper.md and docs/paper.png; some minutes on 2 idle cores
    python bench/paper.py --quick    # fewer sentences, one round: less than a minute on 2 idle cores

The published numbers are those of arXiv 2310.18859 (one A100 with 80 GB, batch 1, Switch-base). The models here are
small, and the experts are on a disk and computed on a CPU, so that what can be compared is the shape of a curve and
not its height; a sentence under each table says what differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from corpus import MAX_TOKENS, Sentence, load_sentences  # noqa: E402

import sida_ext  # noqa: E402
from bench.predictor_models import RESULTS as MODELS  # noqa: E402
from bench.predictor_stall import oracle  # noqa: E402
from sida_ext.distill import tokenized_batches  # noqa: E402
from sida_ext.predictor import load_predictor  # noqa: E402
from sida_ext.traces import collect_traces, join_traces  # noqa: E402

PREDICTORS = ("none", "token table", "hash predictor", "oracle")


@dataclass(frozen=True)
class Scale:
    """How much is run: held-out sentences for fidelity, for sparsity, and for each row of the timings; budgets."""

    fidelity: int
    sparsity: int
    timed: int
    budgets: tuple[int, ...]
    rounds: int


FULL = Scale(1563, 1563, 200, (10, 25, 50, 75, 100), 3)
QUICK = Scale(600, 1563, 80, (10, 25, 50, 100), 1)
SMOKE = Scale(8, 8, 4, (50,), 1)


class Bundled:
    """The bundled model, its tokenizer and its predictors."""

    def __init__(self) -> None:
        self.path = ROOT / "examples" / "demo_model"
        self.whole = sida_ext.SwitchTransformersForSequenceClassification.from_pretrained(
            self.path, dtype=torch.float32
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
        folder = ROOT / "examples" / "demo_predictor"
        self.report = json.loads((folder / "report.json").read_text())
        self.hash, self.table = load_predictor(folder, self.whole), load_predictor(folder / "token_table", self.whole)
        self.sentences = load_sentences("held_out", "movie")

    def batches(self, sentences: list[Sentence], size: int) -> list[dict[str, Any]]:
        found = []
        for start in range(0, len(sentences), size):
            texts = [s.text for s in sentences[start : start + size]]
            batch = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            found.append({name: batch[name] for name in ("input_ids", "attention_mask")})
        return found

    def served(self, budget: str, **arguments: Any) -> Any:
        return sida_ext.from_pretrained(self.path, expert_memory=budget, dtype=torch.float32, **arguments)


def hit_rates(bundled: Bundled) -> tuple[list[str], dict[str, Any]]:
    """Top-3 by number of experts: the bundled model, and the models of bench/predictor_models.py where it has run."""
    rows = [("bundled, 32 experts, 4 MoE layers", 32, bundled.report["held_out"])]
    if MODELS.is_file():
        for name, found in json.loads(MODELS.read_text()).items():
            held_out = {"predictor": found["predictor on own"], "token_table": found["token_table on own"]}
            rows.append((f"{name}, {found['layers']} MoE layers", int(name.split()[0]), held_out))
    rows.sort(key=lambda row: row[1])
    lines = ["| model | token table, top-1 / top-3 | hash predictor, top-1 / top-3 |", "|---|---|---|"]
    for name, _, found in rows:
        cells = [f"{found[k]['mean_top1']:.2%} / {found[k]['mean_top3']:.2%}" for k in ("token_table", "predictor")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += [
        "| published, base-8: SST2, MRPC, MultiRC | | top-3: 99.00 %, 97.41 %, 91.74 % |",
        "| published, base-128: SST2, MRPC, MultiRC | | top-3: 98.78 %, 98.65 %, 90.49 % |",
        "",
        "What differs: these models have 10 million parameters at most and were trained from scratch on the sentences' "
        "own kind of text; the shares are means over all MoE layers of the encoder, on sentences that neither the "
        "model nor the predictor saw. A small model with few layers is easier to predict.",
    ]
    return lines, {str(n): [found[k]["mean_top3"] for k in ("token_table", "predictor")] for _, n, found in rows}


def fidelity(bundled: Bundled, scale: Scale) -> list[str]:
    sentences = bundled.sentences[: scale.fidelity]
    label = torch.tensor([s.label for s in sentences])
    batches = bundled.batches(sentences, 16)

    def classes(predictor: Any, **arguments: Any) -> torch.Tensor:
        model = bundled.served("100%", **arguments)
        found = torch.cat([out.logits.argmax(-1) for out in sida_ext.stream(model, batches, predictor, drift=False)])
        model.sida.close()
        return found

    reference = classes(None)
    base = (reference == label).float().mean().item()
    lines = ["| routing | predictor | accuracy | score kept | same class |", "|---|---|---|---|---|"]
    lines.append(f"| router | any | {base:.4f} | 100 % | 100 % |")
    for routing, name, predictor in (
        ("predicted", "token table", bundled.table),
        ("predicted", "hash predictor", bundled.hash),
        ("confident, from 0.9", "hash predictor", bundled.hash),
    ):
        found = classes(predictor, routing=routing.split(",")[0], confidence=0.9)
        score, same = (found == label).float().mean().item(), (found == reference).float().mean().item()
        kept = f"{score / base:.2%}" if base else "none to keep"
        lines.append(f"| {routing} | {name} | {score:.4f} | {kept} | {same:.2%} |")
    lines += [
        "| published, predicted | base-8: SST2, MRPC, MultiRC | | 98.25 %, 97.49 %, 98.95 % | |",
        "| published, predicted | base-128: SST2, MRPC, MultiRC | | 93.02 %, 92.59 %, 92.56 % | |",
        "",
        f"What differs: {len(sentences)} held-out movie-review sentences and a classifier trained here. A score can "
        "rise when a few sentences change class, so the share that keeps its class is given too. The default, the "
        "model's own router, loses nothing and is what the paper does not have.",
    ]
    return lines


def sparsity(bundled: Bundled, scale: Scale) -> tuple[list[str], dict[str, float]]:
    texts = [s.text for s in bundled.sentences[: scale.sparsity]]
    trace = join_traces(list(collect_traces(bundled.whole, tokenized_batches(bundled.tokenizer, texts, MAX_TOKENS))))
    experts = bundled.whole.config.num_experts
    bounds = [(1, 8), (9, 16), (17, 24), (25, 32), (33, 48), (49, 64)]
    shares: dict[tuple[int, int], list[float]] = {bound: [] for bound in bounds}
    first = 0
    for length in trace.length.tolist():
        chosen = trace.top1[first : first + length]
        first += length
        share = statistics.fmean(len(chosen[:, layer].unique()) / experts for layer in range(chosen.shape[1]))
        for low, high in bounds:
            if low <= length <= high:
                shares[low, high].append(share)
    lines = [
        "| tokens of the sentence | sentences | share of the experts it touches, mean over layers |",
        "|---|---|---|",
    ]
    means = {f"{low}-{high}": statistics.fmean(v) for (low, high), v in shares.items() if v}
    for (low, high), values in shares.items():
        if values:
            lines.append(f"| {low}-{high} | {len(values)} | {statistics.fmean(values):.1%} |")
    lines += [
        "| published: base-128, base-256 | | below 40 %, below 20 % |",
        "",
        f"What differs: {experts} experts in a layer instead of 128 or 256. A sentence cannot touch more experts than "
        "it has tokens, so with fewer experts in a layer the same sentence touches a larger share of them.",
    ]
    return lines, means


def timings(bundled: Bundled, scale: Scale) -> tuple[list[str], list[str], dict[str, Any]]:
    """Throughput and latency by budget and predictor, batch 1; the rounds of all rows are interleaved."""
    batches = bundled.batches(bundled.sentences[: scale.timed], 1)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    predictors = {
        "none": None,
        "token table": bundled.table,
        "hash predictor": bundled.hash,
        "oracle": oracle(bundled.whole, batches),
    }
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    saved: list[str] = []
    for _ in range(scale.rounds):
        for budget in scale.budgets:
            for name in PREDICTORS:
                model = bundled.served(f"{budget}%")
                begin = last = time.perf_counter()
                times = []
                for _ in sida_ext.stream(model, batches, predictors[name], drift=False):
                    now = time.perf_counter()
                    times.append(now - last)
                    last = now
                stats = model.sida.stats()
                runs = found.setdefault((budget, name), [])
                runs.append(
                    {
                        "tokens_per_s": tokens / (last - begin),
                        "median_ms": 1e3 * statistics.median(times),
                        "p95_ms": 1e3 * sorted(times)[int(0.95 * (len(times) - 1))],
                        "stall_ms": 1e3 * stats.stall_seconds / len(batches),
                        "hit_rate": stats.hit_rate,
                    }
                )
                if name == "none" and len(runs) == 1:
                    record, total = model.sida.header.record_bytes, model.sida.header.total_experts
                    rest = sum(p.numel() * p.element_size() for p in model.parameters())
                    whole, used = total * record + rest, stats.peak_slots * record + rest
                    saved.append(
                        f"| {budget} % | {stats.peak_slots} of {total} | {used / 1e6:.1f} MB of {whole / 1e6:.1f} MB | "
                        f"{1 - used / whole:.1%} |"
                    )
                model.sida.close()
    median = {
        key: {field: statistics.median(run[field] for run in runs) for field in runs[0]} for key, runs in found.items()
    }
    rounds = f"medians of {scale.rounds} rounds" if scale.rounds > 1 else "one round"
    lines = [
        "| budget | predictor | tokens/s | against none | latency of a sentence, median / p95 | stalled, a sentence | "
        "hit rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for (budget, name), row in median.items():
        ratio = row["tokens_per_s"] / median[budget, "none"]["tokens_per_s"]
        lines.append(
            f"| {budget} % | {name} | {row['tokens_per_s']:.0f} | {ratio:.2f}x | {row['median_ms']:.2f} / "
            f"{row['p95_ms']:.2f} ms | {row['stall_ms']:.2f} ms | {row['hit_rate']:.1%} |"
        )
    lines += [
        "| published | SST2, base-128 / base-256 | | 2.60x / 3.93x | up to 72 % lower | | |",
        "",
        f"What differs: {len(batches)} sentences, experts read from a disk into RAM and computed on a CPU, "
        f"{rounds}. The published ratios are against engines that keep every expert in GPU memory or move all of them; "
        "these are against this engine without prediction, at the same budget. An expert here is a hundred kilobytes "
        "that are read in tens of microseconds, and the prediction takes processor time from the model: "
        "where no row is above 1, not even the oracle pays. At base-128, where an expert is 9.4 MB, a prediction's "
        "cost is some 2 % of the model's (see predictor_figures.md).",
    ]
    memory = [
        "| budget of expert memory | experts in memory at once | weights in memory | saved |",
        "|---|---|---|---|",
        *saved,
        "| published, base-128 / base-256: SST2 and MRPC | | | above 60 % / above 80 % |",
        "| published, base-128 / base-256: MultiRC | | | 20 % / 40 % |",
        "",
        "What differs: the budget is a hard limit that the user sets, held by the engine, copies in flight included; "
        "in the paper it follows from the experts that a batch touches. Activations are not counted here.",
    ]
    return lines, memory, {f"{budget} {name}": row for (budget, name), row in median.items()}


def draw(path: Path, hits: dict[str, Any], touched: dict[str, float], timed: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (by_experts, by_length), (throughput, latency) = figure.subplots(2, 2)
    for offset, (n, label) in ((-0.2, (0, "token table")), (0.2, (1, "hash predictor"))):
        by_experts.bar([x + offset for x in range(len(hits))], [v[n] for v in hits.values()], 0.38, label=label)
    by_experts.set(title="Top-3 hits on held-out text", xlabel="experts in a layer", ylabel="share of tokens")
    by_experts.set_xticks(range(len(hits)), list(hits))
    by_experts.set_ylim(0.8, 1)
    by_experts.legend(fontsize=8, loc="lower left")
    by_length.bar(list(touched), list(touched.values()))
    by_length.set(title="Experts that a sentence touches", xlabel="tokens", ylabel="share of a layer's experts")
    for axes, field, label in (
        (throughput, "tokens_per_s", "tokens/s"),
        (latency, "median_ms", "median latency of a sentence, ms"),
    ):
        for name in PREDICTORS:
            points = [(int(k.split()[0]), row[field]) for k, row in timed.items() if k.split(" ", 1)[1] == name]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xlabel="expert memory, % of all experts", ylabel=label)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def sections(bundled: Bundled, scale: Scale, out: Path) -> Iterator[tuple[str, list[str]]]:
    hits_lines, hits = hit_rates(bundled)
    yield "Hit rates by number of experts", hits_lines
    yield "Fidelity of predicted routing", fidelity(bundled, scale)
    touched_lines, touched = sparsity(bundled, scale)
    yield "Sparsity of activation by sentence length", touched_lines
    timed_lines, memory, timed = timings(bundled, scale)
    yield "Memory saved", memory
    yield "Throughput and latency by memory budget", timed_lines
    draw(out / "paper.png", hits, touched, timed)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer sentences, one round")
    size.add_argument("--smoke", action="store_true", help="seconds: does it run at all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args(given)
    scale = QUICK if arguments.quick else SMOKE if arguments.smoke else FULL
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    bundled = Bundled()
    text = [
        "# The paper's tables, on models trained here",
        "",
        "Written by `make paper` (`python bench/paper.py"
        + (" --quick" if arguments.quick else " --smoke" if arguments.smoke else "")
        + "`). Published numbers: SiDA-MoE, MLSys 2024, arXiv 2310.18859, on one A100 with 80 GB, batch 1.",
        "",
        "![The figures of this page](paper.png)",
        "",
    ]
    for title, lines in sections(bundled, scale, arguments.out):
        text += [f"## {title}", "", *lines, ""]
        print("\n".join(text[-len(lines) - 3 :]), flush=True)
    (arguments.out / "paper.md").write_text("\n".join(text).rstrip() + "\n")
    print(f"{arguments.out / 'paper.md'} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
