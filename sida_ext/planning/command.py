"""``sida plan``: the verdict on a model, what measuring and recorded routing add to it, and the policies' hit rates."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sida_ext.progress import console, progress_bar
from sida_ext.texts import read_texts, tokenizer_of

if TYPE_CHECKING:
    from sida_ext.planning.verdict import Plan

__all__ = ["plan", "show"]

STEP_BATCHES = 8  # of the texts, whose tokens are looked at one by one


@dataclass(frozen=True)
class _Texts:
    """What recording routing takes."""

    lines: list[str]
    predictor: str | None
    batch_size: int
    max_length: int
    lookahead: int
    store: Path | None


def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; of it config.json and headers are read.")],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files (a line each) or .jsonl files (key text): the model is run on them."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the experts: bfloat16, float32, float16, int8, int4, mxfp4.")
    ] = "bfloat16",
    dense_dtype: Annotated[
        str | None,
        typer.Option(help="Of every other large matrix: bfloat16, int8 or int4; default: the checkpoint's."),
    ] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Budget: 2GiB, 25%, auto or bytes; default: what fits.")
    ] = None,
    on_miss: Annotated[
        str, typer.Option(help="wait, or low_bit: 4-bit copies of all experts stay in memory beside the budget.")
    ] = "wait",
    memory: Annotated[str | None, typer.Option(help="Of the machine, 16GiB; default: what is free here.")] = None,
    disk: Annotated[str | None, typer.Option(help="Its read rate, 2GB/s; default: measured here.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Of its memory, 40GB/s; default: measured here.")] = None,
    gpu: Annotated[str | None, typer.Option(help="8GiB, L4 or 'RTX 4090:24GiB': modelled times of a GPU.")] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens in the cache.")] = 4096,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt; default: 512, of an encoder 32.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine at this shape, a layer of the model too.")
    ] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Tokens/s over memory and disk rate.")] = False,
    png: Annotated[Path, typer.Option(help="The picture of --sweep.")] = Path("plan_sweep.png"),
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the model, and print predicted beside measured.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    predictor: Annotated[
        str | None, typer.Option(help="With TEXT: folder or entry point; default: perfect tables.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With TEXT: sentences in a batch.")] = 1,
    max_length: Annotated[int, typer.Option(min=1, help="With TEXT: tokens of a sentence at the most.")] = 512,
    lookahead: Annotated[int, typer.Option(min=1, help="With TEXT: batches whose tables are known ahead.")] = 4,
    store: Annotated[Path | None, typer.Option(help="With TEXT: a store made by sida pack.")] = None,
) -> None:
    """Will it run here, and how fast? From config.json and file headers, before a weight is downloaded.

    The exit status is 1 where it does not fit.

    With TEXT: also the hit rates of OPT, next_use, LRU, LFU and FIFO on its routing, at every budget; of a decoder-only
    model on prompts, and on the same text decoded token by token.
    """
    options: dict[str, Any] = {
        "memory": memory,
        "disk": disk,
        "bandwidth": bandwidth,
        "gpu": gpu,
        "dtype": dtype,
        "dense_dtype": dense_dtype,
        "expert_memory": expert_memory,
        "on_miss": on_miss,
        "context": context,
        "prompt_tokens": prompt,
        "revision": revision,
        "measure": measure,
    }
    if verify:
        _verify(model, dtype, dense_dtype, expert_memory, prompt, as_json)
        return
    if sweep:
        _sweep(model, options, png, as_json)
        return
    given = None
    if texts:
        given = _Texts(read_texts(texts), predictor, batch_size, max_length, lookahead, store)
    _plan(model, options, given, as_json)


def _plan(model: str, options: dict[str, Any], texts: _Texts | None, as_json: bool) -> None:
    from sida_ext.planning.verdict import plan as made

    if texts is None:
        found = made(model, **options)
        print(json.dumps(found.to_dict(), indent=1)) if as_json else show(found)
        _end(found)
        return
    # First, for a model that does not fit or does not exist is not loaded.
    first = made(model, **options)
    if not first.fits:
        print(json.dumps(first.to_dict(), indent=1)) if as_json else show(first)
        _end(first)
    routing, steps, tokens = _recorded(model, texts)
    from sida_ext.planning.routing import Recorded

    recorded = {"prompt": Recorded(routing.batches, len(routing.batches) // 2)}
    found = made(model, **options | {"recorded": recorded, "prompt_tokens": tokens})
    tables = {"hit_rates": _hit_rates(routing, texts)}
    if steps is not None:
        tables["decode_hit_rates"] = _hit_rates(steps, texts)
    if as_json:
        print(json.dumps(found.to_dict() | tables, indent=1))
        return
    show(found)
    named = "perfect tables" if texts.predictor is None else escape(texts.predictor)
    _show_hit_rates(f"hit rates, {named}, lookahead {texts.lookahead}", tables["hit_rates"])
    if steps is not None:
        known = f"next_use as if the next {texts.lookahead} tokens were known"
        _show_hit_rates(f"hit rates of decoding, {known}", tables["decode_hit_rates"])


def _end(found: Plan) -> None:
    """The status tells a script what the verdict tells a reader: 1 where the model does not fit."""
    if not found.fits:
        raise typer.Exit(1)


def _recorded(model: str, texts: _Texts) -> tuple[Any, Any, int]:
    """The routing of the texts, of a decoder-only model that of their tokens one by one too, else None, and the mean
    tokens of a batch."""
    from sida_ext import from_pretrained
    from sida_ext.experts.runtime import runtime_of
    from sida_ext.planning.hit_rates import record_routing, record_steps
    from sida_ext.prediction.moe_facts import predicted_stack
    from sida_ext.prediction.protocol import find_predictor

    loaded = from_pretrained(model, expert_memory="auto", store=texts.store)
    counts: list[int] = []
    try:
        chosen = find_predictor(texts.predictor, loaded) if texts.predictor is not None else None
        tokenizer = tokenizer_of(model)
        with progress_bar("routing") as bar:

            def batches() -> Iterator[dict[str, Any]]:
                for start in range(0, len(texts.lines), texts.batch_size):
                    batch = tokenizer(
                        texts.lines[start : start + texts.batch_size],
                        return_tensors="pt",
                        padding=True,
                        truncation=True,
                        max_length=texts.max_length,
                    )
                    counts.append(int(batch["attention_mask"].sum()))
                    yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                    bar(min(start + texts.batch_size, len(texts.lines)), len(texts.lines))

            routing = record_routing(loaded, batches(), chosen)
        few = itertools.islice(batches(), STEP_BATCHES)
        steps = record_steps(loaded, few) if predicted_stack(loaded) == "causal" else None
    finally:
        runtime_of(loaded).close()
    return routing, steps, max(1, round(sum(counts) / len(counts)))


def _hit_rates(routing: Any, texts: _Texts) -> list[dict[str, Any]]:
    from sida_ext.planning.hit_rates import compare

    rows = compare(routing, [share / 100 for share in range(10, 100, 10)], texts.lookahead)
    return [{"share": row.share, "slots": row.slots, "hit_rate": row.hit_rate} for row in rows]


def _show_hit_rates(title: str, rows: list[dict[str, Any]]) -> None:
    from sida_ext.experts.options import EVICTIONS
    from sida_ext.planning.hit_rates import UNTOLD

    table = Table(title=title)
    policies = ("opt", EVICTIONS[0], UNTOLD, *EVICTIONS[1:])
    for column in ("budget", "experts", "OPT", *policies[1:]):
        table.add_column(column, justify="right")
    for row in rows:
        rates = [f"{row['hit_rate'][name]:.1%}" for name in policies]
        table.add_row(f"{row['share']:.0%}", str(row["slots"]), *rates)
    _console().print(table)


def _console() -> Console:
    """The standard output; where it is no terminal, as wide as the tables are."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)


