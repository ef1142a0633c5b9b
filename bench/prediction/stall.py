"""Stall time with each predictor, and with an oracle, on the bundled model under a budget (needs the built extension).

    python -m bench.prediction.stall --budget 25% --sentences 200

Every row starts cold, from the same store. The oracle names exactly the experts that the router will choose, at no
cost; a predictor's row includes the time that it takes itself.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from bench.prediction.quality import write
from examples.corpus import MAX_TOKENS, load_sentences
from sida_ext.models.families import moe_layers
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.prediction.protocol import load_predictor

ROOT = Path(__file__).resolve().parents[2]


class FirstChoices:
    """Another predictor's first choices without their probabilities: all of them are read ahead, and nothing else."""

    def __init__(self, predictor: Any) -> None:
        self.predictor = predictor

    def predict(self, input_ids: Any, attention_mask: Any = None, top_k: int = 1) -> HashTable:
        table = self.predictor.predict(input_ids, attention_mask)
        return HashTable(table.expert_index, table.gate)


class Replay:
    """Tables made beforehand, by the batch's token ids."""

    def __init__(self, tables: dict[bytes, HashTable]) -> None:
        self.tables = tables

    def predict(self, input_ids: Any, attention_mask: Any = None, top_k: int = 1) -> HashTable:
        return self.tables[input_ids.numpy().tobytes()]


def oracle_tables(model: Any, batches: list[dict[str, Any]]) -> Replay:
    """The true routing as tables, found by a pass beforehand through a model with swapped experts."""
    tables, routed = {}, []
    hooks = [
        layer.router.register_forward_hook(lambda _, args, output: routed.append(output[:2]))
        for layer in moe_layers(model).values()
        if layer.table_layer is not None
    ]
    with torch.inference_mode():
        for batch in batches:
            routed.clear()
            model(**batch)
            index, gate = (torch.stack(part, dim=2)[..., None].clone() for part in zip(*routed, strict=True))
            gate[index < 0] = 0  # over capacity: no expert is wanted
            tables[batch["input_ids"].numpy().tobytes()] = HashTable(index, gate)
    for hook in hooks:
        hook.remove()
    return Replay(tables)


@torch.no_grad()
def oracle(model: Any, batches: list[dict[str, Any]]) -> Replay:
    stack, tables = stack_facts(model).stack, {}
    for batch in batches:
        logits = stack(**batch, output_router_logits=True).router_logits
        gate, index = torch.stack(logits, dim=2).softmax(-1).topk(1)
        padding = (batch["attention_mask"] == 0)[:, :, None, None]
        tables[batch["input_ids"].numpy().tobytes()] = HashTable(
            index.masked_fill(padding, -1), gate.masked_fill(padding, 0)
        )
    return Replay(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "demo_model")
    parser.add_argument("--predictor", type=Path, default=ROOT / "examples" / "demo_predictor")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write the table into docs/predictor_figures.md")
    parser.add_argument("--rows", nargs="*", help="names of the rows to run; default: all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--waste", type=float, nargs="*", default=[2.0, 1.0, 0.4, 0.1], help="costs of a wasted read")
    parser.add_argument("--confidence", type=float, nargs="*", default=[0.9], help="thresholds of confident routing")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    texts = [s.text for s in load_sentences("held_out")][: arguments.sentences]
    batches = []
    for start in range(0, len(texts), arguments.batch):
        batch = tokenizer(
            texts[start : start + arguments.batch],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    whole = sida_ext.SwitchTransformersForSequenceClassification.from_pretrained(
        arguments.model, dtype=torch.float32
    ).eval()
    table = load_predictor(arguments.predictor / "token_table", whole)
    trained, certain = load_predictor(arguments.predictor, whole), oracle(whole, batches)
    # name -> predictor, what stream and from_pretrained are given beside it
    rows: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "none": (None, {}, {}),
        "token table, first choices": (FirstChoices(table), {}, {}),
        "token table": (table, {}, {}),
        "hash predictor, first choices": (FirstChoices(trained), {}, {}),
    }
    for waste in arguments.waste:
        rows[f"hash predictor, waste cost {waste:g}"] = (trained, {"waste_cost": waste}, {})
    for threshold in arguments.confidence:
        routing = {"routing": "confident", "confidence": threshold}
        rows[f"hash predictor, confident from {threshold:g}"] = (trained, {}, routing)
    rows["oracle"] = (certain, {}, {})
    if arguments.rows:
        rows = {name: row for name, row in rows.items() if name in arguments.rows}
    lines = [
        f"{len(texts)} sentences, batches of {arguments.batch}, {tokens} tokens, {arguments.budget} of the experts, "
        f"medians of {arguments.rounds} rounds",
        "",
        "| predictor | stalled, s | hit rate | late | misses | bytes read | read in vain | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found: dict[str, list[tuple[Any, float]]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, (predictor, streaming, loading) in rows.items():
            model = sida_ext.from_pretrained(
                arguments.model, expert_memory=arguments.budget, dtype=torch.float32, **loading
            )
            start = time.perf_counter()
            for _ in sida_ext.stream(model, batches, predictor, drift=False, **streaming):
                pass
            found[name].append((model.sida.stats(), time.perf_counter() - start))
            model.sida.close()
    for name, runs in found.items():
        runs.sort(key=lambda run: run[0].stall_seconds)
        stats, seconds = runs[len(runs) // 2]
        lines.append(
            f"| {name} | {stats.stall_seconds:.3f} | {stats.hit_rate:.1%} | {stats.late} | {stats.misses} | "
            f"{stats.bytes_read / 1e6:.0f} MB | {stats.wasted_prefetches} | {tokens / seconds:.0f} |"
        )
    print("\n".join(lines))
    if arguments.record:
        write(ROOT / "docs", {f"Stall time at batch {arguments.batch}": lines}, {}, 0.0)


if __name__ == "__main__":
    main()
