"""What predictors of prompts are worth on a decoder-only model: ``python -m bench.causal.prompts``.

Held-out passages in batches of 1, 4 and 16 through ``stream``, cold, a quarter of the experts in memory: no predictor,
the token table, the hash predictor and an oracle that names what the routers will choose. On the virtual clock the
engine's own state machine runs the recorded routing, the same every time, at the rates of ``--read``, ``--before`` and
``--compute`` (in milliseconds) or at those that ``--measure`` takes from traces of this machine. ``--engine`` runs the
engine itself, its reads made slower by ``--delay`` milliseconds, in rounds in which all rows take turns.

The gap closed is (stall without - with) / (stall without - with the oracle).

``--grid`` runs the clock over budgets from 10 to 90 % and disks of 0.2 to 4 GB/s, with the guard of ``stream``, and
says for each predictor the time beside that without one: the least, the most, and where; beside them one that is always
wrong (it names what the batch does not want), so that what the guard lets through is seen. What predicting takes is not
on the clock: it runs on a thread of its own. Each cell is the sum of four runs, which begin with different batches:
which one comes first decides where misses lie, and so the time without a predictor, by a few percent. Exit status 1
where one of them is slower than none by more than 2 %.

``--grid --engine`` runs the engine over four budgets and three disks, which are this one with reads made slower
(one lane): in rounds in which all rows take turns, on one model, the median of the rounds' ratios and between which it
lies at 95 % (all rounds, if fewer than six). Before them are runs that do not count, in which the guards learn what a
predictor takes. RouterLookahead is a row there, and so is a second run without a predictor: what it differs from the
first is noise. Exit status 1 there where one is slower by more than 2 % even at the lower end.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from examples.running_text import load_documents, passages
from examples.train_demo_language_model import DEMO_LANGUAGE_MODEL
from examples.train_demo_language_predictor import DEMO_LANGUAGE_PREDICTOR
from sida_ext import _C
from sida_ext.models.layers import swapped_layers
from sida_ext.planning.hit_rates import ModelledTime, Routing, on_the_clock, record_routing
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.lookahead_guard import GuardOptions
from sida_ext.prediction.protocol import load_predictor

WRONG = "always wrong"
NAMES = ("none", "token table", "hash predictor", "oracle")
BUDGETS = (0.1, 0.25, 0.5, 0.75, 0.9)
DISKS = (0.2, 0.5, 1.0, 2.0, 4.0)  # GB/s
ROTATIONS = 4
LEARNING = 5  # runs of the engine before those that count
REAL_BUDGETS, REAL_DISKS = (0.1, 0.25, 0.5, 0.9), (0.2, 0.5, 0.0)
LOOKAHEAD = "RouterLookahead"
CONTROL = "none again"
BATCHES = {1: 48, 4: 16, 16: 6}  # batch -> batches of a run


def batches_of(tokenizer: Any, size: int, count: int, tokens: int) -> list[dict[str, Any]]:
    """Batches of held-out passages of both domains in turn, each cut to at most ``tokens`` tokens."""
    found = passages(load_documents("held_out"), 6 * tokens)
    step = max(1, len(found) // (size * count))
    texts = [passage.text for passage in found[::step]][: size * count]
    given = []
    for start in range(0, len(texts) - size + 1, size):
        batch = tokenizer(
            texts[start : start + size], padding=True, truncation=True, max_length=tokens, return_tensors="pt"
        )
        given.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return given


class Replay:
    """Tables of the true routing, by the batch's token ids; found by a pass beforehand, at no cost."""

    def __init__(self, model: Any, batches: list[dict[str, Any]]) -> None:
        self.tables: dict[bytes, HashTable] = {}
        for batch in batches:
            # Padding is routed too, and its experts are read: here it counts as any token.
            with Routed(model) as calls, torch.no_grad():
                model(**batch)
            index = torch.stack(calls, dim=1).unflatten(0, tuple(batch["input_ids"].shape))
            chance = torch.ones(index.shape)
            self.tables[batch["input_ids"].numpy().tobytes()] = HashTable(index.int(), chance, chance)

    def predict(self, input_ids: Any, attention_mask: Any = None, top_k: int = 1) -> HashTable:
        return self.tables[input_ids.numpy().tobytes()]


