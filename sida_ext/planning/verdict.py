"""``sida_ext.plan``: will it run here, and how fast, from config.json and file headers alone."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sida_ext.experts.budget import available_memory, format_bytes, parse_bytes, parse_memory
from sida_ext.experts.folders import default_cache
from sida_ext.planning.capacity import (
    EXPERT_DTYPES,
    LOW_BIT_DTYPES,
    MISSES,
    Capacity,
    experts_bytes,
    kv_cache_bytes,
    other_bytes,
    record_bytes,
    room,
)
from sida_ext.planning.counting import ModelFacts, count_experts
from sida_ext.planning.gpu import Gpu, gpu_rates, parse_gpu
from sida_ext.planning.headers import read_headers
from sida_ext.planning.rates import SLOWER_DISK, Measured, Rates, as_served, measured_rates
from sida_ext.planning.routing import Recorded
from sida_ext.planning.speed import Speed, decode_speed, prompt_speed

__all__ = ["DtypeRow", "Plan", "parse_rate", "plan"]

# Packing reads each expert and writes its record; converting and checksums may be slower than the disk.
PACK_SLOWER = 4.0
Range = tuple[float, float]


@dataclass(frozen=True)
class DtypeRow:
    """What the experts take in one type: as records, all and one, and what part of them the memory holds."""

    dtype: str
    experts_bytes: int
    expert_bytes: int
    expert_memory: int
    resident_share: float
    fits: bool
    pack_seconds: Range


@dataclass(frozen=True)
class Plan:
    """The answer. Sizes in bytes, ranges as (low, high).

    Attributes:
        model, family: as given, and ``model_type``.
        fits: the smallest budget and everything else fit in the memory.
        verdict: one sentence.
        dtype: of the experts, as planned; dense_dtype: of every other large matrix, None: as the
            checkpoint has it.
        moe_layers, experts, top_k: of the model; experts in each layer.
        experts_bytes: of all experts in ``dtype``; the store has this size. by_dtype: in every type.
        other_bytes: of everything else; kv_bytes: of the cache at ``context`` tokens.
        process_bytes: of the process beside weights and cache; low_bit_bytes: with ``on_miss="low_bit"``, of the 4-bit
            copies of all experts.
        smallest_budget: of expert memory; expert_memory: what is planned; resident_share: of the experts.
        memory: that the machine has for this process; memory_needed: of it, with ``expert_memory``.
        decode_tokens_per_s: None for a model that does not decode, or a type that this engine cannot compute.
        prompt_tokens_per_s: of prompts of ``prompt_tokens`` tokens.
        disk_bytes_per_token: read while decoding, of a model that does not decode: of a prompt's token.
        hit_rate: of the same.
        pack_seconds: to make the store, once.
        checkpoint_bytes: of the safetensors files; download_bytes: of these, not yet here.
        modelled: times are of published peaks of a GPU, nothing was measured.
        rates: where each rate comes from; notes: what else should be known.
        command: runs it.
    """

    model: str
    family: str
    fits: bool
    verdict: str
    dtype: str
    dense_dtype: str | None
    moe_layers: int
    experts: int
    top_k: float
    experts_bytes: int
    other_bytes: int
    kv_bytes: int
    process_bytes: int
    low_bit_bytes: int
    context: int
    prompt_tokens: int
    smallest_budget: int
    expert_memory: int
    resident_share: float
    memory: int
    memory_needed: int
    decode_tokens_per_s: Range | None
    prompt_tokens_per_s: Range | None
    disk_bytes_per_token: Range | None
    hit_rate: Range | None
    pack_seconds: Range
    checkpoint_bytes: int
    download_bytes: int
    modelled: bool
    by_dtype: tuple[DtypeRow, ...]
    rates: dict[str, str]
    notes: tuple[str, ...]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: ranges are lists."""
        return asdict(self)


def parse_rate(text: str | float | None, name: str) -> float | None:
    """Bytes a second from ``"2GB/s"``, ``"500 MB/s"`` or a number.

    Raises:
        ValueError: names the argument and the value.
    """
    if text is None:
        return None
    if isinstance(text, str):
        match = re.fullmatch(r"(.*?)\s*/\s*s", text.strip())
        try:
            value = float(parse_bytes(match[1], name)) if match else float("nan")
        except ValueError:
            value = float("nan")
    else:
        value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {text!r}, expected bytes a second above 0, such as '2GB/s'")
    return value


