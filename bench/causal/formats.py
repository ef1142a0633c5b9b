"""What few bits cost: perplexity of the bundled language model and held-out accuracy of the bundled classifier, with
the experts and every other large matrix in each type: ``python -m bench.causal.formats [--json OUT]``.

Everything else is float32. Bytes are of experts and large matrices together. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import sida_ext
from examples.corpus import load_sentences
from examples.running_text import DOMAINS, load_documents, token_stream
from examples.train_demo_language_model import negative_log_likelihood, windows
from examples.train_demo_model import accuracy, classify
from sida_ext.models.dense import DenseLinear, dense_linears

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Of the experts, of every other large matrix.
PAIRS = (
    ("float32", None),
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
    ("int4", None),
    ("int4", "int8"),
    ("int4", "int4"),
    ("mxfp4", "int4"),
)
WINDOW = 512


def load(name: str, experts: str, dense: str | None, cache: str) -> tuple[Any, int]:
    """A bundled model, and bytes of its experts and large matrices."""
    model = sida_ext.from_pretrained(
        EXAMPLES / name,
        expert_memory="100%",
        expert_dtype=experts,
        dense_dtype=dense,
        dtype=torch.float32,
        store_cache=cache,
    )
    stored = sum(module.matrix.bytes for module in model.modules() if isinstance(module, DenseLinear))
    layers = {path: module for path, module in model.named_modules() if path.endswith((".experts", ".mlp"))}
    stored += sum(module.weight.nbytes for module in dense_linears(model, layers)[0].values())
    return model, stored + model.sida.header.experts_bytes


def perplexity(model: Any, count: int) -> float:
    """Of held-out text of both domains, ``count`` windows of each."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_language_model")
    total, predicted = 0.0, 0
    for domain in DOMAINS:
        texts = [document.text for document in load_documents("held_out", domain)]
        rows = windows(token_stream(tokenizer, texts, count * WINDOW + 1), WINDOW)[:count]
        sums = negative_log_likelihood(model, rows)
        total, predicted = total + sums[0], predicted + sums[1]
    return math.exp(total / predicted)


def score(model: Any, count: int) -> float:
    """Accuracy on ``count`` held-out sentences."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_model")
    sentences = load_sentences("held_out", "movie")[:count]
    with torch.no_grad():
        return accuracy(classify(model, tokenizer, sentences), sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens, of each domain")
    parser.add_argument("--sentences", type=int, default=1563)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| experts | other large matrices | language model, MB | perplexity | | classifier, MB | accuracy |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for experts, dense in PAIRS:
            model, size = load("demo_language_model", experts, dense, cache)
            row: dict[str, Any] = {"experts": experts, "dense": dense, "language_bytes": size}
            row["perplexity"] = perplexity(model, arguments.windows)
            model.sida.close()
            model, row["classifier_bytes"] = load("demo_model", experts, dense, cache)
            row["accuracy"] = score(model, arguments.sentences)
            model.sida.close()
            rows.append(row)
            more = row["perplexity"] / rows[0]["perplexity"] - 1
            print(
                f"| {experts} | {dense or 'float32'} | {size / 1e6:.1f} | {row['perplexity']:.3f} | {more:+.2%} | "
                f"{row['classifier_bytes'] / 1e6:.1f} | {row['accuracy']:.1%} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