def _range(pair: tuple[float, float] | None, unit: str, form: str = ".3g") -> str:
    if pair is None:
        return "-"
    low, high = (format(value, form) for value in pair)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _bytes(pair: tuple[float, float] | None) -> str:
    from sida_ext.experts.budget import format_bytes

    if pair is None:
        return "-"
    low, high = (format_bytes(value) for value in pair)
    return low if low == high else f"{low} to {high}"


def show(found: Plan) -> None:
    """The verdict, one table, what should be known, and the command."""
    from sida_ext.experts.budget import format_bytes

    out = _console()
    out.print(f"[bold {'green' if found.fits else 'red'}]{escape(found.verdict)}[/]")
    mark = ", modelled" if found.modelled else ""
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("model", f"{found.family}, {found.moe_layers} MoE layers of {found.experts} experts, {found.top_k:g} a token"),
        (
            "everything else in memory",
            f"{format_bytes(found.other_bytes)} (matrices {found.dense_dtype or 'as the checkpoint'})",
        ),
        (f"KV cache at {found.context} tokens", format_bytes(found.kv_bytes)),
        ("the process itself", format_bytes(found.process_bytes)),
        *([("4-bit copies of all experts", format_bytes(found.low_bit_bytes))] if found.low_bit_bytes else []),
        ("smallest expert memory", f"{format_bytes(found.smallest_budget)}, one expert"),
        ("expert memory", f"{format_bytes(found.expert_memory)}, {found.resident_share:.0%} of the experts"),
        ("memory taken, of", f"{format_bytes(found.memory_needed)}, {format_bytes(found.memory)}"),
        (f"decode{mark}", _range(found.decode_tokens_per_s, "tokens/s")),
        (f"prompt of {found.prompt_tokens}{mark}", _range(found.prompt_tokens_per_s, "tokens/s")),
        (
            f"{'copied to the GPU' if found.modelled else 'read from disk'} for a token{mark}",
            _bytes(found.disk_bytes_per_token),
        ),
        (f"experts found in memory{mark}", _range(found.hit_rate, "of those wanted", ".0%")),
        ("packing, once", _range(found.pack_seconds, "s", ".0f")),
        ("checkpoint, to download", f"{format_bytes(found.checkpoint_bytes)}, {format_bytes(found.download_bytes)}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)
    types = Table(title=f"experts by type, the plan is for {found.dtype}")
    for column in ("type", "all experts (the store)", "one expert", "expert memory", "kept in memory", "packing, s"):
        types.add_column(column, justify="left" if column == "type" else "right")
    for row in found.by_dtype:
        kept = f"{row.resident_share:.0%}" if row.fits else "does not fit"
        sizes = (format_bytes(value) for value in (row.experts_bytes, row.expert_bytes, row.expert_memory))
        types.add_row(row.dtype, *sizes, kept, _range(row.pack_seconds, "", ".0f").strip())
    out.print(types)
    for name, text in found.rates.items():
        out.print(f"{name}: {escape(text)}", style="dim")
    for text in found.notes:
        out.print(f"note: {escape(text)}")
    if found.command:
        out.print(f"[bold]{escape(found.command)}[/]")


def _verify(
    model: str, dtype: str, dense_dtype: str | None, expert_memory: str | None, prompt: int | None, as_json: bool
) -> None:
    from sida_ext.planning.verify import verify

    rows = verify(
        model, dtype=dtype, dense_dtype=dense_dtype, expert_memory=expert_memory or "25%", prompt_tokens=prompt
    )
    if as_json:
        print(json.dumps([row.to_dict() for row in rows], indent=1))
        return
    table = Table(title=f"{escape(model)}, {dtype}, {expert_memory or '25%'} of expert memory")
    for column in (
        "run",
        "measured",
        "predicted",
        "",
        "without its routing",
        "hit rate",
        "predicted",
        "read/token",
        "predicted",
    ):
        table.add_column(column, justify="right" if column != "run" else "left")
    for row in rows:
        table.add_row(
            row.what,
            f"{row.measured:.3g} tokens/s",
            _range(row.predicted, ""),
            "inside" if row.inside else "[red]outside[/]",
            _range(row.unrecorded, ""),
            f"{row.hit_rate:.1%}",
            f"{row.predicted_hit_rate:.1%}",
            _bytes((row.disk_bytes_per_token,) * 2),
            _bytes((row.predicted_disk_bytes,) * 2),
        )
    _console().print(table)


def _sweep(model: str, options: dict[str, Any], png: Path, as_json: bool) -> None:
    from sida_ext.planning.sweep import draw, sweep

    found = sweep(model, **options)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        table = Table(title=f"{escape(model)}, {found.dtype}: {found.what} tokens/s, low to high{found.mark}")
        table.add_column("memory", justify="right")
        for rate in found.disks:
            table.add_column(f"disk {rate / 1e9:g} GB/s", justify="right")
        from sida_ext.experts.budget import format_bytes

        for memory, cells in zip(found.memories, found.cells, strict=True):
            values = ["does not fit" if cell is None else _range(cell, "").strip() for cell in cells]
            table.add_row(format_bytes(memory), *values)
        _console().print(table)
        print(found.knee)
    draw(found, png)
    console.print(f"picture: {escape(str(png))}", highlight=False)
