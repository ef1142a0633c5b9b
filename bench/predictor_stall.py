"""Stall time with each predictor, and with an oracle, on the bundled model under a budget (needs the built extension).

    python bench/predictor_stall.py --budget 25% --sentences 200

Every row starts cold, from the same store. The oracle names exactly the experts that the router will choose, at no
cost; a predictor's row includes the time that it takes itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples")]

from corpus import MAX_TOKENS, load_sentences  # noqa: E402

import sida_ext  # noqa: E402
from sida_ext.hash_table import HashTable  # noqa: E402
from sida_ext.moe_facts import stack_facts  # noqa: E402
from sida_ext.predictor import load_predictor  # noqa: E402


class Likely:
    """Names, of another predictor's candidates, only those that are needed with some probability.

    A table for prefetching: not one for routing="predicted", which takes a token's candidates as they stand.
    """

    def __init__(self, predictor: Any, top_k: int, min_need: float) -> None:
        self.predictor, self.top_k, self.min_need = predictor, top_k, min_need

    def predict(self, input_ids: Any, attention_mask: Any = None, top_k: int = 1) -> HashTable:
        table = self.predictor.predict(input_ids, attention_mask, self.top_k)
        index = table.expert_index.clone()
        for layer in range(table.layers):
            kept = torch.tensor(table.experts_of(layer, self.min_need), dtype=index.dtype)
            index[:, :, layer][~torch.isin(index[:, :, layer], kept)] = -1
        absent = index < 0
        return HashTable(index, table.gate.masked_fill(absent, 0), table.probability.masked_fill(absent, 0))


class Replay:
    """Tables made beforehand, by the batch's token ids."""

    def __init__(self, tables: dict[bytes, HashTable]) -> None:
        self.tables = tables

    def predict(self, input_ids: Any, attention_mask: Any = None, top_k: int = 1) -> HashTable:
        return self.tables[input_ids.numpy().tobytes()]


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
    rows = {
        "none": None,
        "token table": load_predictor(arguments.predictor / "token_table", whole),
        "hash predictor, top 1": load_predictor(arguments.predictor, whole),
        "hash predictor, top 8, need >= 0.3": Likely(load_predictor(arguments.predictor, whole), 8, 0.3),
        "oracle": oracle(whole, batches),
    }
    print(f"{len(texts)} sentences, batches of {arguments.batch}, {tokens} tokens, {arguments.budget} of the experts")
    print("| predictor | stalled, s | hit rate | late | misses | bytes read | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for name, predictor in rows.items():
        model = sida_ext.from_pretrained(arguments.model, expert_memory=arguments.budget, dtype=torch.float32)
        start = time.perf_counter()
        for _ in sida_ext.stream(model, batches, predictor):
            pass
        seconds = time.perf_counter() - start
        stats = model.sida.stats()
        print(
            f"| {name} | {stats.stall_seconds:.3f} | {stats.hit_rate:.1%} | {stats.late} | {stats.misses} | "
            f"{stats.bytes_read / 1e6:.0f} MB | {tokens / seconds:.0f} |",
            flush=True,
        )
        model.sida.close()


if __name__ == "__main__":
    main()
