"""The ``sida`` command: pack, train, run, plan, info."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    name="sida",
    help="Serve Switch Transformers whose experts do not fit where they are computed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)


class _Bar:
    """A progress bar that a (done, total) callback drives."""

    def __init__(self, label: str) -> None:
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(label, total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


@app.command()
def pack(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The store to write.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, float16 or int8.")] = "bfloat16",
    allow_pickle: Annotated[bool, typer.Option(help="Read pytorch_model.bin files, which are pickles.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
) -> None:
    """Write the experts of a checkpoint as aligned, checksummed records."""
    from sida_ext.budget import format_bytes
    from sida_ext.store import pack as pack_store

    hub = {"revision": revision} if revision is not None else {}
    with _Bar("packing") as bar:
        header = pack_store(checkpoint, out, dtype, allow_pickle=allow_pickle, progress=bar, **hub)
    print(
        f"{out}: {header.total_experts} experts in {len(header.layers)} MoE layers, {header.dtype}, "
        f"{format_bytes(header.record_bytes)} each, {format_bytes(header.experts_bytes)} in all"
    )


def read_texts(files: list[Path]) -> list[str]:
    """Texts of text files (one a line) and JSON lines (key ``text``); empty lines are skipped.

    Raises:
        ValueError: names file and line.
    """
    texts: list[str] = []
    for path in files:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if path.suffix != ".jsonl":
                    texts.append(line.strip())
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number}: expected a JSON object with a 'text', got {error!r}") from error
                if not isinstance(text, str):
                    raise ValueError(f"{path}:{number}: 'text' is {type(text).__name__}, expected a string")
                texts.append(text)
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, files))}")
    return texts


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    texts: Annotated[list[Path], typer.Argument(help="Text files (a document each line) or .jsonl files (key text).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the predictor.")],
    variant: Annotated[str | None, typer.Option(help="Form of the predictor; 'paper' is the published one.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text at the most.")] = 20,
    minutes: Annotated[float | None, typer.Option(help="Training time at the most.")] = None,
    truncation: Annotated[int, typer.Option(help="T: the router's most likely experts that are distilled.")] = 30,
    top1_weight: Annotated[
        float, typer.Option(help="lambda: weight of the cross-entropy with the first choice.")
    ] = 0.005,
    temperature: Annotated[float, typer.Option(help="Of the distillation term.")] = 1.0,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a document at the most.")] = 512,
    seed: Annotated[int, typer.Option(help="Of split, weights and order.")] = 0,
    expert_memory: Annotated[str, typer.Option(help="Budget while the router is traced.")] = "auto",
    fresh: Annotated[
        bool, typer.Option(help="Forget unfinished work in the folder instead of going on with it.")
    ] = False,
) -> None:
    """Train a hash predictor on a model's own routing; go on after Ctrl-C with the same command."""
    from transformers import AutoTokenizer

    from sida_ext import from_pretrained
    from sida_ext.distill import TrainingOptions, train_predictor
    from sida_ext.runtime import runtime_of

    lines = read_texts(texts)
    loaded = from_pretrained(model, expert_memory=expert_memory, say=lambda text: console.print(text))
    options: dict[str, Any] = {"variant": variant} if variant is not None else {}
    try:
        train_predictor(
            loaded,
            AutoTokenizer.from_pretrained(model),
            lines,
            out,
            TrainingOptions(
                epochs=epochs,
                seconds=None if minutes is None else minutes * 60,
                truncation=truncation,
                top1_weight=top1_weight,
                temperature=temperature,
                max_length=max_length,
                seed=seed,
                **options,
            ),
            resume=not fresh,
        )
    finally:
        runtime_of(loaded).close()
    report = json.loads((out / "report.json").read_text())
    table = Table(title="held-out hit rates")
    for column in ("", "top-1", "top-3"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("token_table", "predictor"):
        found = report["held_out"][name]
        for layer, (top1, top3) in enumerate(zip(found["top1"], found["top3"], strict=True)):
            table.add_row(f"{name}, layer {layer}", f"{top1:.1%}", f"{top3:.1%}")
        table.add_row(f"[bold]{name}, mean[/]", f"{found['mean_top1']:.1%}", f"{found['mean_top3']:.1%}")
    Console().print(table)
    print(f"predictor: {out}; report: {out / 'report.json'}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    texts: Annotated[list[Path], typer.Argument(help="Text files (a line each) or .jsonl files (key text).")],
    predictor: Annotated[str | None, typer.Option(help="Folder or entry point; default: perfect tables.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences in a batch.")] = 1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sentence at the most.")] = 512,
    lookahead: Annotated[int, typer.Option(min=1, help="Batches whose tables are known ahead.")] = 4,
    store: Annotated[Path | None, typer.Option(help="A store made by sida pack.")] = None,
) -> None:
    """What-if: hit rates of OPT, next_use, LRU, LFU and FIFO on the routing of your text, at every budget."""
    from transformers import AutoTokenizer

    from sida_ext import from_pretrained
    from sida_ext.plan import POLICIES, compare, record_routing
    from sida_ext.predictor import find_predictor
    from sida_ext.runtime import runtime_of

    lines = read_texts(texts)
    loaded = from_pretrained(model, expert_memory="auto", store=store, say=lambda text: console.print(text))
    try:
        chosen = find_predictor(predictor, loaded) if predictor is not None else None
        given = _tokenized(AutoTokenizer.from_pretrained(model), lines, batch_size, max_length)
        with _Bar("routing") as bar:

            def counted() -> Iterator[dict[str, Any]]:
                for number, batch in enumerate(given, 1):
                    yield batch
                    bar(min(number * batch_size, len(lines)), len(lines))

            routing = record_routing(loaded, counted(), chosen)
    finally:
        runtime_of(loaded).close()
    rows = compare(routing, [share / 100 for share in range(10, 100, 10)], lookahead)
    table = Table(title=f"hit rates, {'perfect tables' if predictor is None else predictor}, lookahead {lookahead}")
    for column in ("budget", "experts", "OPT", *POLICIES):
        table.add_column(column, justify="right")
    for row in rows:
        rates = [f"{row.hit_rate[name]:.1%}" for name in ("opt", *POLICIES)]
        table.add_row(f"{row.share:.0%}", str(row.slots), *rates)
    Console().print(table)


def _tokenized(tokenizer: Any, lines: list[str], batch_size: int, max_length: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(lines), batch_size):
        batch = tokenizer(
            lines[start : start + batch_size], return_tensors="pt", padding=True, truncation=True, max_length=max_length
        )
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    texts: Annotated[list[Path], typer.Argument(help="Text files (a line each) or .jsonl files (key text).")],
    expert_memory: Annotated[str, typer.Option(help="Budget: 2GiB, 25%, auto or bytes.")] = "auto",
    expert_dtype: Annotated[str, typer.Option(help="bfloat16, float32, float16 or int8.")] = "bfloat16",
    store: Annotated[Path | None, typer.Option(help="A store made by sida pack.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Folder made by sida train, or an entry point.")] = None,
    routing: Annotated[str, typer.Option(help="router, predicted or confident.")] = "router",
    confidence: Annotated[
        float, typer.Option(min=0, help="With confident: probability from which the prediction decides.")
    ] = 0.9,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences in a batch.")] = 1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sentence at the most.")] = 512,
    lookahead: Annotated[int, typer.Option(min=1, help="Batches whose experts are predicted ahead.")] = 4,
    order: Annotated[str, typer.Option(help="given or overlap.")] = "given",
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace here.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write one JSON line for each text here.")] = None,
) -> None:
    """Run texts through a model and say what it did: tokens/s, hit rate, stall time, bytes read."""
    from transformers import AutoTokenizer

    from sida_ext import from_pretrained, stream
    from sida_ext.runtime import runtime_of

    lines = read_texts(texts)
    loaded = from_pretrained(
        model,
        expert_memory=expert_memory,
        expert_dtype=expert_dtype,
        store=store,
        routing=routing,
        confidence=confidence,
        say=lambda text: console.print(text),
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    chosen = None
    if predictor is not None:
        from sida_ext.predictor import find_predictor

        chosen = find_predictor(predictor, loaded)
    if loaded.config.is_encoder_decoder and hasattr(loaded, "lm_head"):
        raise ValueError("sida run takes encoders and classifiers; for generate() use the Python interface")

    tokens = 0

    def batches() -> Iterator[dict[str, Any]]:
        nonlocal tokens
        for batch in _tokenized(tokenizer, lines, batch_size, max_length):
            tokens += int(batch["attention_mask"].sum())
            yield batch

    if trace is not None:
        runtime_of(loaded).start_trace()
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    try:
        with _Bar("running") as bar:
            for output in stream(loaded, batches(), chosen, lookahead, order):
                if "logits" in output:
                    rows += [{"label": int(row.argmax()), "logits": row.tolist()} for row in output.logits.float()]
                else:
                    states = output.last_hidden_state.float()
                    rows += [{"mean": row.mean().item(), "norm": row.norm().item()} for row in states]
                bar(len(rows), len(lines))
        seconds = time.perf_counter() - begin
        if trace is not None:
            runtime_of(loaded).write_trace(trace)
            console.print(f"trace: {trace} (open it in ui.perfetto.dev or chrome://tracing)")
        if out is not None:
            partial = out.with_name(out.name + ".partial")
            with open(partial, "w", encoding="utf-8") as file:
                for text, row in zip(lines, rows, strict=True):
                    file.write(json.dumps({"text": text, **row}) + "\n")
            partial.replace(out)
        print_stats(runtime_of(loaded), tokens, seconds)
    finally:
        runtime_of(loaded).close()


def print_stats(runtime: Any, tokens: int, seconds: float) -> None:
    """One table of what a run did."""
    from sida_ext.budget import format_bytes

    stats = runtime.stats()
    table = Table(title=f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")
    for column in ("layer", "wanted", "hits", "late", "misses", "evictions", "read", "stall s"):
        table.add_column(column, justify="right" if column != "layer" else "left")
    for name, row in [*((layer.name, layer) for layer in stats.layers), ("all", stats)]:
        table.add_row(
            name,
            str(row.unique),
            str(row.hits),
            str(row.late),
            str(row.misses),
            str(row.evictions),
            format_bytes(row.bytes_read),
            f"{row.stall_seconds:.3f}",
        )
    console.print(table)
    print(
        f"hit rate {stats.hit_rate:.1%}, expert memory {format_bytes(runtime.expert_memory)}, "
        f"read {format_bytes(stats.bytes_read)}, stalled {stats.stall_seconds:.3f} s"
    )


@app.command()
def info(
    path: Annotated[Path | None, typer.Option(help="Folder whose disk is measured; default: the store cache.")] = None,
    quick: Annotated[bool, typer.Option(help="Leave the measurements out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, instruction sets, devices, measured memory bandwidth and disk rate."""
    from sida_ext.info import collect, show

    found = collect(path, measure=not quick)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


def main() -> None:
    """Errors that the user can mend are one line and exit status 1, not a traceback."""
    from sida_ext.errors import PredictorError, StoreError

    try:
        app()
    except (StoreError, PredictorError, ValueError, OSError, TimeoutError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
