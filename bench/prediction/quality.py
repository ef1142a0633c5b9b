"""What the predictors are worth on the bundled model: variants, prefetch quality, predicted routing, cost.

    python -m bench.prediction.quality                      # all; writes docs/predictor_figures.md and .png
    python -m bench.prediction.quality --only prefetch      # one part, printed

Every figure is about the held-out sentences, which neither the model nor a predictor was trained on. The variants are
trained here, from the same traces, for the same number of passes.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersEncoderModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from bench.prediction.context_net import ContextPredictor
from examples.corpus import MAX_TOKENS, load_sentences
from examples.grouped_experts import grouped_experts
from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.prefetch import CANDIDATES, WASTE_COST, PrefetchPolicy
from sida_ext.prediction.protocol import HashTable, Predictor, TokenTablePredictor, load_predictor
from sida_ext.prediction.shadow_net import shadow_options
from sida_ext.training.distill import tokenized_batches
from sida_ext.training.evaluation import cost_share, evaluate
from sida_ext.training.objective import TrainingOptions
from sida_ext.training.traces import Trace, collect_traces, join_traces
from sida_ext.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]

# name -> (variant, sizes of the network, other training options)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "paper, lr 5e-5": ("paper", {}, {"learning_rate": 5e-5}),
    "paper, lr 1e-3": ("paper", {}, {}),
    "context (2 blocks of 192)": ("context", {"hidden": 192}, {}),
    "shadow at half width (64)": ("shadow", {"hidden": 64}, {}),
    "shadow": ("shadow", {}, {}),
    "shadow, T = 5": ("shadow", {}, {"truncation": 5}),
    "shadow, lambda = 0.1": ("shadow", {}, {"top1_weight": 0.1}),
}


PARTS = ["variants", "prefetch", "routing", "text", "cost"]


class Oracle:
    """The model's own router, asked in advance: the upper bound of every predictor."""

    def __init__(self, model: Any) -> None:
        self.stack = stack_facts(model).stack

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None, top_k: int = 1) -> HashTable:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.stack(input_ids=input_ids, attention_mask=mask, output_router_logits=True).router_logits
        gate, index = torch.stack(logits, dim=2).softmax(-1).topk(top_k)
        padding = (mask == 0)[:, :, None, None]
        certain = torch.zeros_like(gate)
        certain[..., 0] = 1
        return HashTable(index.masked_fill(padding, -1), gate.masked_fill(padding, 0), certain.masked_fill(padding, 0))


class Memory:
    """A part of the split that is one trace in memory, for Trainer."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __call__(self) -> Iterator[Trace]:
        yield self.trace

    def __len__(self) -> int:
        return 1

    def shard(self, number: int) -> Trace:
        return self.trace


def traced(model: Any, tokenizer: Any, split: str, sentences: int | None = None, source: str | None = None) -> Trace:
    """The router's choices on one split, or on `sentences` of it that are chosen by chance, always the same."""
    texts = [sentence.text for sentence in load_sentences(split, source)]
    if sentences is not None:
        texts = random.Random(0).sample(texts, min(sentences, len(texts)))
    with grouped_experts():
        return join_traces(list(collect_traces(model, tokenized_batches(tokenizer, texts, MAX_TOKENS))))


def table_predictor(model: Any, trace: Trace) -> TokenTablePredictor:
    table = TokenTablePredictor.for_model(model)
    table.update(trace.input_ids, trace.top1, trace.gate)
    return table


