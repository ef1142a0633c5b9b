"""The ``sida`` command: pack, train, run, plan, serve, info."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sida_ext.files import written_whole
from sida_ext.planning.command import plan
from sida_ext.progress import console, progress_bar, show_log
from sida_ext.serving.command import serve
from sida_ext.texts import read_pairs, read_texts, tokenizer_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sida_ext.experts.runtime import Runtime
    from sida_ext.serving.savings import OrderSavings
    from sida_ext.serving.token_batches import TokenBatch

# Continuations that sida run --generate prints.
SHOWN = 3

app = typer.Typer(
    name="sida",
    help="Serve Mixture-of-Experts transformers whose experts do not fit where they are computed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)


@app.command()
def pack(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The store to write.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, float16, int8, int4 or mxfp4.")] = "bfloat16",
    allow_pickle: Annotated[bool, typer.Option(help="Read pytorch_model.bin files, which are pickles.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
) -> None:
    """Write the experts of a checkpoint as aligned, checksummed records."""
    from sida_ext.experts.budget import format_bytes
    from sida_ext.models.packing import pack as pack_store

    hub = {"revision": revision} if revision is not None else {}
    with progress_bar("packing") as bar:
        header = pack_store(checkpoint, out, dtype, allow_pickle=allow_pickle, progress=bar, **hub)
    print(
        f"{out}: {header.total_experts} experts in {len(header.layers)} MoE layers, {header.dtype}, "
        f"{format_bytes(header.record_bytes)} each, {format_bytes(header.experts_bytes)} in all"
    )
    for name, error in zip(header.layers, header.rounding, strict=False):
        print(f"  {name}: weights moved by {100 * error:.2f} % (root of mean squares)")


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
    decoder: Annotated[
        bool,
        typer.Option(
            "--decoder",
            help="Train the decoder's predictor, for generate(). A .jsonl line may have a 'target' beside its 'text'; "
            "without one the model writes it.",
        ),
    ] = False,
) -> None:
    """Train a predictor on a model's own routing; go on after Ctrl-C with the same command."""
    from sida_ext import from_pretrained
    from sida_ext.experts.runtime import runtime_of
    from sida_ext.training.decoder_distill import train_decoder_predictor
    from sida_ext.training.distill import TrainingOptions, train_predictor

    if decoder and variant is not None:
        raise ValueError(f"--variant is {variant!r}; a decoder's predictor has one form, leave it out")
    lines: Any = read_pairs(texts) if decoder else read_texts(texts)
    loaded = from_pretrained(model, expert_memory=expert_memory)
    options: dict[str, Any] = {"variant": variant} if variant is not None else {}
    try:
        (train_decoder_predictor if decoder else train_predictor)(
            loaded,
            tokenizer_of(model),
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
    choices = report["held_out"]["predictor"]["choices"]
    several = choices > 1
    shown = ("among_k", "among_2k") if several else ("top1", "top3")
    for column in ("", *((f"among {choices}", f"among {2 * choices}") if several else ("top-1", "top-3"))):
        table.add_column(column, justify="right" if column else "left")
    for name in ("token_table", "predictor"):
        found = report["held_out"][name]
        for layer, shares in enumerate(zip(*(found[column] for column in shown), strict=True)):
            table.add_row(f"{name}, layer {layer}", *(f"{share:.1%}" for share in shares))
        table.add_row(f"[bold]{name}, mean[/]", *(f"{found[f'mean_{column}']:.1%}" for column in shown))
    Console().print(table)
    print(f"predictor: {out}; report: {out / 'report.json'}")
    if (advice := table_advice(report["held_out"], out)) is not None:
        print(advice)


def table_advice(held_out: dict[str, Any], out: Path) -> str | None:
    """What to do where the token table, which costs nothing, hits more often than the predictor; else None."""
    several = held_out["predictor"].get("choices", 1) > 1
    share, what = ("mean_among_2k", "among 2k") if several else ("mean_top3", "top-3")
    table, ours = (held_out[name][share] for name in ("token_table", "predictor"))
    if table <= ours:
        return None
    return (
        f"on held-out text the token table hits more often ({what} {table:.1%}) than the predictor ({ours:.1%}): train "
        f"on more text, or serve with --predictor {out / 'token_table'}"
    )


app.command()(plan)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    texts: Annotated[list[Path], typer.Argument(help="Text files (a line each) or .jsonl files (key text).")],
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N: where experts lie and everything is computed.")
    ] = "cpu",
    expert_memory: Annotated[str, typer.Option(help="Budget: 2GiB, 25%, auto or bytes.")] = "auto",
    host_memory: Annotated[
        str | None, typer.Option(help="With cuda: pinned memory for experts; default: picked.")
    ] = None,
    expert_dtype: Annotated[str, typer.Option(help="bfloat16, float32, float16, int8, int4 or mxfp4.")] = "bfloat16",
    dense_dtype: Annotated[
        str | None, typer.Option(help="Of every other large matrix: bfloat16, int8 or int4; default: as it is.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="A store made by sida pack.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Folder made by sida train, or an entry point.")] = None,
    routing: Annotated[str, typer.Option(help="router, predicted or confident.")] = "router",
    confidence: Annotated[
        float, typer.Option(min=0, help="With confident: probability from which the prediction decides.")
    ] = 0.9,
    on_miss: Annotated[
        str, typer.Option(help="wait, or low_bit: an expert that is not there is computed from a 4-bit copy.")
    ] = "wait",
    max_low_bit: Annotated[
        float, typer.Option(min=0, max=1, help="With low_bit: share of the choices that copies serve at the most.")
    ] = 0.05,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sentences in a batch; default: 1.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Form batches of similar length with this many tokens at the most.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sentence at the most.")] = 512,
    lookahead: Annotated[str, typer.Option(help="Batches whose experts are predicted ahead; auto: picked.")] = "auto",
    order: Annotated[str, typer.Option(help="given or overlap.")] = "given",
    generate: Annotated[
        int, typer.Option(min=0, help="Of a language model: so many tokens after each text; 0: score the texts.")
    ] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace here, and a PNG beside it.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write one JSON line for each text here.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on a Ray cluster ($RAY_ADDRESS, or this machine).")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: how many, each with the budget.")] = 1,
    replica_cpus: Annotated[float, typer.Option(help="With --ray: processors of each replica.")] = 1.0,
) -> None:
    """Run texts through a model and say what it did: tokens/s, hit rate, stall time, bytes read."""
    import torch

    from sida_ext import from_pretrained, stream
    from sida_ext.batching import windows
    from sida_ext.experts.runtime import runtime_of
    from sida_ext.prediction.protocol import find_predictor
    from sida_ext.serving.language import is_language_model
    from sida_ext.serving.savings import watch_order
    from sida_ext.serving.token_batches import TokenBatch, batches_by_tokens, rows_of, summary

    _check_run(batch_size, max_tokens, trace, out)
    ahead = int(lookahead) if lookahead.isdecimal() else lookahead
    lines = read_texts(texts)
    options: dict[str, Any] = {
        "device": device,
        "expert_memory": expert_memory,
        "host_memory": host_memory,
        "expert_dtype": expert_dtype,
        "dense_dtype": dense_dtype,
        "store": store,
        "routing": routing,
        "confidence": confidence,
        "on_miss": on_miss,
        "max_low_bit": max_low_bit,
    }
    if ray:
        _run_on_cluster(
            {
                "batch-size": batch_size,
                "max-tokens": max_tokens,
                "trace": trace,
                "order": order,
                "lookahead": lookahead,
            },
            lines,
            out,
            replicas,
            replica_cpus,
            model,
            options,
            predictor,
            max_length,
            generate,
        )
        return
    loaded = from_pretrained(model, **options)
    runtime = runtime_of(loaded)
    try:
        if loaded.config.is_encoder_decoder and hasattr(loaded, "lm_head"):
            raise ValueError("sida run takes encoders and classifiers; for generate() use the Python interface")
        tokenizer = tokenizer_of(model)
        chosen = find_predictor(predictor, loaded) if predictor is not None else None
        pad = tokenizer.pad_token_id or 0
        if is_language_model(loaded):
            language = _LanguageRun(loaded, tokenizer, pad, batch_size or 1, max_length)
            language.run(lines, chosen, ahead, order, generate, out, trace)
            return
        if generate:
            raise ValueError(f"--generate is {generate}, expected 0: {type(loaded).__name__} is no language model")

        def encoded() -> Iterator[list[int]]:
            for line in lines:
                yield tokenizer(line, truncation=True, max_length=max_length)["input_ids"]

        formed: list[TokenBatch] = []

        def batches() -> Iterator[TokenBatch]:
            sentences = enumerate(torch.tensor(ids) for ids in encoded())
            source: Iterator[TokenBatch] = (TokenBatch(part, pad) for part in windows(sentences, batch_size or 1))
            if max_tokens is not None:
                source = batches_by_tokens(encoded(), max_tokens, pad_token_id=pad)
            for batch in source:
                formed.append(batch)
                yield _on_device(batch, runtime.device)

        rows: dict[int, dict[str, Any]] = {}
        if trace is not None:
            runtime.start_trace()
        begin = time.perf_counter()
        with watch_order(loaded) if order == "overlap" else nullcontext() as watch, progress_bar("running") as bar:
            given = batches() if watch is None else watch.batches(batches())
            for number, output in enumerate(stream(loaded, given, chosen, ahead, order)):
                batch = formed[number]
                for position, row in zip(batch.positions, rows_of(output, batch), strict=True):
                    rows[position] = summary(row)
                bar(len(rows), len(lines))
        seconds = time.perf_counter() - begin
        _write_rows(out, lines, [rows[number] for number in range(len(lines))])
        _report_batches(runtime, formed, seconds)
        if watch is not None:
            _print_savings(watch.savings(runtime.lookahead.batches if runtime.lookahead is not None else int(ahead)))
        if trace is not None:
            _write_trace(runtime, trace)
    finally:
        runtime.close()