class Routed:
    """The experts [tokens, choices] that each served layer is given, while the block runs."""

    def __init__(self, model: Any) -> None:
        self.layers, self.calls = swapped_layers(model), []

    def __enter__(self) -> list[torch.Tensor]:
        for layer in self.layers:
            layer.observer = lambda _, index: self.calls.append(index.long())
        return self.calls

    def __exit__(self, *exception: object) -> None:
        for layer in self.layers:
            layer.observer = None


def served(
    arguments: argparse.Namespace,
    budget: str,
    delay: float = 0.0,
    *,
    lanes: int | None = None,
    ahead: bool = False,
) -> Any:
    """The model, cold.

    Args:
        delay: milliseconds by which every read is made longer.
        ahead: its layers' routers are asked.
    """
    slow = round(delay * 1000)
    return sida_ext.from_pretrained(
        arguments.model,
        expert_memory=budget,
        expert_dtype="bfloat16",
        dtype=torch.float32,
        lanes=lanes,
        predictor=sida_ext.RouterLookahead() if ahead else None,
        read_ahead=False,
        faults=_C.Faults(delay_us_min=slow, delay_us_max=slow) if slow else None,
    )


def rates(arguments: argparse.Namespace, batches: list[dict[str, Any]]) -> ModelledTime:
    """Seconds of a read, of computing one expert and of what comes before an MoE layer, from traces of real runs."""
    model = served(arguments, "100%")
    for _ in sida_ext.stream(model, batches):
        pass
    model.sida.reset_stats()
    model.sida.start_trace()
    begin = time.perf_counter()
    for _ in sida_ext.stream(model, batches):
        pass
    seconds = time.perf_counter() - begin
    events = [event for event in model.sida.take_trace() if event.kind == "compute"]
    spent = sum(event.end - event.begin for event in events) / 1e9
    experts = sum(layer.unique for layer in model.sida.stats().layers)
    layers = len(model.sida.header.layers)
    model.sida.close()
    cold = served(arguments, arguments.budget, arguments.delay)
    cold.sida.start_trace()
    for _ in sida_ext.stream(cold, batches):
        pass
    reads = [(event.end - event.begin) / 1e9 for event in cold.sida.take_trace() if event.kind == "copy"]
    lanes = cold.sida.read_plan.lanes
    cold.sida.close()
    before = max(seconds - spent, 0.0) / (layers * len(batches))
    return ModelledTime(statistics.median(reads), before, spent / max(experts, 1), lanes)


def on_clock(
    arguments: argparse.Namespace, model: Any, batches: list[dict[str, Any]], predictors: dict[str, Any]
) -> dict[str, Any]:
    clock = ModelledTime(arguments.read / 1e3, arguments.before / 1e3, arguments.compute / 1e3, arguments.lanes)
    if arguments.measure:
        clock = rates(arguments, batches)
    slots = max(1, round(float(arguments.budget.rstrip("%")) / 100 * model.sida.header.total_experts))
    plain: Routing | None = None
    rows: dict[str, Any] = {}
    for name in NAMES:
        if name in ("none", "oracle"):
            routing = plain or record_routing(model, batches)
            plain = routing
        else:
            routing = record_routing(model, batches, predictors[name])
        row = on_the_clock(routing, slots, clock, lookahead=0 if name == "none" else 4)
        rows[name] = {"stall": row.stalled, "seconds": row.seconds, "reads": row.loads, "wasted": row.wasted_prefetches}
    return {"clock": vars(clock), "rows": rows}


