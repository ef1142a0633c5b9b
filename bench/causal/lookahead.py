"""What RouterLookahead knows of the next layers, and what that is worth: ``python -m bench.causal.lookahead``.

Recall by layer and distance on greedy decoding and on prompts, with everything in memory; then the recorded routing on
a virtual clock, with and without reading ahead and with an oracle, by budget and by the time that a read takes: hit
rate, bytes and stall, the same every time. ``--engine`` runs the engine itself, with reads made slower by ``--delay``:
its times are an indication alone where the machine is not idle. ``--tiny FAMILY`` takes a tiny random model instead of
the bundled one.

The clock's unit is what one MoE layer and the attention before it compute. One reader reads an expert after the other,
what is demanded before what is announced; what was announced for latest or not at all goes first, then what was used
least often, as the engine's ``next_use``. The guard is the package's own, on the clock's time, with its
rests as they are where a unit takes 2 ms.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from bench.causal.tiny_families import tiny_model
from sida_ext import _C
from sida_ext.models.layers import swapped_layers
from sida_ext.models.router_lookahead import LayerAhead
from sida_ext.models.seam import SeamFamily
from sida_ext.prediction.cache_names import cache_argument, cache_of
from sida_ext.prediction.lookahead_guard import GuardOptions, LookaheadGuard
from sida_ext.prediction.router_asking import find_routers
from sida_ext.prediction.router_lookahead import most_wanted, within_room

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "demo_language_model"
BUDGETS = (0.1, 0.25, 0.4, 0.6, 0.9)
READS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the clock's unit

Key = tuple[int, int]  # layer, expert


@dataclass
class Forward:
    """One forward's routing: experts by layer, and named[layer][distance] of those before it; most wanted first."""

    wanted: list[list[int]] = field(default_factory=list)
    named: list[dict[int, list[int]]] = field(default_factory=list)


def load(arguments: argparse.Namespace, **options: Any) -> Any:
    options = {"expert_dtype": "float32", "expert_memory": "100%", **options}
    if arguments.tiny:
        _, model = tiny_model(arguments.tiny, num_hidden_layers=arguments.layers)
        return sida_ext.swap_experts(model.float(), **options)
    return sida_ext.from_pretrained(arguments.model, dtype=torch.float32, **options)


def prompts(arguments: argparse.Namespace, vocabulary: int) -> list[torch.Tensor]:
    """Held-out passages for the bundled model, random tokens for a random one."""
    random = torch.Generator().manual_seed(1)
    if arguments.tiny:
        shape = (1, arguments.prompt)
        return [torch.randint(3, vocabulary, shape, generator=random) for _ in range(arguments.prompts)]
    from examples.running_text import load_documents

    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    texts = [document.text for document in load_documents("held_out")]
    step = max(1, len(texts) // arguments.prompts)
    rows = (tokenizer(text, return_tensors="pt").input_ids[:, : arguments.prompt] for text in texts[::step])
    return [row for row in rows if row.shape[1] == arguments.prompt][: arguments.prompts]


class Recorder:
    """Asks all routers ahead at every layer and keeps what they say, and what the layers then want."""

    def __init__(self, model: Any, depth: int) -> None:
        self.experts = model.sida.header.num_experts
        order, self.routers, obstacles = find_routers(model, SeamFamily.layers(model))
        if obstacles:
            raise SystemExit(f"routers that are not asked: {obstacles}")
        self.names, self.depth = list(dict.fromkeys(order)), depth
        self.forward = Forward()
        self._hidden: Any = None
        paths = {id(module): path for path, module in SeamFamily.layers(model).items()}
        self.position = {layer.name: self.names.index(paths[id(layer)]) for layer in swapped_layers(model)}
        for name in self.names:
            self.routers[name].reads.register_forward_pre_hook(lambda module, given: self._keep(given[0]))
        for layer in swapped_layers(model):
            layer.observer = self.saw

    def _keep(self, hidden: torch.Tensor) -> None:
        self._hidden = hidden

    def saw(self, name: str, index: torch.Tensor) -> None:
        at = self.position[name]
        if at == 0:
            self.forward = Forward(named=[{} for _ in self.names])
        self.forward.wanted.append(most_wanted(index, None, self.experts))
        plain = self.routers[self.names[at]].norm is None
        for distance, later in enumerate(self.names[at + 1 : at + 1 + self.depth], 1):
            named = most_wanted(*self.routers[later].ask(self._hidden, plain), self.experts)
            self.forward.named[at + distance][distance] = named


@torch.no_grad()
def record(model: Any, texts: list[torch.Tensor], steps: int, depth: int) -> tuple[list[Forward], list[Forward]]:
    """(forwards of the prompts, forwards of the greedy steps)."""
    recorder = Recorder(model, depth)
    prefill, decode = [], []
    for ids in texts:
        output = model(input_ids=ids, use_cache=True)
        prefill.append(recorder.forward)
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, use_cache=True, **{cache_argument(model): cache_of(output)})
            decode.append(recorder.forward)
    return prefill, decode