def _on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The same batch, its tensors where the model computes."""
    for name, tensor in batch.items():
        batch[name] = tensor.to(device)
    return batch


def _refuse_device(model: PreTrainedModel, runtime: Runtime) -> None:
    if runtime.device.type != "cpu":
        raise ValueError(
            f"--device is {str(runtime.device)!r}, expected cpu: sida run scores and continues texts with "
            f"{type(model).__name__} on the CPU alone; for a GPU use the Python interface"
        )


def _check_run(batch_size: int | None, max_tokens: int | None, trace: Path | None, out: Path | None) -> None:
    """Refuse what could not be done or written, before minutes of work."""
    if batch_size is not None and max_tokens is not None:
        raise ValueError("--batch-size and --max-tokens are both given; batches are formed by one of them")
    if trace is not None and trace.suffix == ".png":
        raise ValueError(f"--trace is {trace}, expected a name for JSON; the picture gets the same name with .png")
    for path in (trace, out):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is no folder, expected one to write {path.name} into")


def _run_on_cluster(
    refused: dict[str, Any], lines: list[str], out: Path | None, replicas: int, cpus: float, *arguments: Any
) -> None:
    """``refused``: options that must be at their defaults; ``arguments``: the fields of ``BatchArguments``."""
    for name, value in refused.items():
        if value != {"order": "given", "lookahead": "auto"}.get(name):
            raise ValueError(f"--{name} is {value} with --ray, where texts run alone, grouped by experts; leave it out")

    from sida_ext.experts.budget import format_bytes
    from sida_ext.serving.cluster_batch import BatchArguments, run_batch

    begin = time.perf_counter()
    found = run_batch(BatchArguments(*arguments), lines, replicas=replicas, cpus=cpus)
    seconds = time.perf_counter() - begin
    _write_rows(out, lines, found.rows)
    print(
        f"{len(lines)} texts of {found.tokens} tokens in {seconds:.2f} s, the start of {replicas} replicas included; "
        f"hit rate {found.hits / max(found.wanted, 1):.1%}, read {format_bytes(found.read_bytes)}"
    )


def _write_rows(out: Path | None, lines: list[str], rows: list[dict[str, Any]]) -> None:
    """One JSON line for each text, if somebody wants them."""
    if out is not None:
        with written_whole(out) as partial, open(partial, "w", encoding="utf-8") as file:
            for text, row in zip(lines, rows, strict=True):
                file.write(json.dumps({"text": text, **row}) + "\n")


def _report_batches(runtime: Runtime, formed: list[Any], seconds: float) -> None:
    tokens = sum(sum(batch.lengths) for batch in formed)
    padding = sum(batch["input_ids"].numel() for batch in formed) - tokens
    print_stats(runtime, tokens, seconds)
    print(f"{len(formed)} batches, {padding / (tokens + padding):.1%} of their tokens padding")
    if runtime.lookahead is not None:
        print(f"lookahead {runtime.lookahead.batches}: {runtime.lookahead.why}")


@dataclass
class _LanguageRun:
    """``sida run`` of a decoder-only language model: scores texts, or goes on with them."""

    model: Any
    tokenizer: Any
    pad: int
    batch_size: int
    max_length: int

    def run(
        self,
        lines: list[str],
        predictor: Any,
        lookahead: int | str,
        order: str,
        generate: int,
        out: Path | None,
        trace: Path | None,
    ) -> None:
        from sida_ext.experts.runtime import runtime_of
        from sida_ext.serving.language import continuations, likelihoods, perplexity

        _refuse_device(self.model, runtime_of(self.model))
        ids = [self.tokenizer(line, truncation=True, max_length=self.max_length)["input_ids"] for line in lines]
        common: dict[str, Any] = {"batch_size": self.batch_size, "pad_token_id": self.pad}
        rows: list[dict[str, Any]] = []
        if trace is not None:
            runtime_of(self.model).start_trace()
        begin = time.perf_counter()
        with progress_bar("running") as bar:
            if generate:
                for written in continuations(self.model, ids, generate, **common):
                    rows.append({"generated": self.tokenizer.decode(written), "tokens": len(written)})
                    bar(len(rows), len(lines))
            else:
                for value, count in likelihoods(self.model, ids, predictor, lookahead=lookahead, order=order, **common):
                    rows.append({"log_likelihood": value, "tokens": count})
                    bar(len(rows), len(lines))
        seconds = time.perf_counter() - begin
        _write_rows(out, lines, rows)
        print_stats(runtime_of(self.model), sum(row["tokens"] for row in rows), seconds)
        if generate:
            for row in rows[:SHOWN]:
                print(row["generated"])
            if len(rows) > SHOWN:
                where = f"all are in {out}" if out is not None else "-o FILE writes all"
                print(f"({SHOWN} of {len(rows)} continuations are shown; {where})")
        else:
            print(f"perplexity {perplexity([(row['log_likelihood'], row['tokens']) for row in rows]):.2f}")
        if trace is not None:
            _write_trace(runtime_of(self.model), trace)


def _print_savings(savings: OrderSavings) -> None:
    from sida_ext.experts.budget import format_bytes

    share = savings.saved_bytes / savings.given_bytes if savings.given_bytes else 0.0
    print(
        f"order overlap: {format_bytes(savings.run_bytes)} to read, {format_bytes(savings.given_bytes)} in the given "
        f"order, {format_bytes(savings.saved_bytes)} ({share:.1%}) saved (simulated for this run's experts and budget)"
    )


def _write_trace(runtime: Runtime, path: Path) -> None:
    from sida_ext.experts.timeline import draw, write_chrome_trace

    try:
        events = runtime.take_trace()
    except RuntimeError as error:
        raise ValueError(f"--trace: {error!r}") from error
    write_chrome_trace(events, path)
    picture = path.with_suffix(".png")
    draw([("sida run", events)], picture)
    console.print(f"trace: {path} (open it in ui.perfetto.dev or chrome://tracing), {picture}", markup=False)


def print_stats(runtime: Any, tokens: int, seconds: float) -> None:
    """One table of what a run did."""
    from sida_ext.experts.budget import format_bytes

    stats = runtime.stats()
    table = Table(title=f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")
    for column in ("layer", "wanted", "hits", "late", "misses", "evictions", "read", "stall s"):
        table.add_column(column, justify="right" if column != "layer" else "left", overflow="fold")
    for name, row in [*((layer.name, layer) for layer in stats.layers), ("all", stats)]:
        table.add_row(
            escape(name),
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
    if runtime.low_bit_memory:
        print(
            f"4-bit copies ({format_bytes(runtime.low_bit_memory)}) served {stats.low_bit_choices} of {stats.choices} "
            f"choices, {stats.low_bit_share:.1%}, at most {runtime.max_low_bit:.1%}: the output depends on timing"
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

    show_log()
    try:
        app()
    except (StoreError, PredictorError, ValueError, OSError, TimeoutError, ImportError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