def compare_variants(model: Any, traces: dict[str, Trace], epochs: int, names: list[str]) -> list[str]:
    """Trains each variant from the same traces and scores it on the held-out sentences."""
    lines = [
        f"Each variant trained for {epochs} passes over {traces['train'].input_ids.numel():,} tokens; shares are means "
        "over the MoE layers on "
        f"{traces['held_out'].input_ids.numel():,} held-out tokens.",
        "",
        "| predictor | parameters | top-1 | top-3 | fewer top-1 errors | fewer top-3 errors | ECE | gate error | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    table = evaluate(table_predictor(model, traces["train"]), [traces["held_out"]]).summary()

    def row(name: str, summary: dict[str, Any], parameters: int, seconds: float) -> None:
        fewer = [1 - (1 - summary[k]) / (1 - table[k]) for k in ("mean_top1", "mean_top3")]
        gate = sum(summary["gate_error"]) / len(summary["gate_error"])
        lines.append(
            f"| {name} | {parameters:,} | {summary['mean_top1']:.4f} | {summary['mean_top3']:.4f} | {fewer[0]:.1%} | "
            f"{fewer[1]:.1%} | {summary['mean_ece']:.4f} | {gate:.4f} | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)

    row("token table", table, 0, 0)
    for name in names:
        variant, net, given = VARIANTS[name]
        options = TrainingOptions(variant=variant, net=net, epochs=epochs, max_length=MAX_TOKENS, **given)
        with tempfile.TemporaryDirectory() as folder:
            made = ContextPredictor.for_model(model, variant, options.seed, **net)
            trainer = Trainer(made, Memory(traces["train"]), Memory(traces["validation"]), options, Path(folder) / "c")
            trainer.run(progress=False)
            predictor = trainer.finish()
        row(name, evaluate(predictor, [traces["held_out"]]).summary(), predictor.parameter_count(), trainer.seconds)
    return lines


@torch.no_grad()
def prefetch_quality(
    model: Any, predictors: dict[str, Predictor], trace: Trace, sizes: tuple[int, ...], sentences: int
) -> tuple[list[str], dict[str, Any]]:
    """Coverage and waste of a batch's expert sets, over the probability of need from which an expert is fetched.

    coverage: share of the experts that the batch's positions choose, padding among them, that were fetched; waste:
    share of the fetched experts that no position chooses.
    """
    thresholds = [0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02]
    policies = [PrefetchPolicy(waste_cost=t / (1 - t)) for t in thresholds]
    stack = stack_facts(model).stack
    curves: dict[str, Any] = {}
    lines = [
        "An expert is fetched if its probability of need is at least p = w / (1 + w), where w is the cost of a wasted "
        f"read as a share of a miss's (`stream(waste_cost=w)`; default {WASTE_COST:g}: p >= "
        f"{PrefetchPolicy().least_need:g}). Padding is counted: the router routes it.",
        "",
        "| batch | predictor | first choices | " + " | ".join(f"p >= {t}" for t in thresholds) + " |",
    ]
    lines += ["|---|---|---|" + "---|" * len(thresholds)]
    for size in sizes:
        order = torch.randperm(trace.rows, generator=torch.Generator().manual_seed(size))[:sentences]
        batches = [trace.select(rows).padded() for rows in order.split(size)]
        routed = []
        with grouped_experts():
            for input_ids, mask in batches:
                logits = stack(input_ids=input_ids, attention_mask=mask.long(), output_router_logits=True).router_logits
                routed.append([set(layer.argmax(-1).unique().tolist()) for layer in logits])
        needed = sum(len(wanted) for layers in routed for wanted in layers)
        for name, predictor in predictors.items():
            counts = torch.zeros(1 + len(thresholds), 2)
            for (input_ids, mask), layers in zip(batches, routed, strict=True):
                table = predictor.predict(input_ids, mask.long(), top_k=CANDIDATES)
                for layer, wanted in enumerate(layers):
                    chosen = [set(table.top(1).experts_of(layer))]
                    chosen += [set(policy.experts(table, layer)) for policy in policies]
                    counts += torch.tensor([[len(fetched & wanted), len(fetched)] for fetched in chosen])
            coverage = counts[:, 0] / needed
            waste = 1 - counts[:, 0] / counts[:, 1].clamp(min=1)
            curves[f"{size} {name}"] = (coverage[1:].tolist(), waste[1:].tolist())
            cells = " | ".join(f"{c:.1%} / {w:.1%}" for c, w in zip(coverage, waste, strict=True))
            lines.append(f"| {size} | {name} | {cells} |")
            print(lines[-1], flush=True)
    return lines, curves


def predicted_routing(
    model: Any, tokenizer: Any, predictors: dict[str, Predictor], thresholds: list[float], number: int
) -> list[str]:
    """Accuracy of the classifier when the table replaces the router where its probability passes a threshold."""
    sentences = load_sentences("held_out", "movie")[:number]
    label = torch.tensor([s.label for s in sentences])
    texts = [s.text for s in sentences]

    def classify(choose: Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor] | None], tables: list[Any]) -> Tensor:
        """Logits [sentences, classes] with every router's decision passed through `choose`."""
        rows = []
        routers = list(stack_facts(model).routers)
        original = SwitchTransformersTop1Router.forward
        current: dict[str, Any] = {}

        def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mask, gate, logits = original(self, hidden)
            table = current["table"]
            if table is None:
                return mask, gate, logits
            layer = routers.index(self)
            sure, index, factor = choose(layer, table)
            expert = torch.where(sure, index, logits.argmax(-1))
            one_hot = torch.nn.functional.one_hot(expert, logits.shape[-1])
            one_hot = one_hot * (one_hot.cumsum(-2) <= self.expert_capacity)
            return one_hot, torch.where(sure, factor, gate[..., 0])[..., None], logits

        SwitchTransformersTop1Router.forward = forward
        try:
            with grouped_experts(), torch.no_grad():
                for n, start in enumerate(range(0, len(texts), 64)):
                    batch = tokenizer(
                        texts[start : start + 64], padding=True, truncation=True, max_length=MAX_TOKENS,
                        return_tensors="pt",
                    )  # fmt: skip
                    current["table"] = tables[n] if tables else None
                    rows.append(
                        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
                    )
        finally:
            SwitchTransformersTop1Router.forward = original
        return torch.cat(rows)

    reference = classify(lambda *_: None, [])
    base = float((reference == label).float().mean())
    lines = [
        f"The router's own accuracy on {len(texts)} held-out movie sentences: {base:.4f}.",
        "",
        "| predictor | p >= | tokens routed by the table | accuracy | fidelity (score kept) | same class |",
        "|---|---|---|---|---|---|",
    ]
    for name, predictor in predictors.items():
        tables = []
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            tables.append(predictor.predict(batch["input_ids"], batch["attention_mask"]))
        total = sum(int((t.expert_index >= 0).sum()) for t in tables)
        for threshold in thresholds:

            def choose(layer: int, table: HashTable, threshold: float = threshold) -> tuple[Tensor, Tensor, Tensor]:
                probability = table.chance
                sure = (probability[:, :, layer, 0] >= threshold) & (table.expert_index[:, :, layer, 0] >= 0)
                return sure, table.expert_index[:, :, layer, 0].long().clamp(min=0), table.gate[:, :, layer, 0]

            sure = sum(int(((t.probability >= threshold) & (t.expert_index >= 0)).sum()) for t in tables)
            found = classify(choose, tables)
            accuracy = float((found == label).float().mean())
            same = float((found == reference).float().mean())
            lines.append(
                f"| {name} | {threshold} | {sure / total:.1%} | {accuracy:.4f} | {accuracy / base:.2%} | {same:.2%} |"
            )
            print(lines[-1], flush=True)
    return lines