def recall(forwards: list[Forward]) -> dict[str, dict[str, float]]:
    """distance -> layer (and "all") -> share of wanted experts that were named; "precision" of all beside it."""
    sums: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for forward in forwards:
        for layer, (wanted, by_distance) in enumerate(zip(forward.wanted, forward.named, strict=True)):
            for distance, named in by_distance.items():
                both = len(set(wanted) & set(named))
                for key, total in ((str(layer), wanted), ("all", wanted), ("precision", named)):
                    sums[distance][key][0] += both
                    sums[distance][key][1] += len(total)
    return {str(d): {key: a / max(b, 1) for key, (a, b) in rows.items()} for d, rows in sorted(sums.items())}


class Clock:
    """Slots, one reader, and time that is counted."""

    def __init__(self, slots: int, read: float) -> None:
        self.slots, self.read = slots, read
        self.now = self.reader = self.stalled = 0.0
        self.there: dict[Key, float] = {}  # in a slot: when its read ends
        self.uses: dict[Key, int] = defaultdict(int)
        self.latest: dict[Key, float] = {}
        self.unused: set[Key] = set()  # read ahead and not wanted since
        self.ahead: list[Key] = []  # in the order of their use
        self.reads = self.hits = self.wanted = self.useful = self.wasted = 0

    def _start(self, expert: Key, begin: float, kept: set[Key], ahead: bool) -> bool:
        if len(self.there) >= self.slots:
            free = [e for e, ready in self.there.items() if e not in kept and ready <= begin]
            if not free:
                return False
            time_of = {e: at for at, e in enumerate(self.ahead)}
            far = len(self.ahead)
            victim = max(free, key=lambda e: (time_of.get(e, far), -self.uses[e], -self.latest.get(e, 0.0), e))
            if ahead and victim in time_of and time_of[victim] <= time_of[expert]:
                return False
            del self.there[victim]
            self.wasted += victim in self.unused
            self.unused.discard(victim)
        self.reader = begin + self.read
        self.there[expert], self.latest[expert] = self.reader, self.reader
        self.reads += 1
        if ahead:
            self.unused.add(expert)
        return True

    def demand(self, layer: int, experts: list[int]) -> None:
        """The layer waits until all its experts were there; with few slots it runs in waves."""
        begun, pinned = self.now, set()
        for key in [(layer, expert) for expert in experts]:
            self.wanted += 1
            self.hits += self.there.get(key, float("inf")) <= begun
            self.useful += key in self.unused
            self.unused.discard(key)
        keys = {(layer, expert) for expert in experts}
        for key in sorted(keys, key=lambda k: self.there.get(k, float("inf"))):
            if key not in self.there:
                begin = max(self.reader, self.now)
                if not self._start(key, begin, keys & set(self.there), False) and not self._start(
                    key, max(begin, *self.there.values()), set(), False
                ):
                    raise ValueError("no slot can be emptied")
            self.now = max(self.now, self.there[key])
            pinned.add(key)
        self.stalled += self.now - begun
        for key in keys:
            self.uses[key], self.latest[key] = self.uses[key] + 1, self.now

    def compute(self, duration: float, pinned: set[Key]) -> None:
        until = self.now + duration
        for key in self.ahead:
            begin = max(self.reader, self.now)
            if begin >= until:
                break
            if key not in self.there and not self._start(key, begin, pinned, True):
                break
        self.now = until


def replay(forwards: list[Forward], way: str, slots: int, read: float, depth: int) -> dict[str, float]:
    """A run on the clock. way: "none", "lookahead" (guarded), "unguarded" or "oracle"."""
    clock = Clock(slots, read)
    guard = LookaheadGuard(depth, 1, GuardOptions(rest=5000.0, longest_rest=150_000.0))
    before = (0, 0)
    for forward in forwards:
        for layer, wanted in enumerate(forward.wanted):
            clock.ahead = []
            clock.demand(layer, wanted)
            level = 0 if way == "none" else depth
            if way == "lookahead":
                level = guard.observe(clock.now, clock.useful - before[0], clock.wasted - before[1], slowness=read)
                before = clock.useful, clock.wasted
            following = range(layer + 1, min(layer + 1 + level, len(forward.wanted)))
            source = [
                (later, forward.wanted[later] if way == "oracle" else forward.named[later][later - layer])
                for later in following
            ]
            kept = within_room(source, slots - len(wanted))
            clock.ahead = [(later, expert) for later, experts in kept for expert in experts]
            clock.compute(1.0, {(layer, expert) for expert in wanted})
    steps = len(forwards)
    return {
        "hit_rate": clock.hits / clock.wanted,
        "reads_per_step": clock.reads / steps,
        "stall_per_step": clock.stalled / steps,
        "time_per_step": clock.now / steps,
        "useful": clock.useful / steps,
        "wasted": clock.wasted / steps,
        "level": float(guard.level),
    }


