"""How much of the gap in stall time between token table and oracle the trained predictor closes, with its spread.

    python -m bench.prediction.stall_gap --measure          # real runs and the rates of this machine; alone on an idle
    one
    python -m bench.prediction.stall_gap                    # the virtual clock at the rates measured; writes the
    section

Both are of the bundled model under one budget. A real run's stall is noisy (tens of microseconds a read, two cores for
model, predictor and reads), so there are several rounds in which all rows take turns. On the virtual clock the engine's
own state machine runs the same routing while reads and computation take the measured times: the same every time, and
its spread is that over disjoint sets of sentences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from bench.prediction.quality import write
from bench.prediction.stall import oracle, oracle_tables
from examples.corpus import DEMO_MODEL, MAX_TOKENS, load_sentences
from sida_ext.planning.hit_rates import ModelledTime, Routing, on_the_clock
from sida_ext.prediction.hash_table import NO_EXPERT
from sida_ext.prediction.prefetch import CANDIDATES, PrefetchPolicy
from sida_ext.prediction.protocol import load_predictor

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "bench" / "results" / "stall_gap.json"
PREDICTOR = ROOT / "examples" / "demo_predictor"
SIZES = {1: (100, 6), 4: (160, 3), 16: (320, 3)}  # batch -> sentences and rounds of the real runs
SETS, SET_BATCHES = 4, {1: 60, 4: 20, 16: 8}  # of the virtual clock: disjoint sets, and batches in each
WASTE = (0.25, 1.0)
NAMES = ("none", "token table", "hash predictor", "oracle")


def batches_of(sentences: list[Any], size: int, tokenizer: Any) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(sentences) - size + 1, size):
        texts = [s.text for s in sentences[start : start + size]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        found.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return found


def gaps_closed(table: list[float], ours: list[float], oracle_: list[float]) -> list[float]:
    """One for each round or set in which the oracle stalls less than the table; elsewhere there is no gap to close."""
    return [(t - mine) / (t - least) for t, mine, least in zip(table, ours, oracle_, strict=True) if t > least]


def served(budget: str) -> Any:
    return sida_ext.from_pretrained(DEMO_MODEL, expert_memory=budget, dtype=torch.float32)


def rates(batches: list[dict[str, Any]], budget: str) -> dict[str, float]:
    """Seconds of a read, of computing one expert, and of what comes before an MoE layer, from traces of real runs."""
    warm = served("100%")
    for _ in sida_ext.stream(warm, batches):
        pass
    warm.sida.start_trace()
    begin = time.perf_counter()
    for _ in sida_ext.stream(warm, batches):
        pass
    seconds = time.perf_counter() - begin
    layers = len(warm.sida.header.layers)
    events = [event for event in warm.sida.take_trace() if event.kind == "compute"]
    spent = sum(event.end - event.begin for event in events) / 1e9
    experts = sum(layer.unique for layer in warm.sida.stats().layers) / 2  # of both passes
    warm.sida.close()
    cold = served(budget)
    cold.sida.start_trace()
    for _ in sida_ext.stream(cold, batches):
        pass
    reads = [(event.end - event.begin) / 1e9 for event in cold.sida.take_trace() if event.kind == "copy"]
    lanes = cold.sida.read_plan.lanes
    cold.sida.close()
    return {
        "read": statistics.median(reads),
        "read_mean": statistics.fmean(reads),
        "compute": spent / experts,
        "before": max(seconds - spent, 0) / (layers * len(batches)),
        "lanes": lanes,
    }


def measure(sizes: dict[int, tuple[int, int]], budget: str) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    whole = sida_ext.SwitchTransformersForSequenceClassification.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    whole = whole.eval()
    table, trained = load_predictor(PREDICTOR / "token_table", whole), load_predictor(PREDICTOR, whole)
    found: dict[str, Any] = {}
    for size, (sentences, rounds) in sizes.items():
        batches = batches_of(load_sentences("held_out")[:sentences], size, tokenizer)
        predictors = {"none": None, "token table": table, "hash predictor": trained, "oracle": oracle(whole, batches)}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
        for _ in range(rounds):
            for name in NAMES:
                model = served(budget)
                begin = time.perf_counter()
                for _ in sida_ext.stream(model, batches, predictors[name], drift=False):
                    pass
                seconds = time.perf_counter() - begin
                stats = model.sida.stats()
                rows[name].append(
                    {
                        "stalled": stats.stall_seconds,
                        "seconds": seconds,
                        "hit_rate": stats.hit_rate,
                        "late": stats.late,
                        "misses": stats.misses,
                        "read_mb": stats.bytes_read / 1e6,
                        "wasted": stats.wasted_prefetches,
                    }
                )
                model.sida.close()
        found[str(size)] = {"sentences": sentences, "rows": rows, "rates": rates(batches[:50], budget)}
        print(size, json.dumps(found[str(size)]["rates"]), flush=True)
    return found


def routings(model: Any, batches: list[dict[str, Any]], predictors: dict[str, Any]) -> dict[str, Routing]:
    """The true routing of the batches; by name, with what each predictor would have read ahead of them."""
    header = model.sida.header
    tables = oracle_tables(model, batches)
    used = []
    for batch in batches:
        index = tables.predict(batch["input_ids"]).expert_index
        layers = [index[:, :, layer].unique().tolist() for layer in range(index.shape[2])]
        used.append([(layer, [e for e in experts if e != NO_EXPERT]) for layer, experts in enumerate(layers)])
    plain = Routing(len(header.layers), header.num_experts, used, [])
    found = {"none": plain, "oracle": plain}
    for name, predictor in predictors.items():
        told = [predictor.predict(b["input_ids"], b["attention_mask"], top_k=CANDIDATES) for b in batches]
        for waste in WASTE:
            policy = PrefetchPolicy(waste)
            named = [[(layer, policy.experts(table, layer)) for layer in range(table.layers)] for table in told]
            found[f"{name} {waste:g}"] = Routing(plain.layers, plain.experts, used, named)
    return found


def virtual(known: dict[str, Any], share: float) -> dict[str, Any]:
    """By batch size: for each set of sentences and factor on the time of a read, the stall of every row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = served("100%")
    predictors = {
        "token table": load_predictor(PREDICTOR / "token_table", model),
        "hash predictor": load_predictor(PREDICTOR, model),
    }
    slots = round(share * model.sida.header.total_experts)
    order = torch.randperm(len(load_sentences("held_out")), generator=torch.Generator().manual_seed(0)).tolist()
    sentences = [load_sentences("held_out")[n] for n in order]
    found: dict[str, Any] = {}
    for size, count in SET_BATCHES.items():
        measured = known[str(size)]["rates"]
        part: dict[str, Any] = {}
        for number in range(SETS):
            first = number * count * size
            batches = batches_of(sentences[first : first + count * size], size, tokenizer)
            for name, routing in routings(model, batches, predictors).items():
                for factor in (0.5, 1.0, 2.0, 4.0):
                    clock = ModelledTime(
                        measured["read"] * factor, measured["before"], measured["compute"], int(measured["lanes"])
                    )
                    row = on_the_clock(routing, slots, clock, lookahead=0 if name == "none" else 4)
                    cell = part.setdefault(f"{factor:g}", {}).setdefault(name, [])
                    cell.append({"stalled": row.stalled, "seconds": row.seconds, "loads": row.loads})
        found[str(size)] = part
        print(f"batch {size} done", flush=True)
    model.sida.close()
    return found