def other_text(model: Any, tokenizer: Any, predictors: dict[str, Predictor], held_out: Trace) -> list[str]:
    """Hits on text that is further and further from what model and predictors were trained on, by layer."""

    def trace_of(texts: list[str]) -> Trace:
        with grouped_experts():
            return join_traces(list(collect_traces(model, tokenized_batches(tokenizer, texts, MAX_TOKENS))))

    rng = random.Random(0)
    sentences = rng.sample([s.text for s in load_sentences("held_out")], 400)
    prose = [
        line.strip()
        for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
        for line in path.read_text().splitlines()
        if len(line.split()) > 8 and line[0].isalpha()
    ]
    kinds = {
        "held-out sentences": held_out,
        "the same, words shuffled": trace_of(
            [" ".join(rng.sample(text.split(), len(text.split()))) for text in sentences]
        ),
        "this project's own documentation": trace_of(prose),
    }
    lines = ["| text | tokens | predictor | top-1 / top-3, mean | top-3 by layer | ECE |", "|---|---|---|---|---|---|"]
    for kind, trace in kinds.items():
        errors = []
        for name, predictor in predictors.items():
            found = evaluate(predictor, [trace]).summary()
            errors.append((1 - found["mean_top1"], 1 - found["mean_top3"]))
            by_layer = ", ".join(f"{share:.2%}" for share in found["top3"])
            lines.append(
                f"| {kind} | {trace.input_ids.numel():,} | {name} | {found['mean_top1']:.2%} / "
                f"{found['mean_top3']:.2%} | {by_layer} | {found['mean_ece']:.4f} |"
            )
        fewer = [1 - ours / table for table, ours in zip(*errors, strict=True)]
        lines.append(f"| | | fewer errors | {fewer[0]:.1%} / {fewer[1]:.1%} | | |")
    return [*lines, "", "The oracle with full context, the router itself, is 100 % everywhere by definition."]


