"""Measures any Predictor against the true router, layer by layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sida_ext.prediction.calibration import Reliability
from sida_ext.prediction.moe_facts import predicted_stack, stack_facts
from sida_ext.training.traces import Trace

if TYPE_CHECKING:
    from sida_ext.prediction.protocol import Predictor


@dataclass
class Evaluation:
    """Hits of a predictor over traces, summed over batches.

    Attributes:
        tokens: tokens seen.
        top1, top3: [layers] float64, tokens whose first choice was the first, or among the first three candidates. Of a
            router that makes several choices: tokens whose first candidate was one of them, and as before.
        among_k, among_2k: [layers] float64, choices among as many candidates as there are choices, and twice as many.
        choices: of the router for each token and layer.
        reliability: of each layer's first candidate; with several choices of all 2k candidates.
        gate_error: [layers] float64, summed |predicted - true gate| where the first candidate was right.
    """

    tokens: int
    top1: Tensor
    top3: Tensor
    gate_error: Tensor
    among_k: Tensor
    among_2k: Tensor
    choices: int = 1
    reliability: list[Reliability] = field(default_factory=list)

    @classmethod
    def empty(cls, layers: int, choices: int = 1) -> Evaluation:
        top1, top3, gate_error, among_k, among_2k = torch.zeros(5, layers, dtype=torch.float64)
        reliability = [Reliability.empty() for _ in range(layers)]
        return cls(0, top1, top3, gate_error, among_k, among_2k, choices, reliability)

    def summary(self) -> dict[str, Any]:
        """Shares for each layer and their means, ready for JSON."""
        seen = max(self.tokens, 1)
        coverage = {
            name: (part / seen / self.choices)
            for name, part in (("among_k", self.among_k), ("among_2k", self.among_2k))
        }
        return {
            "tokens": self.tokens,
            "choices": self.choices,
            **{name: part.tolist() for name, part in coverage.items()},
            **{f"mean_{name}": float(part.mean()) for name, part in coverage.items()},
            "top1": (self.top1 / seen).tolist(),
            "top3": (self.top3 / seen).tolist(),
            "ece": [layer.ece for layer in self.reliability],
            "gate_error": (self.gate_error / self.top1.clamp(min=1)).tolist(),
            "mean_top1": float(self.top1.mean() / seen),
            "mean_top3": float(self.top3.mean() / seen),
            "mean_ece": statistics.fmean(layer.ece for layer in self.reliability),
            "reliability": [layer.curve() for layer in self.reliability],
        }


def evaluate(predictor: Predictor, traces: Iterable[Trace], batch_sentences: int = 64) -> Evaluation:
    """Run ``predictor.predict`` over traced sentences and count where the router agrees.

    Args:
        predictor: any Predictor of the traced stack.
        traces: what ``collect_traces`` gave, or a TraceStore's shards.
        batch_sentences: sentences in a call.

    Raises:
        ValueError: the predictor's table does not fit the traces, or there is no sentence.
    """
    result: Evaluation | None = None
    for trace in traces:
        layers = trace.gate.shape[1]
        if result is None:
            result = Evaluation.empty(layers, trace.chosen.shape[-1])
        for rows in torch.arange(trace.rows).split(batch_sentences):
            _judge(result, predictor, trace.select(rows))
    if result is None or result.tokens == 0:
        raise ValueError("there is no traced sentence to evaluate on")
    return result


def _judge(result: Evaluation, predictor: Predictor, part: Trace) -> None:
    """Add what the predictor says of some traced sentences."""
    layers, choices = part.gate.shape[1], result.choices
    input_ids, mask = part.padded()
    # A model of one or two experts has no third candidate, and its traces keep none.
    most = part.candidates.shape[-1] if choices == 1 else getattr(predictor, "experts", choices)
    table = part.table_of(predictor, min(max(3, 2 * choices), most))
    # Traces do not say how many experts there are.
    experts = 2**15 if table.padding_need is None else table.padding_need.shape[1]
    table.check_for(input_ids, layers, experts)
    candidates, wanted = table.expert_index[mask].long(), part.top1
    chance = table.chance[mask]
    first = (candidates[..., :1] == part.chosen).any(-1)
    named = (candidates.unsqueeze(-1) == part.chosen.unsqueeze(-2)).any(-1)
    result.tokens += wanted.shape[0]
    result.top1 += first.sum(0)
    result.top3 += (candidates[..., :3] == wanted[..., None]).any(-1).sum(0)
    result.among_k += named[..., :choices].sum((0, 2))
    result.among_2k += named[..., : 2 * choices].sum((0, 2))
    result.gate_error += ((table.gate[mask][..., 0] - part.gate).abs() * first).sum(0)
    judged = 1 if choices == 1 else candidates.shape[-1]
    for layer, bins in enumerate(result.reliability):
        bins.add(chance[:, layer, :judged].flatten(), named[:, layer, :judged].flatten())


@torch.no_grad()
def cost_share(
    predictor: Predictor, model: nn.Module, shapes: Iterable[tuple[int, int]] = ((1, 32), (8, 32)), repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Milliseconds of one prediction and of one forward of the stack, medians, and their ratio, by batch shape."""
    facts = stack_facts(model, predicted_stack(model))
    generator = torch.Generator().manual_seed(0)
    found = {}
    for rows, columns in shapes:
        input_ids = torch.randint(0, facts.embedding.shape[0], (rows, columns), generator=generator)

        def median_ms(call: Any) -> float:
            times = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times[1:])

        ours = median_ms(lambda ids=input_ids: predictor.predict(ids))
        whole = median_ms(lambda ids=input_ids: facts.stack(input_ids=ids.to(facts.embedding.device)))
        found[f"{rows}x{columns}"] = {"predictor_ms": ours, "model_ms": whole, "share": ours / whole}
    return found
