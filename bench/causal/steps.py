"""What learned steps are worth in decoding: ``python -m bench.causal.steps --predictor PREDICTOR``.

Held-out text of a decoder-only model, token by token, as if it were being written. First which share of the routers'
choices is among as many candidates by each way of knowing, and how far its probabilities can be trusted; then the same
tokens on the virtual clock of ``bench.causal.lookahead`` under the package's own guard: useful and wasted reads, stall
and time by budget and by the time that a read takes, the same every time. A step's prediction takes no time there, and
the first layer gains nothing, since the clock has no time between the token and that layer. ``--cost`` says what a
prediction takes, for the model's own shapes and for 16 layers of 128 experts. ``--engine`` writes with the engine
itself, with reads made slower by ``--delay``, all ways in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

import sida_ext
from bench.causal.lookahead import READS, Clock
from examples.train_demo_language_model import DEMO_LANGUAGE_MODEL
from examples.train_demo_language_predictor import DEMO_LANGUAGE_PREDICTOR, texts
from sida_ext import _C
from sida_ext.models.decoding import DecoderSteps
from sida_ext.prediction.learned_steps import DISTANCES, JOINED, KNOWLEDGE, LearnedSteps, needed
from sida_ext.prediction.lookahead_guard import GuardOptions, LookaheadGuard
from sida_ext.prediction.protocol import load_predictor
from sida_ext.prediction.router_lookahead import within_room
from sida_ext.prediction.token_table import TokenTablePredictor
from sida_ext.training.step_fit import StepTrace, judge_steps, trace_steps

WAYS = ("none", "lookahead", "steps", "joined", "oracle")
BUDGETS = (0.25, 0.5)

Likely = list[tuple[float, int]]  # probability and expert, the most likely first


@dataclass
class Step:
    """One token: what each layer wanted, and by way, layer and distance what was thought likely before."""

    wanted: list[list[int]]
    likely: dict[tuple[str, int, int], Likely]


def likely(odds: torch.Tensor) -> Likely:
    values = odds.sigmoid().tolist()
    return sorted(((value, expert) for expert, value in enumerate(values)), key=lambda pair: (-pair[0], pair[1]))


@torch.no_grad()
def steps_of(learned: LearnedSteps, trace: StepTrace, limit: int) -> list[Step]:
    found: list[Step] = []
    for ids, chosen, margins in zip(trace.sentences, trace.chosen, trace.margins, strict=True):
        state = learned.start(torch.zeros(1, 0, 0), None)
        for at in range(len(ids)):
            odds = learned.odds(state, ids[None, at : at + 1])[0]
            step = Step(chosen[at].tolist(), {})
            for layer in range(learned.layers):
                alone = likely(odds[layer])
                for distance in range(1, layer + 2):
                    step.likely["steps", layer, distance] = step.likely["joined", layer, distance] = alone
                    if (layer, distance) in margins:
                        margin = margins[layer, distance][at].float()
                        joined = learned.joined_odds(odds[layer], layer, distance, margin)
                        step.likely["joined", layer, distance] = likely(joined)
                        named = margin.topk(learned.choices).indices.tolist()
                        step.likely["lookahead", layer, distance] = [(1.0, expert) for expert in named]
            found.append(step)
            if len(found) == limit:
                return found
            state = learned.observe(state, chosen[None, at : at + 1])
    return found


def replay(steps: list[Step], way: str, slots: int, read: float) -> dict[str, float]:
    """A run on the clock; the guard's rests are those where a unit takes 2 ms."""
    layers = len(steps[0].wanted)
    clock = Clock(slots, read)
    guard = LookaheadGuard(DISTANCES if way == "lookahead" else layers, 1, GuardOptions(rest=5e3, longest_rest=15e4))
    before = (0, 0)
    for step in steps:
        for layer, wanted in enumerate(step.wanted):
            clock.ahead = []
            clock.demand(layer, wanted)
            level = {"none": 0, "oracle": layers}.get(way)
            if level is None:
                level = guard.observe(clock.now, clock.useful - before[0], clock.wasted - before[1], slowness=read)
                before = clock.useful, clock.wasted
            least = guard.options.least_share(read)
            source = []
            for later in range(layer + 1, min(layer + 1 + level, layers)):
                if way == "oracle":
                    source.append((later, step.wanted[later]))
                else:
                    known = step.likely.get((way, later, later - layer), [])
                    source.append((later, [expert for chance, expert in known if chance >= least]))
            kept = within_room(source, slots - len(wanted))
            clock.ahead = [(later, expert) for later, experts in kept for expert in experts]
            clock.compute(1.0, {(layer, expert) for expert in wanted})
    count = len(steps)
    return {
        "hit_rate": clock.hits / clock.wanted,
        "reads": clock.reads / count,
        "useful": clock.useful / count,
        "wasted": clock.wasted / count,
        "stall": clock.stalled / count,
        "time": clock.now / count,
        "level": float(guard.level),
    }