def cost(model: Any, predictor: Predictor) -> list[str]:
    """Time of a prediction as a share of the model's, for the bundled model and at base-128 shapes."""
    lines = ["| model | batch | predictor, ms | encoder (transformers, fp32), ms | share |", "|---|---|---|---|---|"]

    def add(name: str, found: dict[str, dict[str, float]], times: int = 1) -> None:
        for shape, value in found.items():
            whole = value["model_ms"] * times
            lines.append(
                f"| {name} | {shape.replace('x', ' x ')} | {value['predictor_ms']:.2f} | {whole:.1f} | "
                f"{value['predictor_ms'] / whole:.2%} |"
            )
            print(lines[-1], flush=True)

    add("bundled", cost_share(predictor, model))
    # Two of base-128's twelve blocks, one dense and one with 128 experts (2.4 GB); its time is six times theirs.
    pair = SwitchTransformersConfig(
        d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=2, num_sparse_encoder_layers=1, num_experts=128,
        num_decoder_layers=2, num_sparse_decoder_layers=1, is_encoder_decoder=False,
    )  # fmt: skip
    blocks = SwitchTransformersEncoderModel(pair).eval()
    # The sizes that `for_model` would choose for the whole encoder.
    sizes = shadow_options(blocks.encoder, (1,), pattern="dm" * 6)
    for name, variant, net in (
        (f"base-128, shadow of width {sizes['hidden']}", "shadow", sizes),
        ("base-128, paper", "paper", {}),
    ):
        big = ContextPredictor(blocks.shared.weight.detach(), 6, 128, "none", variant, **net).eval()
        add(f"{name} ({big.parameter_count() / 1e6:.1f} M parameters)", cost_share(big, blocks), times=6)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "demo_model")
    parser.add_argument("--predictor", type=Path, default=ROOT / "examples" / "demo_predictor")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help="names of the variants to train")
    parser.add_argument("--epochs", type=int, default=3, help="passes of each variant's training")
    parser.add_argument("--sentences", type=int, default=480, help="held-out sentences for the prefetch curves")
    parser.add_argument("--classified", type=int, default=1563, help="held-out movie sentences for predicted routing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = SwitchTransformersForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    parts = arguments.only or PARTS
    started = time.perf_counter()
    sections: dict[str, list[str]] = {}
    curves: dict[str, Any] = {}
    splits = ("train", "validation", "held_out") if "variants" in parts else ("held_out",)
    traces = {split: traced(model, tokenizer, split) for split in splits} if parts != ["cost"] else {}
    if "variants" in parts:
        sections["Variants"] = compare_variants(model, traces, arguments.epochs, arguments.variants)
    if set(parts) - {"variants"}:
        trained = load_predictor(arguments.predictor, model)
        table = load_predictor(arguments.predictor / "token_table", model)
    if "prefetch" in parts:
        predictors = {"token table": table, "hash predictor": trained, "oracle": Oracle(model)}
        sections["Prefetch: coverage / waste"], curves = prefetch_quality(
            model, predictors, traces["held_out"], (1, 4, 16), arguments.sentences
        )
    if "routing" in parts:
        sections["Predicted and confident routing"] = predicted_routing(
            model,
            tokenizer,
            {"token table": table, "hash predictor": trained},
            [0.0, 0.5, 0.7, 0.9, 0.97],
            arguments.classified,
        )
    if "text" in parts:
        sections["The bundled model on other text"] = other_text(
            model, tokenizer, {"token table": table, "hash predictor": trained}, traces["held_out"]
        )
    if "cost" in parts:
        sections["Cost"] = cost(model, trained)
    write(arguments.out, sections, curves, time.perf_counter() - started)


def write(out: Path, sections: dict[str, list[str]], curves: dict[str, Any], seconds: float) -> None:
    """Replace the measured sections in the record of predictor figures, and render the Markdown and the picture."""
    out.mkdir(exist_ok=True)
    record = ROOT / "bench" / "results" / "predictor_figures.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    known |= sections
    record.write_text(json.dumps(known, indent=1) + "\n")
    written = "Written by `bench/predictor_*.py`; see predictor.md for the commands."
    text = ["# Figures of the predictors", "", written, ""]
    for title, lines in known.items():
        text += [f"## {title}", "", *lines, ""]
    (out / "predictor_figures.md").write_text("\n".join(text))
    if curves:
        draw(out / "predictor_prefetch.png", curves)
    print(f"{', '.join(sections)} in {seconds:.0f} s, written to {out / 'predictor_figures.md'}")


def draw(path: Path, curves: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = sorted({int(name.split()[0]) for name in curves})
    figure = Figure(figsize=(4 * len(sizes), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for size, axes in zip(sizes, figure.subplots(1, len(sizes), sharey=True), strict=True):
        for name, (coverage, waste) in curves.items():
            number, label = name.split(" ", 1)
            if int(number) == size:
                axes.plot(waste, coverage, marker="o", markersize=3, label=label)
        axes.set(title=f"batch {size}", xlabel="waste: fetched, not needed", ylabel="coverage of needed experts")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
