"""The bundled classifier's part of the paper's tables: fidelity, sparsity, throughput by budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

import sida_ext
from bench.paper.base import PREDICTORS, memory_of, timed, touched
from bench.paper.predicted_language import Control
from bench.prediction.stall import oracle
from examples.corpus import DEMO_MODEL, MAX_TOKENS, Sentence, load_sentences
from sida_ext.prediction.protocol import load_predictor
from sida_ext.training.distill import tokenized_batches
from sida_ext.training.traces import collect_traces, join_traces

ROOT = Path(__file__).resolve().parents[2]


class Bundled:
    """The bundled model, its tokenizer and its predictors."""

    def __init__(self) -> None:
        self.whole = sida_ext.SwitchTransformersForSequenceClassification.from_pretrained(
            DEMO_MODEL, dtype=torch.float32
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
        folder = ROOT / "examples" / "demo_predictor"
        self.report = json.loads((folder / "report.json").read_text())
        self.hash, self.table = load_predictor(folder, self.whole), load_predictor(folder / "token_table", self.whole)
        self.sentences = load_sentences("held_out", "movie")

    def batches(self, sentences: list[Sentence], size: int) -> list[dict[str, Any]]:
        found = []
        for start in range(0, len(sentences), size):
            texts = [s.text for s in sentences[start : start + size]]
            batch = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            found.append({name: batch[name] for name in ("input_ids", "attention_mask")})
        return found

    def served(self, budget: str, **arguments: Any) -> Any:
        return sida_ext.from_pretrained(DEMO_MODEL, expert_memory=budget, dtype=torch.float32, **arguments)


def fidelity(bundled: Bundled, number: int) -> dict[str, Any]:
    """Accuracy with each routing on the first `number` held-out movie sentences, and two controls.

    The controls, experts chosen by chance and no experts at all, say how much of the accuracy hangs on the experts.
    """
    sentences = bundled.sentences[:number]
    label = torch.tensor([s.label for s in sentences])
    batches = bundled.batches(sentences, 16)

    def classes(predictor: Any, **arguments: Any) -> torch.Tensor:
        model = bundled.served("100%", **arguments)
        found = torch.cat([out.logits.argmax(-1) for out in sida_ext.stream(model, batches, predictor, drift=False)])
        model.sida.close()
        return found

    experts = bundled.whole.config.num_experts
    reference = classes(None)
    rows: dict[str, tuple[Any, str, float]] = {
        "predicted, token table": (bundled.table, "predicted", 0.0),
        "predicted, hash predictor": (bundled.hash, "predicted", 0.0),
        "confident from 0.9, hash predictor": (bundled.hash, "confident", 0.9),
        "experts by chance": (Control(bundled.hash, experts, 1.0), "predicted", 0.0),
        "no experts": (Control(bundled.hash, experts, 0.0), "predicted", 0.0),
    }
    found: dict[str, Any] = {"router": {"accuracy": (reference == label).float().mean().item(), "same": 1.0}}
    for name, (predictor, routing, confidence) in rows.items():
        chosen = classes(predictor, routing=routing, confidence=confidence)
        score, same = (chosen == label).float().mean().item(), (chosen == reference).float().mean().item()
        found[name] = {"accuracy": score, "same": same}
    return {"sentences": len(sentences), "rows": found}


def sparsity(bundled: Bundled, number: int, budgets: tuple[int, ...]) -> dict[str, Any]:
    """How much of the experts a sentence touches, by its length, and memory by budget."""
    texts = [s.text for s in bundled.sentences[:number]]
    trace = join_traces(list(collect_traces(bundled.whole, tokenized_batches(bundled.tokenizer, texts, MAX_TOKENS))))
    model = bundled.served("25%")
    memory = {str(budget): memory_of(model, budget) for budget in budgets}
    model.sida.close()
    return {"touched": touched(trace, bundled.whole.config.num_experts), "memory": memory}


def timings(bundled: Bundled, budgets: tuple[int, ...], sentences: int, rounds: int) -> dict[str, Any]:
    """Throughput and latency by budget and predictor, batch 1, from a cold start; the rounds are interleaved."""
    batches = bundled.batches(bundled.sentences[:sentences], 1)
    predictors = {
        "none": None,
        "token table": bundled.table,
        "hash predictor": bundled.hash,
        "oracle": oracle(bundled.whole, batches),
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for budget in budgets:
            for name in PREDICTORS:
                model = bundled.served(f"{budget}%")
                rows.setdefault(f"{budget} {name}", []).append(timed(model, batches, predictors[name], 0))
                model.sida.close()
    return {"rows": rows, "sentences": sentences, "warm_up": 0, "rounds": rounds}
