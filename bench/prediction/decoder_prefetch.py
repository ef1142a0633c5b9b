"""What a decoder's predictor gains in generate(): coverage of its candidates, and stall time under a memory budget.

    python -m bench.prediction.decoder_prefetch                            # coverage and the virtual clock: the same
    every time
    python -m bench.prediction.decoder_prefetch --engine --sentences 6     # the engine itself, on an idle machine

The virtual clock replays recorded generations: the decoder computes for a fixed time before each MoE layer, one reader
reads experts one after the other, what is demanded before what is read ahead, and the least recently used expert that
this step has not announced goes first. Its unit is the time of computing from one MoE layer to the next. The engine's
rows are real runs in which every read is made to take `--delay` milliseconds longer.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from examples.train_demo_decoder_predictor import damaged_pairs
from examples.train_demo_denoiser import DEMO_DENOISER
from sida_ext import _C
from sida_ext.models.switch import SparseMLP
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.protocol import load_predictor

ROOT = Path(__file__).resolve().parents[2]

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
NEEDS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
READS = (0.5, 1.0, 3.0)  # time of a read in units of the computation between two MoE layers

Step = list[list[int]]  # for each MoE layer of the decoder: experts


@dataclass
class Generation:
    """One call of generate: which experts each step needed and, by predictor, its table of that step."""

    needed: list[Step] = field(default_factory=list)
    tables: dict[str, list[HashTable]] = field(default_factory=dict)


class Listening:
    """Several predictors at once, none of which is acted on: a DecoderPredictor that keeps all their tables."""

    def __init__(self, predictors: dict[str, Any]) -> None:
        self.predictors, self.generation = predictors, Generation()

    def start(self, encoder_output: Any, attention_mask: Any) -> dict[str, Any]:
        return {name: p.start(encoder_output, attention_mask) for name, p in self.predictors.items()}

    def step(self, state: dict[str, Any], input_ids: Any) -> tuple[HashTable, dict[str, Any]]:
        after = {}
        for name, predictor in self.predictors.items():
            table, after[name] = predictor.step(state[name], input_ids)
            self.generation.tables.setdefault(name, []).append(table)
        return table, after

    def reorder(self, state: dict[str, Any], index: Any) -> dict[str, Any]:
        return {name: p.reorder(state[name], index) for name, p in self.predictors.items()}


class Replay:
    """The oracle: names, step by step, exactly what recorded generations needed."""

    def __init__(self, generations: list[Generation]) -> None:
        self.generations = iter(generations)

    def start(self, encoder_output: Any, attention_mask: Any) -> tuple[Generation, int]:
        return next(self.generations), 0

    def step(self, state: tuple[Generation, int], input_ids: Any) -> tuple[HashTable, tuple[Generation, int]]:
        generation, number = state
        layers = generation.needed[number]
        width = max(map(len, layers))
        # All experts of the step on its first row, as one token's candidates.
        index = torch.full((input_ids.shape[0], 1, len(layers), width), -1)
        for layer, experts in enumerate(layers):
            index[0, 0, layer, : len(experts)] = torch.tensor(experts)
        return HashTable(index, (index >= 0).float()), (generation, number + 1)

    def reorder(self, state: Any, index: Any) -> Any:
        return state


def sources(tokenizer: Any, sentences: int, rows: int) -> list[dict[str, Any]]:
    """The first `sentences` held-out sentences, damaged, in batches of `rows`."""
    pairs = damaged_pairs(tokenizer, "held_out")[:sentences]
    batches = []
    for start in range(0, len(pairs), rows):
        part = [source for source, _ in pairs[start : start + rows]]
        width = max(map(len, part))
        ids = torch.tensor([[*row, *([0] * (width - len(row)))] for row in part])
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return batches


def generate(model: Any, batch: dict[str, Any], beams: int = 1) -> Any:
    return model.generate(**batch, max_new_tokens=48, num_beams=beams, do_sample=False)


def decoder_layers(model: Any) -> list[SparseMLP]:
    return [m for m in model.decoder.modules() if isinstance(m, SparseMLP)]


def record(model: Any, batches: list[dict[str, Any]], predictors: dict[str, Any], beams: int) -> list[Generation]:
    """Generates with everything in memory and records each step."""
    listening, layers = Listening(predictors), decoder_layers(model)
    routed: list[list[int]] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        chosen = output[0].unique()
        routed.append(chosen[chosen >= 0].tolist())

    hooks = [layer.router.register_forward_hook(hook) for layer in layers]
    model.sida.decoder_predictor = listening
    found = []
    for batch in batches:
        listening.generation = Generation()
        routed.clear()
        generate(model, batch, beams)
        listening.generation.needed = [routed[i : i + len(layers)] for i in range(0, len(routed), len(layers))]
        found.append(listening.generation)
    for handle in hooks:
        handle.remove()
    model.sida.decoder_predictor = None
    return found


def coverage(generations: list[Generation], name: str, min_need: float) -> tuple[float, float]:
    """Shares: of needed experts that were named, and of named experts that were not needed."""
    needed = named = both = 0
    for generation in generations:
        for step, table in zip(generation.needed, generation.tables[name], strict=True):
            for layer, experts in enumerate(step):
                given = set(table.experts_of(layer, min_need))
                needed, named, both = needed + len(experts), named + len(given), both + len(given & set(experts))
    return both / needed, 1 - both / max(named, 1)


def top_hits(generations: list[Generation], name: str, k: int) -> float:
    """Batches of one row: share of tokens and layers whose expert is among the first k candidates."""
    hits = [
        bool(set(table.expert_index[0, 0, layer, :k].tolist()) & set(experts))
        for generation in generations
        for step, table in zip(generation.needed, generation.tables[name], strict=True)
        for layer, experts in enumerate(step)
    ]
    return sum(hits) / len(hits)


class Clock:
    """One reader, one slot for each expert that the budget holds, and time that is counted, not measured."""

    def __init__(self, slots: int, read: float) -> None:
        self.slots, self.read = slots, read
        self.now = self.reader = self.stalled = 0.0
        self.ready: dict[tuple[int, int], float] = {}  # resident or under way: when it is there
        self.used: dict[tuple[int, int], float] = {}
        self.ahead: list[tuple[int, int]] = []  # announced and not passed, most urgent first
        self.reads = 0

    def _start(self, expert: tuple[int, int], begin: float, kept: set[tuple[int, int]]) -> bool:
        if len(self.ready) >= self.slots:
            free = [e for e, at in self.ready.items() if e not in kept and at <= begin]
            if not free:
                return False
            victim = min(free, key=lambda e: (self.used.get(e, -1.0), e))
            del self.ready[victim]
        self.reader = begin + self.read
        self.ready[expert] = self.reader
        self.reads += 1
        return True

    def compute(self, duration: float) -> None:
        """The decoder computes; the reader reads ahead."""
        until = self.now + duration
        for expert in [e for e in self.ahead if e not in self.ready]:
            begin = max(self.reader, self.now)
            if begin >= until or not self._start(expert, begin, set(self.ahead)):
                break
        self.now = until

    def demand(self, layer: int, experts: list[int]) -> None:
        """The layer needs its experts: whatever is not there is waited for."""
        wanted = {(layer, e) for e in experts}
        self.ahead = [e for e in self.ahead if e[0] > layer]
        begun = self.now
        for expert in sorted(wanted):
            if expert not in self.ready:
                begin = max(self.reader, self.now)
                if not self._start(expert, begin, wanted | set(self.ahead)) and not self._start(expert, begin, wanted):
                    raise ValueError(f"{self.slots} slots do not hold the {len(wanted)} experts of one layer")
        self.now = max([self.now, *(self.ready[e] for e in wanted)])
        self.stalled += self.now - begun
        for expert in wanted:
            self.used[expert] = self.now


def on_the_clock(
    generations: list[Generation], name: str | None, slots: int, read: float, min_need: float
) -> dict[str, float]:
    """Stall time (in units of computation between MoE layers) and reads of a run; None: nothing is announced."""
    clock, steps = Clock(slots, read), 0
    for generation in generations:
        for number, step in enumerate(generation.needed):
            steps += 1
            if name == "oracle":
                clock.ahead = [(layer, e) for layer, experts in enumerate(step) for e in experts]
            elif name is not None:
                table = generation.tables[name][number]
                clock.ahead = [(layer, e) for layer in range(table.layers) for e in table.experts_of(layer, min_need)]
            for layer, experts in enumerate(step):
                clock.compute(1.0)
                clock.demand(layer, experts)
    return {"stall_per_step": clock.stalled / steps, "reads_per_step": clock.reads / steps, "steps": steps}


def virtual(arguments: argparse.Namespace, predictors: dict[str, Any]) -> dict[str, Any]:
    model = sida_ext.from_pretrained(arguments.model, expert_memory="100%", expert_dtype="float32", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    total = model.sida.header.num_experts * len(decoder_layers(model))
    found: dict[str, Any] = {"decoder_experts": total}
    for rows, beams in ((1, 1), (4, 1), (1, 4)):
        generations = record(model, sources(tokenizer, arguments.sentences, rows), predictors, beams)
        part: dict[str, Any] = {"steps": sum(len(g.needed) for g in generations), "coverage": {}, "stall": []}
        for name in predictors:
            part["coverage"][name] = {
                str(need): dict(zip(("covered", "wasted"), coverage(generations, name, need), strict=True))
                for need in NEEDS
            }
            if rows == beams == 1:
                part.setdefault("top", {})[name] = {str(k): top_hits(generations, name, k) for k in (1, 3)}
        for read in READS:
            for budget in BUDGETS:
                slots = max(rows * beams + 1, round(total * budget))
                row: dict[str, Any] = {"budget": budget, "slots": slots, "read": read}
                row["none (LRU)"] = on_the_clock(generations, None, slots, read, 0)
                for name, predictor in predictors.items():
                    row[name] = on_the_clock(generations, name, slots, read, predictor.min_need)
                row["oracle"] = on_the_clock(generations, "oracle", slots, read, 0)
                part["stall"].append(row)
        found[f"{rows} rows, {beams} beams"] = part
    model.sida.close()
    return found


def engine(arguments: argparse.Namespace, predictors: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Real runs: stall time of the decoder's layers by budget and predictor."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    batches = sources(tokenizer, arguments.sentences, 1)
    options = {"expert_dtype": "float32", "dtype": torch.float32}
    whole = sida_ext.from_pretrained(arguments.model, expert_memory="100%", **options)
    generations = record(whole, batches, predictors, 1)
    whole.sida.close()
    steps = sum(len(g.needed) for g in generations)
    delay = round(arguments.delay * 1000)
    runs: list[tuple[str, str, Any]] = [("none", "next_use", None), ("none (LRU)", "lru", None)]
    runs += [(name, "next_use", predictor) for name, predictor in predictors.items()]
    for budget in arguments.budgets:
        for name, eviction, predictor in [*runs, ("oracle", "next_use", Replay(generations))]:
            model = sida_ext.from_pretrained(
                arguments.model,
                expert_memory=f"{100 * budget:g}%",
                eviction=eviction,
                faults=_C.Faults(delay_us_min=delay, delay_us_max=delay),
                predictor=predictor,
                **options,
            )
            names = {layer.name for layer in decoder_layers(model)}
            begin = time.perf_counter()
            for batch in batches:
                generate(model, batch)
            seconds = time.perf_counter() - begin
            layers = [layer for layer in model.sida.stats().layers if layer.name in names]
            yield {
                "budget": budget,
                "predictor": name,
                "steps": steps,
                "delay_ms": arguments.delay,
                "stall_ms_per_step": 1e3 * sum(layer.stall_seconds for layer in layers) / steps,
                "ms_per_step": 1e3 * seconds / steps,
                **{key: sum(getattr(layer, key) for layer in layers) for key in ("unique", "hits", "late", "misses")},
            }
            model.sida.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_DENOISER)
    parser.add_argument("--predictor", type=Path, default=DEMO_DENOISER / "decoder_predictor")
    parser.add_argument("--sentences", type=int, default=60)
    parser.add_argument("--engine", action="store_true", help="real runs instead of the virtual clock")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="with --engine")
    parser.add_argument("--delay", type=float, default=1.5, help="milliseconds by which --engine slows each read")
    parser.add_argument("--min-need", type=float, default=None, help="least need; default: the predictors' own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file; with --engine its rows are added to those there"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plain = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        arguments.model, dtype=torch.float32
    ).eval()
    predictors: dict[str, Any] = {
        "token table": load_predictor(arguments.predictor / "token_table", plain),
        "recurrent": load_predictor(arguments.predictor, plain),
    }
    if arguments.min_need is not None:
        for predictor in predictors.values():
            predictor.min_need = arguments.min_need
    found: dict[str, Any] = {}
    if arguments.out is not None and arguments.out.is_file():
        found = json.loads(arguments.out.read_text())
    if arguments.engine:
        rows = found.setdefault("engine", {"machine": platform.processor() or platform.machine(), "rows": []})["rows"]
        for row in engine(arguments, predictors):
            print(json.dumps(row), flush=True)
            rows.append(row)
    else:
        found["virtual"] = {"sentences": arguments.sentences, **virtual(arguments, predictors)}
        print(json.dumps(found["virtual"], indent=1))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