def _streamed_faster(points: Measured, factor: float) -> Measured:
    """Of another memory: one token, which streams the weights, takes ``factor`` times as long; computing stays."""
    few = min(points.streamed)
    streamed = {
        tokens: (a * factor, b * factor) if tokens == few else (a, b) for tokens, (a, b) in points.streamed.items()
    }
    return replace(points, streamed=streamed)


def _adjusted(rates: Rates, disk: float | None, bandwidth: float | None) -> Rates:
    """The rates of this machine with another disk or another memory: what streams weights goes with the memory."""
    said = dict(rates.said)
    if disk is not None:  # a lane of the other disk has the same part of it
        alone = rates.alone * disk / rates.disk[0] if rates.disk[0] else 0.0
        rates = replace(rates, disk=(disk, disk * SLOWER_DISK), store=disk, alone=alone)
        said["reads"] = f"given: {disk / 1e9:g} GB/s"
    if bandwidth is not None:
        if not rates.memory:
            raise ValueError(
                f"bandwidth is {bandwidth:g} bytes/s, but this machine's own was not measured; sida info does"
            )
        factor = rates.memory / bandwidth
        scaled = [_streamed_faster(points, factor) for points in (rates.expert, rates.number)]
        rates = replace(rates, expert=scaled[0], number=scaled[1])
        said["memory"] = f"given: {bandwidth / 1e9:g} GB/s, this machine has {rates.memory / 1e9:.3g}; cores as here"
    return replace(rates, said=said)


def _pack_seconds(facts: ModelFacts, dtype: str, disk: float) -> Range:
    least = (facts.expert_source_bytes + experts_bytes(facts, dtype)) / disk if disk else 0.0
    return least, PACK_SLOWER * least


