"""What ``order="overlap"`` saves where prompts of two domains come mixed: ``python -m bench.causal.overlap``.

Held-out passages of literature and documentation in an order of chance, in batches by tokens, through
``stream_by_tokens`` at a quarter of the experts: bytes read in the order given and by overlap, which also forms the
batches. Predicted by the token table, by the hash predictor and by an oracle. Two counts: *counted* runs the routing
of the batches that were formed through the engine's state machine, with tables that are right and copies that take no
time, the same every time; *engine* is what a real run read, its reads ahead included.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from bench.causal.prompts import Replay, Routed, served
from examples.running_text import DOMAINS, load_documents, passages
from examples.train_demo_language_model import DEMO_LANGUAGE_MODEL
from examples.train_demo_language_predictor import DEMO_LANGUAGE_PREDICTOR
from sida_ext import _C
from sida_ext.prediction.protocol import load_predictor
from sida_ext.serving.savings import watch_order

SEED = 7


def mixed(tokenizer: Any, count: int, tokens: int) -> list[tuple[str, list[int]]]:
    """So many held-out passages, half of them of each domain, in an order of chance: domain and token ids."""
    draw = random.Random(SEED)
    found = []
    for domain in DOMAINS:
        texts = [passage.text for passage in passages(load_documents("held_out", domain), 6 * tokens)]
        for text in draw.sample(texts, count // 2):
            found.append((domain, tokenizer(text, truncation=True, max_length=tokens)["input_ids"]))
    draw.shuffle(found)
    return found


def distinct(model: Any, prompts: list[list[int]]) -> list[set[tuple[int, int]]]:
    """(MoE layer, expert) that each prompt alone uses."""
    used = []
    for ids in prompts:
        with Routed(model) as calls, torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        used.append({(layer, expert) for layer, index in enumerate(calls) for expert in index.unique().tolist()})
    return used


def apart(domains: list[str], used: list[set[tuple[int, int]]]) -> dict[str, float]:
    """The mean share in common of two prompts' experts (intersection over union), within a domain and across."""
    sums: dict[bool, list[float]] = {True: [], False: []}
    for first in range(len(used)):
        for second in range(first):
            both = len(used[first] & used[second]) / len(used[first] | used[second])
            sums[domains[first] == domains[second]].append(both)
    return {"within": sum(sums[True]) / len(sums[True]), "across": sum(sums[False]) / len(sums[False])}


class Alone:
    """An oracle for any batch of known prompts: each row's routing alone is its routing in a batch. Padding, which is
    routed too, is named nothing."""

    def __init__(self, model: Any, prompts: list[list[int]]) -> None:
        self.candidates = model.config.num_experts_per_tok
        self.rows: dict[tuple[int, ...], torch.Tensor] = {}
        for ids in prompts:
            table = Replay(model, [{"input_ids": torch.tensor([ids])}])
            self.rows[tuple(ids)] = table.predict(torch.tensor([ids])).expert_index[0]

    def predict(self, input_ids: Any, attention_mask: Any = None, top_k: int = 1) -> sida_ext.HashTable:
        found = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            row = self.rows[tuple(ids[mask.bool()].tolist())]
            found.append(torch.nn.functional.pad(row, (0, 0, 0, 0, 0, len(ids) - len(row)), value=-1))
        index = torch.stack(found)
        chance = (index >= 0).float()
        return sida_ext.HashTable(index, chance, chance)


def run(arguments: argparse.Namespace, prompts: list[list[int]], predictor: Any, order: str) -> dict[str, float]:
    model = served(arguments, arguments.budget)
    header = model.sida.header
    with watch_order(model) as watch:
        outputs = sida_ext.stream_by_tokens(
            model, prompts, predictor, order=order, max_tokens=arguments.max_tokens, window=arguments.window
        )
        for _ in outputs:
            pass
    wanted, loads, _ = _C.run_policy(
        len(header.layers), header.num_experts, watch.used, "next_use", model.sida.slots, 4, []
    )
    found = {
        "batches": len(watch.used),
        "wanted": wanted / len(watch.used),
        "counted_bytes": loads * header.record_bytes,
        "engine_bytes": model.sida.stats().bytes_read,
    }
    model.sida.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_LANGUAGE_MODEL)
    parser.add_argument("--predictor", type=Path, default=DEMO_LANGUAGE_PREDICTOR)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--count", type=int, default=256, help="prompts")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt at the most")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a batch")
    parser.add_argument("--window", type=int, default=256, help="prompts that are looked at together")
    parser.add_argument("--oracle-only", action="store_true", help="where no predictor was trained")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    arguments.delay = 0.0
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    named = mixed(tokenizer, arguments.count, arguments.tokens)
    prompts = [ids for _, ids in named]
    model = served(arguments, "100%")
    found: dict[str, Any] = {"in_common": apart([domain for domain, _ in named], distinct(model, prompts))}
    print(json.dumps(found), flush=True)
    predictors: dict[str, Any] = {"oracle": Alone(model, prompts)}
    if not arguments.oracle_only:
        predictors |= {
            "token table": load_predictor(arguments.predictor / "token_table", model),
            "hash predictor": load_predictor(arguments.predictor, model),
        }
    for name, predictor in predictors.items():
        rows = {order: run(arguments, prompts, predictor, order) for order in ("given", "overlap")}
        for count in ("counted", "engine"):
            before, after = (rows[order][f"{count}_bytes"] for order in ("given", "overlap"))
            rows[f"{count}_saved"] = 1 - after / before  # type: ignore[assignment]
        found[name] = rows
        print(name, json.dumps(rows), flush=True)
    model.sida.close()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