def on_the_clock(decode: list[Forward], experts: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    total = experts * len(decode[0].wanted)
    rows = []
    for read in READS:
        for budget in BUDGETS:
            slots = max(len(decode[0].wanted[0]) + 1, round(budget * total))
            row: dict[str, Any] = {"read": read, "budget": budget, "slots": slots}
            for way in ("none", "lookahead", "unguarded", "oracle"):
                row[way] = replay(decode, way, slots, read, arguments.depth)
            rows.append(row)
            none = row["none"]["time_per_step"]
            ways = ", ".join(
                f"{way}: hits {row[way]['hit_rate']:.1%} reads {row[way]['reads_per_step']:.2f} "
                f"time {row[way]['time_per_step'] / none:.3f}"
                for way in ("none", "lookahead", "unguarded", "oracle")
            )
            print(f"read {read:g} budget {budget:.0%}: {ways}", flush=True)
    return rows


class Timed:
    """Seconds in which layers asked and announced."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before = LayerAhead.before
        watch = self

        def before(layer: LayerAhead, expert_index: torch.Tensor) -> None:
            begin = time.perf_counter()
            watch._before(layer, expert_index)
            watch.seconds += time.perf_counter() - begin

        LayerAhead.before = before  # type: ignore[method-assign]

    def stop(self) -> None:
        LayerAhead.before = self._before  # type: ignore[method-assign]


@torch.no_grad()
def engine(texts: list[torch.Tensor], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Real decoding, with and without, on the same prompts."""
    rows = []
    delay = round(arguments.delay * 1000)
    for budget in arguments.budgets:
        for way in ("none", "lookahead"):
            model = load(
                arguments,
                expert_memory=f"{100 * budget:g}%",
                predictor=sida_ext.RouterLookahead(arguments.depth) if way == "lookahead" else None,
                faults=_C.Faults(delay_us_min=delay, delay_us_max=delay),
            )
            timed, seconds, steps = Timed(), 0.0, 0
            with model.sida as runtime:
                for ids in texts:
                    output = model(input_ids=ids, use_cache=True)
                    if steps == 0:
                        runtime.reset_stats()
                        timed.seconds = 0.0
                    for _ in range(arguments.steps):
                        begin = time.perf_counter()
                        token = output.logits[:, -1:].argmax(-1)
                        output = model(input_ids=token, use_cache=True, **{cache_argument(model): cache_of(output)})
                        seconds, steps = seconds + time.perf_counter() - begin, steps + 1
                stats = runtime.stats()
            timed.stop()
            row = {
                "budget": budget,
                "way": way,
                "delay_ms": arguments.delay,
                "steps": steps,
                "ms_per_step": 1e3 * seconds / steps,
                "stall_ms_per_step": 1e3 * stats.stall_seconds / steps,
                "hit_rate": stats.hit_rate,
                "late": stats.late / max(stats.unique, 1),
                "kib_read_per_step": stats.bytes_read / 1024 / steps,
                "asking_ms_per_step": 1e3 * timed.seconds / steps,
                "asking_share": timed.seconds / seconds,
            }
            if stats.lookahead is not None:
                ahead = stats.lookahead
                row |= {"level": ahead.level, "state": ahead.state, "recall": ahead.recall}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tiny", help="a family of bench/causal/tiny_families.py instead, with random weights")
    parser.add_argument("--layers", type=int, default=6, help="of --tiny")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=48, help="tokens")
    parser.add_argument("--steps", type=int, default=32, help="greedy steps after each prompt")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="with --engine")
    parser.add_argument("--delay", type=float, default=0.3, help="milliseconds by which --engine slows each read")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to add the results to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = load(arguments)
    experts = model.sida.header.num_experts
    texts = prompts(arguments, model.config.get_text_config().vocab_size)
    found: dict[str, Any] = {"model": arguments.tiny or arguments.model.name, "machine": platform.machine()}
    if arguments.engine:
        model.sida.close()
        found["engine"] = engine(texts, arguments)
    else:
        with model.sida:
            prefill, decode = record(model, texts, arguments.steps, arguments.depth)
        found |= {"steps": len(decode), "decode": recall(decode), "prompts": recall(prefill)}
        for part in ("decode", "prompts"):
            for distance, row in found[part].items():
                print(part, "distance", distance, " ".join(f"{key}: {share:.1%}" for key, share in row.items()))
        found["clock"] = on_the_clock(decode, experts, arguments)
    if arguments.out is not None:
        known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
        arguments.out.write_text(json.dumps([*known, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