def spread(values: list[float], form: str = "{:.0%}") -> str:
    if not values:
        return "no gap"
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def rendered(known: dict[str, Any], clock: dict[str, Any], budget: str) -> list[str]:
    lines = [
        f"The bundled model, {budget} of the experts, cold start. Gap closed: (stall with the token table - with the "
        "hash predictor) / (with the token table - with the oracle). Real runs: medians over rounds in which the "
        "rows take turns, the gap of each round, its median and range. Virtual clock: the engine's state machine at "
        f"the read and computing times measured in the same run, median and range over {SETS} disjoint sets of "
        "sentences.",
        "",
        "| batch | run | none | token table | hash predictor | oracle | gap closed | rounds or sets with a gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in known:
        rows = known[size]["rows"]
        stalls = {name: [run["stalled"] for run in runs] for name, runs in rows.items()}
        gaps = gaps_closed(*(stalls[name] for name in NAMES[1:]))
        cells = " | ".join(f"{1e3 * statistics.median(stalls[name]):.0f} ms" for name in NAMES)
        lines.append(f"| {size} | real | {cells} | {spread(gaps)} | {len(gaps)} of {len(stalls['oracle'])} |")
        for factor, named in clock[size].items():
            stalls = {name: [run["stalled"] for run in runs] for name, runs in named.items()}
            chosen = [stalls[name] for name in ("token table 1", "hash predictor 1", "oracle")]
            gaps = gaps_closed(*chosen)
            cells = " | ".join(
                f"{1e3 * statistics.median(stalls[name]):.0f} ms"
                for name in ("none", "token table 1", "hash predictor 1", "oracle")
            )
            what = "clock" if factor == "1" else f"clock, reads x {factor}"
            lines.append(f"| {size} | {what} | {cells} | {spread(gaps)} | {len(gaps)} of {SETS} |")
    lines += ["", "Stall on the clock over the cost of a wasted read (`waste_cost`), medians over the sets:", ""]
    lines += ["| batch | predictor | " + " | ".join(f"{w:g}" for w in WASTE) + " |", "|---|---|" + "---|" * len(WASTE)]
    for size in known:
        for name in NAMES[1:3]:
            cells = [
                f"{1e3 * statistics.median(run['stalled'] for run in clock[size]['1'][f'{name} {w:g}']):.0f} ms"
                for w in WASTE
            ]
            lines.append(f"| {size} | {name} | " + " | ".join(cells) + " |")
    words = [
        f"batch {size}: a read {1e6 * known[size]['rates']['read']:.0f} us on {known[size]['rates']['lanes']:.0f} "
        f"lanes, an expert {1e6 * known[size]['rates']['compute']:.0f} us, before a layer "
        f"{1e6 * known[size]['rates']['before']:.0f} us"
        for size in known
    ]
    return [*lines, "", f"Measured times: {'; '.join(words)}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="real runs and rates, kept for the virtual clock")
    parser.add_argument("--budget", type=int, default=25, help="per cent of all experts")
    parser.add_argument("--quick", action="store_true", help="one round of few sentences, nothing written")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    budget = f"{arguments.budget}%"
    if arguments.measure:
        found = measure({1: (8, 2), 4: (8, 2), 16: (32, 2)} if arguments.quick else SIZES, budget)
        if not arguments.quick:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        return
    known = json.loads(RESULTS.read_text())
    started = time.perf_counter()
    lines = rendered(known, virtual(known, arguments.budget / 100), budget)
    print("\n".join(lines))
    write(
        ROOT / "docs", {"Stall time: the gap between token table and oracle": lines}, {}, time.perf_counter() - started
    )


if __name__ == "__main__":
    main()