def _size(count: int) -> str:
    """A budget for the command line, rounded down."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{math.floor(100 * count / size) / 100:g}{unit}"
    return str(count)


def _command(
    name: str, facts: ModelFacts, dtype: str, budget: Capacity, dense_dtype: str | None, gpu: bool, on_miss: str
) -> str:
    memory = "100%" if budget.resident_share >= 1 else _size(budget.budget)
    if budget.budget < budget.smallest_budget + (budget.smallest_budget >> 5):
        memory = str(budget.budget)  # rounding down would take the last slot
    words = ["sida", "run" if facts.encoder_only else "serve", name]
    if facts.encoder_only:
        words.append("TEXT.txt")
    words += ["--expert-memory", memory, "--expert-dtype", dtype]
    if dense_dtype is not None:
        words += ["--dense-dtype", dense_dtype]
    if gpu:
        words += ["--device", "cuda"]
    if on_miss != "wait":
        words += ["--on-miss", on_miss]
    return shlex.join(words)


def _verdict(name: str, facts: ModelFacts, dtype: str, found: Capacity, memory: int, where: str) -> str:
    if not found.fits:
        least = found.needed + found.smallest_budget
        return (
            f"{name} does not fit: without a single {dtype} expert it takes {format_bytes(found.needed)}, with one "
            f"{format_bytes(least)}; {where} has {format_bytes(memory)}"
        )
    if found.resident_share >= 1:
        return f"{name} runs with all of its {dtype} experts in memory ({format_bytes(found.budget)} of {where})"
    return (
        f"{name} runs: {found.resident_share:.0%} of its {dtype} experts stay in {format_bytes(found.budget)} of "
        f"memory, the others are read from disk when a token wants them"
    )


def _low_bit_bytes(facts: ModelFacts, dtype: str, on_miss: str, gpu: str | None) -> int:
    """Of the copies that ``on_miss`` keeps of all experts."""
    if on_miss not in MISSES:
        raise ValueError(f"on_miss is {on_miss!r}, expected one of {', '.join(MISSES)}")
    if on_miss == "wait":
        return 0
    if dtype in LOW_BIT_DTYPES or gpu is not None:
        raise ValueError(
            f"on_miss is 'low_bit', expected 'wait' with dtype={dtype!r} and gpu={gpu!r}: copies stand in for experts "
            "of more than 4 bits, on the CPU"
        )
    return experts_bytes(facts, LOW_BIT_DTYPES[0])


def _notes(facts: ModelFacts, dtype: str, found: Capacity, rows: Sequence[DtypeRow], store_here: bool) -> list[str]:
    notes = []
    if facts.ignored_numbers:
        notes.append(
            f"{facts.ignored_numbers:,} numbers of the checkpoint are not loaded by transformers and not counted "
            "(layers that predict further tokens, scales of quantised weights, tied heads)"
        )
    one = record_bytes(facts.shape, dtype)
    better = [row for row in rows if row.fits and row.expert_bytes < one and row.resident_share > found.resident_share]
    if better and found.resident_share < 1:
        best = max(better, key=lambda row: row.resident_share)
        notes.append(f"{best.dtype} would keep {best.resident_share:.0%} of the experts in memory")
    if len(facts.shapes) > 1:
        notes.append("the model has experts of more than one width; a store holds them all in the greatest")
    if store_here:
        folder = default_cache()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        store = experts_bytes(facts, dtype)
        if store > free:
            notes.append(f"the store takes {format_bytes(store)}, but {folder} has {format_bytes(free)} free")
    return notes


def _speeds(
    facts: ModelFacts,
    dtype: str,
    budget: int,
    rates: Rates,
    prompt_tokens: int,
    recorded: dict[str, Recorded],
    dense_dtype: str | None,
) -> tuple[Speed | None, Speed]:
    decode = None
    if not facts.encoder_only:
        decode = decode_speed(facts, dtype, budget, rates, recorded.get("decode"), dense_dtype)
    return decode, prompt_speed(facts, dtype, budget, rates, prompt_tokens, recorded.get("prompt"), dense_dtype)


def plan(
    path_or_id: str | os.PathLike[str],
    memory: str | int | None = None,
    disk: str | float | None = None,
    *,
    bandwidth: str | float | None = None,
    gpu: str | None = None,
    dtype: str = "bfloat16",
    dense_dtype: str | None = None,
    expert_memory: str | int | None = None,
    on_miss: str = "wait",
    context: int = 4096,
    prompt_tokens: int | None = None,
    recorded: dict[str, Recorded] | None = None,
    measure: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Plan:
    """Whether a model will run, with how much of it in memory, and how fast: from config.json and file headers alone.

    Args:
        path_or_id: checkpoint folder, or hub id of which config.json and headers are fetched, nothing else.
        memory: that the process may take, ``"16GiB"``; None: what is free here now.
        disk: bytes a second that the expert store is read with, ``"2GB/s"``; None: measured, or remembered.
        bandwidth: of the memory; None: this machine's. The cores stay this machine's.
        gpu: ``"8GiB"``, ``"L4"`` or ``"RTX 4090:24GiB"``: experts computed on a GPU. Its times are *modelled*.
        dtype: of the experts: float32, bfloat16, float16, int8, int4 or mxfp4.
        dense_dtype: of every other large matrix: bfloat16, int8 or int4; None: as the checkpoint has it.
        expert_memory: a budget to plan with, as ``from_pretrained`` takes it: bytes, ``"2GiB"``, ``"25%"`` of the
            experts; None or ``"auto"``: as much as fits.
        on_miss: as ``from_pretrained`` takes it: ``"low_bit"`` keeps a 4-bit copy of every expert in memory too. The
            speeds are those of waiting.
        context: tokens in the cache; prompt_tokens: of a prompt, None: 512, or 32 for an encoder.
        recorded: routing of a real run for ``"decode"``, ``"prompt"`` or both; where there is none, two synthetic ones
            are the ends of the range (:mod:`sida_ext.planning.routing`).
        measure: measure this machine though its rates are remembered, and a layer of the model without its experts;
            this takes torch, transformers and some seconds. Without it, what was never measured is assumed, and said.
        revision, token: of a hub id.

    Raises:
        FileNotFoundError, ConnectionError: no such checkpoint, or the hub cannot be reached.
        ValueError: no Mixture of Experts, an unknown family, damaged or contradictory headers, or a bad argument.
    """
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ValueError(f"prompt_tokens is {prompt_tokens}, expected at least 1")
    if dtype not in EXPERT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(EXPERT_DTYPES)}")
    disk_rate, memory_rate = parse_rate(disk, "disk"), parse_rate(bandwidth, "bandwidth")
    card = parse_gpu(gpu) if gpu is not None else None
    headers = read_headers(path_or_id, revision, token)
    facts = count_experts(headers)
    host = parse_bytes(memory, "memory") if memory is not None else available_memory()
    facts, dense, said = (facts, dense_dtype, None) if card else as_served(facts, dense_dtype)
    kv = 0 if facts.encoder_only else kv_cache_bytes(facts, context)
    asked = None
    if expert_memory not in (None, "auto"):
        asked = parse_memory(expert_memory, experts_bytes(facts, dtype))
    where = "this machine" if memory is None else "the machine"
    place, place_name, process = (host, where, None) if card is None else (card.memory, "the GPU", card.context_bytes)
    if dense_dtype is not None and card is not None:  # a plan promises a command that runs
        raise ValueError(
            f"dense_dtype is {dense_dtype!r}, expected None with gpu={gpu!r}: the kernels that compute from it are the "
            "CPU's"
        )
    copies = _low_bit_bytes(facts, dtype, on_miss, gpu)
    options: dict[str, Any] = {"kv": kv + copies, "dense_dtype": dense}
    if process is not None:
        options["process"] = process
    found = room(facts, dtype, place, budget=asked, **options)
    prompt = prompt_tokens or (32 if facts.encoder_only else 512)
    if measure and card is None:
        from sida_ext.planning.layer_time import measure_layer

        measure_layer(headers.config, facts)
    rates, unknown = _rates(facts, dtype, dense, card, host, disk_rate, measure)
    if rates is not None and card is None:
        rates = _adjusted(rates, disk_rate, memory_rate)
    rows = []
    for name in EXPERT_DTYPES:
        # 4-bit experts need no copies.
        one = room(facts, name, place, **options | ({"kv": kv} if name in LOW_BIT_DTYPES else {}))
        seconds = _pack_seconds(facts, name, disk_rate or (rates.store if rates else 0.0))
        share = one.resident_share if one.fits else 0.0
        rows.append(
            DtypeRow(
                name,
                experts_bytes(facts, name),
                record_bytes(facts.shape, name),
                one.budget if one.fits else 0,
                share,
                one.fits,
                seconds,
            )
        )
    decode = prompts_ = None
    if found.fits and rates is not None:
        decode, prompts_ = _speeds(facts, dtype, found.budget, rates, prompt, recorded or {}, dense)
    notes = _notes(facts, dtype, found, rows, memory is None)
    notes += [sentence for sentence in (said, unknown) if sentence]
    if recorded is None and prompts_ is not None:
        notes.append(
            "no routing was recorded: the ranges' ends are of the least and the most local routing that is plausible"
        )
    steady = decode or prompts_
    return Plan(
        model=headers.name,
        family=facts.family,
        fits=found.fits,
        verdict=_verdict(headers.name, facts, dtype, found, place, place_name),
        dtype=dtype,
        dense_dtype=dense_dtype,
        moe_layers=len(facts.layers),
        experts=facts.experts,
        top_k=facts.top_k,
        experts_bytes=experts_bytes(facts, dtype),
        other_bytes=other_bytes(facts, dense),
        kv_bytes=kv,
        process_bytes=found.needed - other_bytes(facts, dense) - kv - copies,
        low_bit_bytes=copies,
        context=context,
        prompt_tokens=prompt,
        smallest_budget=found.smallest_budget,
        expert_memory=found.budget if found.fits else 0,
        resident_share=found.resident_share if found.fits else 0.0,
        memory=place,
        memory_needed=found.needed + (found.budget if found.fits else found.smallest_budget),
        decode_tokens_per_s=decode.tokens_per_s if decode else None,
        prompt_tokens_per_s=prompts_.tokens_per_s if prompts_ else None,
        disk_bytes_per_token=steady.disk_bytes_per_token if steady else None,
        hit_rate=steady.hit_rate if steady else None,
        pack_seconds=next(row.pack_seconds for row in rows if row.dtype == dtype),
        checkpoint_bytes=facts.checkpoint_bytes,
        download_bytes=facts.checkpoint_bytes if headers.folder is None else 0,
        modelled=card is not None,
        by_dtype=tuple(rows),
        rates=dict(rates.said) if rates else {},
        notes=tuple(notes),
        command=_command(headers.name, facts, dtype, found, dense_dtype, card is not None, on_miss)
        if found.fits
        else "",
    )


def _rates(
    facts: ModelFacts,
    dtype: str,
    dense_dtype: str | None,
    card: Gpu | None,
    host: int,
    disk_rate: float | None,
    again: bool,
) -> tuple[Rates | None, str | None]:
    """The machine's rates, or why there are none."""
    if card is not None:
        return gpu_rates(facts, dtype, card, host, disk_rate), None
    try:
        return measured_rates(facts, dtype, Path(default_cache()), again, dense_dtype), None
    except ValueError as error:
        return None, f"no speed: the engine of this build does not compute experts of {dtype} ({error})"