def grid(
    arguments: argparse.Namespace, model: Any, batches: list[dict[str, Any]], predictors: dict[str, Any]
) -> list[dict[str, Any]]:
    """Seconds of each predictor over those without, by budget and disk."""
    header = model.sida.header
    plain = record_routing(model, batches)
    routings = {name: record_routing(model, batches, predictor) for name, predictor in predictors.items()}
    routings |= {"oracle": plain, WRONG: Routing(plain.layers, plain.experts, plain.batches, never_wanted(plain))}
    rows = []

    def runs(routing: Routing, slots: int, clock: ModelledTime, **options: Any) -> tuple[float, int, float]:
        """Seconds and reads of all rotations, and how much longer the longest is than the shortest."""
        found = [on_the_clock(rotated(routing, part), slots, clock, **options) for part in range(ROTATIONS)]
        seconds = [row.seconds for row in found]
        return sum(seconds), sum(row.loads for row in found), max(seconds) / min(seconds)

    for budget in BUDGETS:
        slots = max(1, round(budget * header.total_experts))
        for disk in DISKS:
            clock = ModelledTime(
                header.record_bytes / (disk * 1e9), arguments.before / 1e3, arguments.compute / 1e3, arguments.lanes
            )
            seconds, loads, spread = runs(plain, slots, clock, lookahead=0)
            row: dict[str, Any] = {"budget": budget, "disk": disk, "none": seconds, "none, spread": spread}
            for name, routing in routings.items():
                taken, read, _ = runs(routing, slots, clock, lookahead=4, guard=GuardOptions())
                row[name] = taken / seconds
                row[f"{name}, reads"] = read / max(loads, 1)
            rows.append(row)
    return rows


def rotated(routing: Routing, part: int) -> Routing:
    """The same batches, from another one on."""
    first = len(routing.batches) * part // ROTATIONS
    batches, predicted = (them[first:] + them[:first] for them in (routing.batches, routing.predicted))
    return Routing(routing.layers, routing.experts, batches, predicted)


def never_wanted(routing: Routing) -> list[list[tuple[int, list[int]]]]:
    """For each batch and layer as many experts as it wants, or as there are others, and none of these."""
    draw = random.Random(0)
    tables = []
    for batch in routing.batches:
        others = [(layer, sorted(set(range(routing.experts)) - set(experts))) for layer, experts in batch]
        tables.append(
            [
                (layer, draw.sample(free, min(len(free), len(wanted))))
                for (layer, free), (_, wanted) in zip(others, batch, strict=True)
            ]
        )
    return tables


def ends(rows: list[dict[str, Any]], names: Iterable[str]) -> str:
    said = []
    for name in names:
        least, most = (pick(rows, key=lambda row: row[name]) for pick in (min, max))
        said.append(
            f"{name} {least[name]:.3f} ({least['budget']:.0%}, {least['disk']:g} GB/s) to {most[name]:.3f} "
            f"({most['budget']:.0%}, {most['disk']:g} GB/s)"
        )
    return "; ".join(said)


