"""What eviction alone is worth to a decoder-only model: hit rates of each policy where no table names what comes next.

    python -m bench.causal.eviction [--json FILE]

Routing of the bundled language model: held-out passages of two domains as prompts of 256 and of 32 tokens, and tokens
written after them, sampled; and drawn routing, whose popular experts change every 60 steps, or never. The engine's own
Residency runs it (copies take no time), beside OPT, which knows the whole future.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import sida_ext
from examples.demo_language import DOMAINS, MODEL, WINDOW, passages
from examples.running_text import load_documents
from sida_ext.models.layers import swapped_layers
from sida_ext.planning.hit_rates import Routing, compare

SHARES = (0.1, 0.25, 0.5, 0.75)
PASSAGES, WRITTEN = 24, 96
DRAWN_LAYERS, DRAWN_EXPERTS, DRAWN_EACH, DRAWN_STEPS, DRIFT = 6, 64, 4, 400, 60

Batch = list[tuple[int, list[int]]]


def recorded() -> dict[str, list[Batch]]:
    """The routing of each kind of work, a batch for each forward."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    found: dict[str, list[Batch]] = {}
    torch.manual_seed(0)
    model: Any = sida_ext.from_pretrained(MODEL, expert_memory="100%", expert_dtype="float32", dtype=torch.float32)
    with model.sida:
        layers = swapped_layers(model)
        number = {layer.name: position for position, layer in enumerate(layers)}
        batches: list[Batch] = []

        def observe(name: str, expert_index: Tensor) -> None:
            if number[name] == 0:
                batches.append([])
            batches[-1].append((number[name], sorted(set(expert_index[expert_index >= 0].tolist()))))

        for layer in layers:
            layer.observer = observe
        texts = [
            tokenizer(passage.text, truncation=True, max_length=WINDOW)["input_ids"]
            for domain in DOMAINS
            for passage in passages(load_documents("held_out", domain), 4 * WINDOW)[:PASSAGES]
        ]
        with torch.no_grad():
            for text in texts:
                model(input_ids=torch.tensor([text]))
            found[f"prompts of up to {WINDOW}"] = batches[:]
            batches.clear()
            for text in texts:
                for begin in range(0, len(text) - 31, 32):
                    model(input_ids=torch.tensor([text[begin : begin + 32]]))
            found["prompts of 32"] = batches[:]
            batches.clear()
            for text in texts[::4]:
                model.generate(torch.tensor([text[:32]]), max_new_tokens=WRITTEN, do_sample=True, temperature=0.8)
            found["written tokens"] = batches[:]
    return found


def drawn(drift: int) -> list[Batch]:
    """Steps whose experts' popularity is Zipf's, in an order drawn anew every ``drift`` steps."""
    batches = []
    weights = [1 / (rank + 1) for rank in range(DRAWN_EXPERTS)]
    source = random.Random(0)
    for step in range(DRAWN_STEPS):
        batch = []
        for layer in range(DRAWN_LAYERS):
            order = list(range(DRAWN_EXPERTS))
            random.Random(step // drift * 100 + layer).shuffle(order)
            chosen: set[int] = set()
            while len(chosen) < DRAWN_EACH:
                chosen.add(order[source.choices(range(DRAWN_EXPERTS), weights)[0]])
            batch.append((layer, sorted(chosen)))
        batches.append(batch)
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    works = {name: (32, batches) for name, batches in recorded().items()}
    works["drawn, drifting"] = (DRAWN_EXPERTS, drawn(DRIFT))
    works["drawn, constant"] = (DRAWN_EXPERTS, drawn(DRAWN_STEPS))
    rows = []
    print("| routing | budget | OPT | next_use | LRU | LFU | FIFO |\n|---|---|---|---|---|---|---|")
    for name, (experts, batches) in works.items():
        for row in compare(Routing(len(batches[0]), experts, batches, []), SHARES, lookahead=0):
            rates = {policy: row.hit_rate[policy] for policy in ("opt", "next_use", "lru", "lfu", "fifo")}
            rows.append({"routing": name, "budget": row.share, **rates})
            print(f"| {name} | {row.share:.0%} | " + " | ".join(f"{rate:.4f}" for rate in rates.values()) + " |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