def on_the_clock(steps: list[Step], experts: int) -> list[dict[str, Any]]:
    rows = []
    for read in READS:
        for budget in BUDGETS:
            slots = round(budget * experts * len(steps[0].wanted))
            row: dict[str, Any] = {"read": read, "budget": budget}
            row |= {way: replay(steps, way, slots, read) for way in WAYS}
            rows.append(row)
            none = row["none"]
            ways = "; ".join(
                f"{way}: time {row[way]['time'] / none['time']:.3f} stall {row[way]['stall'] / none['stall']:.3f} "
                f"reads {row[way]['reads']:.2f} useful {row[way]['useful']:.2f} wasted {row[way]['wasted']:.2f}"
                for way in WAYS
            )
            print(f"read {read:g} budget {budget:.0%}: {ways}", flush=True)
    return rows


@torch.no_grad()
def cost(learned: LearnedSteps, repeats: int = 400) -> dict[str, float]:
    """Microseconds, medians: of a step's odds, of taking in what it chose, and of joining one layer's."""
    random = torch.Generator().manual_seed(0)
    steps, parts = DecoderSteps(), {"odds": [], "observe": [], "joined": []}  # type: ignore[var-annotated]
    for number in range(repeats):
        token = torch.randint(0, min(learned.table.vocabulary, 1000), (1, 1), generator=random)
        chosen = torch.rand(1, 1, learned.layers, learned.experts, generator=random).topk(learned.choices).indices
        margin = torch.randn(1, learned.experts, generator=random)
        begin = time.perf_counter()
        odds = steps.step(learned, token, None, None, number, ask=lambda p, state, ids: (p.odds(state, ids), state))
        middle = time.perf_counter()
        needed(learned.joined_odds(odds[:, -1], learned.layers - 1, 1, margin), 0.5)
        joined = time.perf_counter()
        steps.observe(chosen.short())
        end = time.perf_counter()
        for name, value in (("odds", middle - begin), ("joined", joined - middle), ("observe", end - joined)):
            parts[name].append(1e6 * value)
    found = {name: statistics.median(values[repeats // 4 :]) for name, values in parts.items()}
    return found | {"step": found["odds"] + found["observe"] + learned.layers * found["joined"]}


def sixteen_layers() -> LearnedSteps:
    """Of 16 layers of 128 experts, 8 of them chosen, with counts of 1,000 tokens."""
    table = TokenTablePredictor(50_000, 16, 128, "drawn", stack="causal", choices=8)
    random = torch.Generator().manual_seed(0)
    chosen = torch.rand(1000, 16, 128, generator=random).topk(8).indices
    table.update(torch.arange(1000), chosen, torch.full(chosen.shape, 0.125))
    return LearnedSteps(table, torch.full((16, KNOWLEDGE), 0.5), torch.full((16, DISTANCES, JOINED), 0.5))


@torch.no_grad()
def engine(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Greedy writing after held-out prompts, all ways in turn, in rounds."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    prompts = [tokenizer(text, return_tensors="pt").input_ids[:, :48] for text in texts("held_out", arguments.prompts)]
    rows = []
    delay = round(arguments.delay * 1000)
    for budget in BUDGETS:
        for number in range(arguments.rounds):
            for way in WAYS[:-1]:
                model = sida_ext.from_pretrained(
                    arguments.model, expert_memory=f"{budget:.0%}", expert_dtype="float32", dtype=torch.float32,
                    predictor=sida_ext.RouterLookahead() if way in ("lookahead", "joined") else None,
                    faults=_C.Faults(delay_us_min=delay, delay_us_max=delay) if delay else None,
                )  # fmt: skip
                with model.sida as runtime:
                    if way in ("steps", "joined"):
                        runtime.decoder_predictor = load_predictor(arguments.predictor, model).steps  # type: ignore[union-attr]
                    model.generate(prompts[0], max_new_tokens=8, do_sample=False)
                    runtime.reset_stats()
                    begin = time.perf_counter()
                    for ids in prompts:
                        model.generate(ids, min_new_tokens=arguments.steps, max_new_tokens=arguments.steps)
                    seconds = time.perf_counter() - begin
                    stats = runtime.stats()
                count = len(prompts) * arguments.steps
                row = {
                    "budget": budget, "round": number, "way": way, "ms_per_token": 1e3 * seconds / count,
                    "stall_ms": 1e3 * stats.stall_seconds / count, "hit_rate": stats.hit_rate,
                    "useful": stats.useful_prefetches / count, "wasted": stats.wasted_prefetches / count,
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def shown(judged: dict[str, Any]) -> None:
    for way, row in judged.items():
        if isinstance(row, dict):
            by_layer = ", ".join(f"{100 * share:.1f}" for share in row["among_k"])
            trust = f", ECE {row['ece']:.4f}" if "ece" in row else ""
            print(
                f"{way}: among k {row['mean_among_k']:.1%} (layers {row['layers'][0]} on: {by_layer}), among 2k "
                f"{row['mean_among_2k']:.1%}{trust}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_LANGUAGE_MODEL)
    parser.add_argument("--predictor", type=Path, default=DEMO_LANGUAGE_PREDICTOR)
    parser.add_argument("--texts", type=int, default=60, help="held-out passages, of some 350 tokens each")
    parser.add_argument("--steps", type=int, default=1500, help="tokens on the clock; with --engine, after each prompt")
    parser.add_argument("--prompts", type=int, default=6, help="with --engine")
    parser.add_argument("--delay", type=float, default=0.3, help="milliseconds by which --engine slows each read")
    parser.add_argument("--rounds", type=int, default=3, help="with --engine")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Any] = {}
    if arguments.engine:
        found["engine"] = engine(arguments)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        learned = load_predictor(arguments.predictor, model).steps  # type: ignore[union-attr]
        if learned is None:
            raise SystemExit(f"{arguments.predictor} has no learned steps; train it again with `sida train`")
        if arguments.cost:
            found["cost"] = {"model": cost(learned), "16 layers of 128": cost(sixteen_layers())}
            print(json.dumps(found["cost"], indent=1))
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
            rows = [
                tokenizer(text, return_tensors="pt").input_ids[0, :384] for text in texts("held_out", arguments.texts)
            ]
            part = SimpleNamespace(input_ids=torch.cat(rows), length=torch.tensor([len(row) for row in rows]))
            trace = trace_steps(model, lambda: iter([part]))  # type: ignore[arg-type, list-item]
            found["recall"] = judge_steps(learned, trace)
            shown(found["recall"])
            found["clock"] = on_the_clock(steps_of(learned, trace, arguments.steps), learned.experts)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