def real_grid(
    arguments: argparse.Namespace, batches: list[dict[str, Any]], predictors: dict[str, Any]
) -> list[dict[str, Any]]:
    """Seconds of each predictor over those without, on the engine, by budget and disk (0: as it is)."""
    model = served(arguments, "50%", lanes=1)
    for _ in sida_ext.stream(model, batches):
        pass
    _, _, loads, own, _ = model.sida.pace()
    record = model.sida.header.record_bytes
    model.sida.close()
    draw = random.Random(0)
    rows = []
    for budget in REAL_BUDGETS:
        for disk in arguments.disks:
            delay = max(0.0, 1e3 * (record / (disk * 1e9) - own / loads)) if disk else 0.0
            ways = Ways(served(arguments, f"{budget:.0%}", delay, lanes=1, ahead=True), batches, predictors)
            names = ("none", CONTROL, *predictors)
            taken: dict[str, list[float]] = {name: [] for name in names}
            stalls: dict[str, list[float]] = {name: [] for name in names}
            read: dict[str, list[float]] = {name: [] for name in names}
            found = 0.0
            for turn in range(LEARNING + arguments.rounds):
                for name in draw.sample(names, len(names)):  # nobody is always the first
                    seconds, loads, lane, stall = ways.run(name)
                    if turn < LEARNING:
                        continue  # what the guards learn of a predictor they learn once
                    taken[name].append(seconds)
                    stalls[name].append(stall)
                    read[name].append(loads)
                    found = loads * record / max(lane, 1e-9) / 1e9
            worth = {name: state.stats() for name, state in ways.states.items() if state is not None}
            ways.model.sida.close()
            row: dict[str, Any] = {"budget": budget, "disk": disk, "GB/s": found}
            row["none"] = statistics.median(taken["none"])
            for name in (CONTROL, *predictors):
                ratios = sorted(one / none for one, none in zip(taken[name], taken["none"], strict=True))
                row[name] = statistics.median(ratios)
                row[f"{name}, least"], row[f"{name}, most"] = ratios[0], ratios[-1]
                row[f"{name}, low"], row[f"{name}, high"] = around_median(ratios)
                row[f"{name}, best"] = min(taken[name]) / min(taken["none"])
            row |= {f"{name}, stall": statistics.median(them) for name, them in stalls.items()}
            row |= {f"{name}, reads": statistics.median(them) for name, them in read.items()}
            row |= {f"{name}, worth": state.worth for name, state in worth.items()}
            rows.append(row)
            print(
                f"  {budget:.0%}, {row['GB/s']:.2f} GB/s: none {row['none']:.3f} s; "
                + "; ".join(
                    f"{name} {row[name]:.3f} ({row[name + ', low']:.3f} to {row[name + ', high']:.3f}; "
                    f"best {row[name + ', best']:.3f})"
                    for name in (CONTROL, *predictors)
                ),
                flush=True,
            )
    return rows


class Ways:
    """One model that runs the batches with each predictor, cold each time. One, since of two models in one process one
    is faster than the other by some percent for good.

    Args:
        model: whose layers' routers can be asked.
    """

    def __init__(self, model: Any, batches: list[dict[str, Any]], predictors: dict[str, Any]) -> None:
        self.model, self.batches, self.predictors = model, batches, predictors
        self.states: dict[str, Any] = {}  # what judges each predictor
        self._clocks: dict[str, OwnTime] = {}
        self._layers = swapped_layers(model)
        self._ahead = model.sida.ahead, [layer.ahead for layer in self._layers]

    def run(self, name: str) -> tuple[float, int, float, float]:
        """Seconds, reads, seconds of the lane, seconds of stalls."""
        sida = self.model.sida
        asked = self._ahead if name == LOOKAHEAD else (None, [None] * len(self._layers))
        sida.ahead = asked[0]
        for layer, ahead in zip(self._layers, asked[1], strict=True):
            layer.ahead = ahead
        sida.announcing = self.states.get(name)
        clock = self._clocks.setdefault(name, OwnTime())
        clock.go_on()
        if sida.announcing is not None:
            sida.announcing._now = clock
        if sida.ahead is not None:
            sida.ahead.now = clock
        slots, record = sida.slots, sida.header.record_bytes
        sida.set_budget(record)  # nothing is in memory but one expert
        sida.set_budget(slots * record)
        sida.reset_stats()
        begin = time.perf_counter()
        for _ in sida_ext.stream(self.model, self.batches, self.predictors.get(name), drift=False):
            pass
        seconds = time.perf_counter() - begin
        clock.pause()
        self.states[name] = sida.announcing
        _, _, loads, lane, stall = sida.pace()
        return seconds, loads, lane, stall


class OwnTime:
    """Seconds that pass while a way runs: rests are not over sooner for the time that others take."""

    def __init__(self) -> None:
        self._left_out, self._paused = 0.0, time.monotonic()

    def go_on(self) -> None:
        self._left_out += time.monotonic() - self._paused

    def pause(self) -> None:
        self._paused = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._left_out


def around_median(ordered: list[float]) -> tuple[float, float]:
    """Between which the median of what was drawn from lies for 95 % of all draws, whatever the distribution."""
    count = len(ordered)
    outside = 0
    while outside + 1 <= count // 2 and below(count, outside + 1) <= 0.025:
        outside += 1
    return ordered[max(outside - 1, 0)], ordered[count - max(outside, 1)]


