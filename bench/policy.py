"""Eviction policies on routings of real models: ``python -m bench.policy``, a minute or two.

What each policy would read, run through the engine's own state machine, beside the least that is possible (OPT: Belady,
the whole future known). Nothing is timed: the same routing gives the same figures on every machine of one kind.
``known`` is a measure of what the tables can tell: Belady's rule inside the batches that are known ahead, and beyond
them each expert's frequency over the whole run, which nobody has before its end. It evicts at the last moment, so that
it could not overlap any read. The aim of 97 % is of OPT's hits, or of the hits of ``known`` where these are fewer.

  demo, perfect     the bundled model on its held-out sentences, one a batch; hash tables that know the true routing
  demo, predicted   the same, hash tables of the bundled predictor
  base-128, random  12 layers, d_model 768, 6 MoE layers of 128 experts, random weights, 1 x 32 random tokens a batch;
                    hash tables that know the true routing. d_ff is 16 instead of 3072: experts too small to matter for
                    memory, and the router's input keeps its width.
  base-128, text    the same model on the bundled sentences

``--record FILE`` writes the demo's routing as JSON for tests.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from corpus import DEMO_MODEL, MAX_TOKENS, load_sentences  # noqa: E402

import sida_ext  # noqa: E402
from sida_ext.plan import POLICIES, PlanRow, Routing, compare, record_routing  # noqa: E402
from sida_ext.predictor import load_predictor  # noqa: E402

SHARES = [percent / 100 for percent in range(10, 100, 10)]
LENGTH = 32


def sentence_batches(count: int) -> list[dict[str, Any]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    texts = [sentence.text for sentence in load_sentences("held_out", "movie")[:count]]
    return [dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)) for text in texts]


def demo_routing(sentences: int) -> Routing:
    """The bundled model's routing, with what the bundled predictor says of it."""
    model = sida_ext.from_pretrained(DEMO_MODEL, expert_memory="100%", dtype=torch.float32)
    try:
        return record_routing(model, sentence_batches(sentences), load_predictor(EXAMPLES / "demo_predictor", model))
    finally:
        model.sida.close()


def base_routing(batches: list[dict[str, Any]], experts: int = 128, d_ff: int = 16) -> Routing:
    """The routing of transformers' own encoder with Switch-base's shapes and random weights."""
    config = transformers.SwitchTransformersConfig(
        num_experts=experts, d_ff=d_ff, num_layers=12, num_sparse_encoder_layers=6
    )
    torch.manual_seed(0)
    model = transformers.SwitchTransformersEncoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(std=1.0 if "shared" in name else 0.03)
    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.router")]
    routed: list[tuple[int, list[int]]] = []

    def record(layer: int) -> Any:
        def hook(module: torch.nn.Module, given: Any, output: Any) -> None:
            logits = module.classifier(given[0].to(module.classifier.weight.dtype))
            routed.append((layer, logits.argmax(-1).unique().tolist()))

        return hook

    for layer, router in enumerate(routers):
        router.register_forward_hook(record(layer))
    used = []
    with torch.no_grad():
        for batch in batches:
            routed.clear()
            model(**batch)
            used.append(list(routed))
    return Routing(len(routers), experts, used, [])


def random_batches(count: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(2, 32000, (1, LENGTH), generator=random)} for _ in range(count)]


def known_hit_rate(routing: Routing, slots: int, lookahead: int) -> float:
    """Hit rate of eviction at the last moment by the next use inside ``lookahead`` batches after the one under way, and
    beyond them by the frequency over the whole run."""
    steps = [[(layer, index) for index in experts] for batch in routing.batches for layer, experts in batch]
    uses: dict[tuple[int, int], deque[int]] = {}
    for step, wanted in enumerate(steps):
        for expert in wanted:
            uses.setdefault(expert, deque()).append(step)
    frequency = {expert: len(times) for expert, times in uses.items()}
    resident: set[tuple[int, int]] = set()
    loads = 0
    for step, wanted in enumerate(steps):
        window = (step // routing.layers + lookahead + 1) * routing.layers
        for expert in wanted:
            uses[expert].popleft()

        def order(expert: tuple[int, int], window: int = window) -> tuple[int, int]:  # the last goes first
            times = uses[expert]
            return (0, times[0]) if times and times[0] < window else (1, -frequency[expert])

        missing = sorted((expert for expert in wanted if expert not in resident), key=order, reverse=True)
        loads += len(missing)
        for expert in missing:
            if len(resident) == slots:
                resident.remove(max(resident, key=order))
            resident.add(expert)
    return 1 - loads / sum(map(len, steps))


def judge(rows: list[PlanRow], known: list[float] | None) -> list[str]:
    """What the figures miss of what is promised; empty if nothing. ``known``: for perfect tables."""
    missed = []
    for i, row in enumerate(rows):
        rate = row.hit_rate
        if known is not None and rate["next_use"] < 0.97 * min(rate["opt"], known[i]):
            missed.append(f"{row.share:.0%}: {rate['next_use'] / rate['opt']:.1%} of OPT's hits")
        for other in ("lru", "lfu", "fifo"):
            if rate["next_use"] < rate[other]:
                missed.append(f"{row.share:.0%}: {rate['next_use']:.4f} is below {other}'s {rate[other]:.4f}")
        if rate["opt"] > rate["lru"] + 0.01 and rate["next_use"] <= rate["lru"]:
            missed.append(f"{row.share:.0%}: not above LRU where OPT is")
    return missed


def show(name: str, rows: list[PlanRow], known: list[float] | None) -> None:
    columns = ("opt", *POLICIES)
    print(f"\n{name}\n{'budget':>7} {'slots':>6} {' '.join(f'{c:>8}' for c in columns)}    known  share of OPT's hits")
    for i, row in enumerate(rows):
        rates = " ".join(f"{row.hit_rate[column]:8.4f}" for column in columns)
        opt = row.hit_rate["opt"]
        line = f"{row.share:7.0%} {row.slots:6d} {rates}"
        if known is None:
            print(f"{line}        -  {row.hit_rate['next_use'] / opt:.1%}")
        else:
            print(f"{line} {known[i]:8.4f}  {row.hit_rate['next_use'] / opt:.1%} (known {known[i] / opt:.1%})")
    for missed in judge(rows, known):
        print(f"  MISSED at {missed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=400, help="of the bundled corpus's held-out movie reviews")
    parser.add_argument("--batches", type=int, default=100, help="of the base-128 model")
    parser.add_argument("--lookahead", type=int, default=4, help="batches whose hash tables are known ahead")
    parser.add_argument("--record", type=Path, help="write the demo's routing here and do nothing else")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    demo = demo_routing(arguments.sentences)
    if arguments.record is not None:
        text = json.dumps(asdict(demo), separators=(",", ":"))
        arguments.record.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{arguments.record}: {len(demo.batches)} batches")
        return 0
    cases = [
        ("demo, perfect", replace(demo, predicted=[]), True),
        ("demo, predicted", demo, False),
        ("base-128, random", base_routing(random_batches(arguments.batches)), True),
        ("base-128, text", base_routing(sentence_batches(arguments.batches)), True),
    ]
    results, missed = {}, 0
    for name, routing, perfect in cases:
        rows = compare(routing, SHARES, arguments.lookahead)
        known = [known_hit_rate(routing, row.slots, arguments.lookahead) for row in rows] if perfect else None
        show(name, rows, known)
        missed += len(judge(rows, known))
        results[name] = {"rows": [asdict(row) for row in rows], "known": known}
    path = HERE / "results" / "policy.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{missed} missed; record: {path}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
