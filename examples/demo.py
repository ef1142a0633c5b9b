"""The main job on the bundled models: serve held-out sentences, score text and write it, with a quarter of the experts
in memory.

    python -m examples.demo                    # a few minutes on 2 cores

Prints two tables and writes a timeline picture; every figure is measured by this run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sida_ext
from examples import demo_language
from examples.corpus import DEMO_MODEL, MAX_TOKENS, load_sentences
from sida_ext.experts.budget import format_bytes
from sida_ext.experts.timeline import Event, draw, write_chrome_trace
from sida_ext.prediction.protocol import load_predictor

HERE = Path(__file__).resolve().parent
PREDICTOR = HERE / "demo_predictor"
# Seconds of each run that the picture shows.
PICTURE_SECONDS = 0.25


@dataclass
class Run:
    """What one way of serving gave and took."""

    name: str
    logits: torch.Tensor  # [sentences, labels]
    seconds: float
    expert_memory: int  # bytes
    stats: sida_ext.Stats | None
    events: list[Event]


def batches(tokenizer: Any, texts: list[str], size: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(texts), size):
        batch = tokenizer(
            texts[start : start + size], return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS
        )
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def collect(name: str, outputs: Iterable[Any], count: int) -> tuple[torch.Tensor, float]:
    begin = time.perf_counter()
    logits = [output.logits for output in track(outputs, description=f"{name:<28}", total=count)]
    return torch.cat(logits), time.perf_counter() - begin


def plain(texts: list[str], tokenizer: Any, size: int) -> Run:
    """transformers alone: every expert in memory, fp32."""
    model_class = sida_ext.SwitchTransformersForSequenceClassification
    model = model_class.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    given = list(batches(tokenizer, texts, size))
    with torch.no_grad():
        model(**given[0])
        logits, seconds = collect("transformers", (model(**batch) for batch in given), len(given))
    memory = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n)
    return Run("transformers, all experts", logits, seconds, memory, None, [])


def ours(
    name: str, texts: list[str], tokenizer: Any, size: int, budget: str, predictor: Path | None, routing: str = "router"
) -> Run:
    """The same sentences with ``budget`` of the experts in memory, from a cold start."""
    model = sida_ext.from_pretrained(DEMO_MODEL, expert_memory=budget, routing=routing, dtype=torch.float32)
    chosen = load_predictor(predictor, model) if predictor is not None else None
    given = list(batches(tokenizer, texts, size))
    model.sida.start_trace()
    logits, seconds = collect(name, sida_ext.stream(model, given, chosen), len(given))
    events = model.sida.take_trace()
    run = Run(name, logits, seconds, model.sida.expert_memory, model.sida.stats(), events)
    model.sida.close()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, help="held-out sentences to serve; default: all")
    parser.add_argument("--passages", type=int, default=48, help="held-out passages for the language model")
    parser.add_argument("--batch", type=int, default=1, help="sentences in a batch")
    parser.add_argument("--budget", default="25%", help="expert memory")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture and the trace")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    sentences = load_sentences("held_out", "movie")[: arguments.sentences]
    texts, labels = [s.text for s in sentences], torch.tensor([s.label for s in sentences])
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches(tokenizer, texts, arguments.batch))
    print(
        f"{len(texts)} held-out sentences, {tokens} tokens, batches of {arguments.batch}; expert memory: "
        f"{arguments.budget}"
    )

    common = (texts, tokenizer, arguments.batch)
    runs = [
        plain(*common),
        ours("no predictor", *common, arguments.budget, None),
        ours("token table", *common, arguments.budget, PREDICTOR / "token_table"),
        ours("hash predictor", *common, arguments.budget, PREDICTOR),
        ours("predicted routing", *common, arguments.budget, PREDICTOR, "predicted"),
    ]
    show(runs, labels, tokens)

    arguments.out.mkdir(parents=True, exist_ok=True)
    shown = [(run.name, run.events) for run in runs if run.name in ("no predictor", "hash predictor")]
    draw(shown, arguments.out / "timeline.png", seconds=PICTURE_SECONDS)
    write_chrome_trace(shown[-1][1], arguments.out / "trace.json")
    print(f"timeline of the first {PICTURE_SECONDS * 1e3:.0f} ms: {arguments.out / 'timeline.png'}")
    print(f"trace of the hash predictor's run: {arguments.out / 'trace.json'} (open it in ui.perfetto.dev)")
    demo_language.demo(arguments.passages, arguments.budget)


def show(runs: list[Run], labels: torch.Tensor, tokens: int) -> None:
    reference = runs[0]
    table = Table(title="Serving the bundled classifier")
    for column in ("", "accuracy", "largest difference", "tokens/s", "expert memory", "hit rate", "stalled", "read"):
        table.add_column(column, justify="left" if not column else "right")
    for run in runs:
        stats = run.stats
        table.add_row(
            run.name,
            f"{(run.logits.argmax(-1) == labels).float().mean().item():.2%}",
            f"{(run.logits - reference.logits).abs().max().item():.1e}",
            f"{tokens / run.seconds:.0f}",
            format_bytes(run.expert_memory),
            f"{stats.hit_rate:.1%}" if stats else "-",
            f"{stats.stall_seconds:.2f} s" if stats else "-",
            format_bytes(stats.bytes_read) if stats else "-",
        )
    Console(width=120).print(table)
    majority = labels.float().mean().item()
    print(
        f"majority class: {max(majority, 1 - majority):.2%}; 'largest difference' is between logits, to transformers'"
    )
    same = all(torch.equal(run.logits, runs[1].logits) for run in runs[2:4])
    print(f"bits of the three runs with the router in charge are equal: {same}")
    if not same:
        raise SystemExit("the predictor changed the output, which it must never do")


if __name__ == "__main__":
    main()