def below(count: int, most: int) -> float:
    """Probability of fewer than ``most`` of ``count`` throws of a coin."""
    return sum(math.comb(count, hits) for hits in range(most)) / 2**count


def for_real(
    arguments: argparse.Namespace, batches: list[dict[str, Any]], predictors: dict[str, Any]
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for _ in range(arguments.rounds):
        for name in NAMES:
            model = served(arguments, arguments.budget, arguments.delay)
            begin = time.perf_counter()
            for _ in sida_ext.stream(model, batches, predictors.get(name), drift=False):
                pass
            seconds = time.perf_counter() - begin
            stats = model.sida.stats()
            runs[name].append(
                {"stall": stats.stall_seconds, "seconds": seconds, "reads": sum(layer.loads for layer in stats.layers)}
            )
            model.sida.close()
    rows = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    return {"delay_ms": arguments.delay, "rounds": arguments.rounds, "rows": rows}


def shown(what: str, size: int, rows: dict[str, dict[str, float]]) -> str:
    gap = rows["none"]["stall"] - rows["oracle"]["stall"]
    cells = []
    for name in NAMES:
        row = rows[name]
        closed = (rows["none"]["stall"] - row["stall"]) / gap if gap > 0 else float("nan")
        reads = row["reads"] / max(rows["oracle"]["reads"], 1)
        cells.append(
            f"{name}: stall {1e3 * row['stall']:.0f} ms, gap closed {closed:.0%}, reads {reads:.2f} of the oracle's"
        )
    return f"{what} batch {size}: " + "; ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_LANGUAGE_MODEL)
    parser.add_argument("--predictor", type=Path, default=DEMO_LANGUAGE_PREDICTOR)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt at the most")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--quick", action="store_true", help="a third of the batches")
    parser.add_argument("--read", type=float, default=0.2, help="of the clock: ms to read an expert")
    parser.add_argument("--before", type=float, default=0.5, help="of the clock: ms before each MoE layer")
    parser.add_argument("--compute", type=float, default=0.05, help="of the clock: ms of one expert")
    parser.add_argument("--lanes", type=int, default=1, help="of the clock")
    parser.add_argument("--measure", action="store_true", help="take the clock's rates from this machine")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disks", type=float, nargs="+", default=REAL_DISKS, help="of the engine's grid: GB/s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = served(arguments, "100%")
    predictors: dict[str, Any] = {
        "token table": load_predictor(arguments.predictor / "token_table", model),
        "hash predictor": load_predictor(arguments.predictor, model),
    }
    found: dict[str, Any] = {}
    slower = 0
    for size in arguments.batches:
        count = BATCHES.get(size, 8)
        batches = batches_of(tokenizer, size, max(2, count // 3) if arguments.quick else count, arguments.tokens)
        if arguments.grid:
            if arguments.engine:
                rows = real_grid(arguments, batches, predictors | {"oracle": Replay(model, batches), LOOKAHEAD: None})
                names = (*NAMES[1:], LOOKAHEAD, CONTROL)
            else:
                rows = grid(arguments, model, batches, predictors)
                names = (*NAMES[1:], WRONG)
            found[str(size)] = rows
            print(f"grid batch {size}: {ends(rows, names)}", flush=True)
            slower += sum(row.get(f"{name}, low", row[name]) > 1.02 for row in rows for name in names)
            continue
        if arguments.engine:
            given = predictors | {"oracle": Replay(model, batches)}
            found[str(size)] = for_real(arguments, batches, given)
        else:
            found[str(size)] = on_clock(arguments, model, batches, predictors)
        print(shown("engine" if arguments.engine else "clock", size, found[str(size)]["rows"]), flush=True)
    model.sida.close()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if slower:
        raise SystemExit(f"{slower} settings are slower than no predictor by more than 2 %")


if __name__ == "__main__":
    main()
