"""How a model does when its predictor routes: the curve of routing="confident" over its threshold, for the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import StackFacts, stack_facts
from sida_ext.training.traces import Trace

if TYPE_CHECKING:
    from sida_ext.prediction.protocol import Predictor

THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.97, 2.0)


@contextmanager
def confident_routers(facts: StackFacts) -> Iterator[dict[str, Any]]:
    """Inside the block the stack's routers follow a table where it is sure, plain or with swapped experts.

    Yields:
        A dict to set before each forward: ``table`` (None: the routers decide) and ``threshold``; afterwards
        ``chosen`` [layers] lists [B, S] integer tensors of what was computed, -1: no expert.
    """
    state: dict[str, Any] = {"table": None, "threshold": 2.0, "chosen": []}

    def replaced(layer: int, router: nn.Module) -> Any:
        original = router.forward

        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            index, gate, logits = original(hidden)
            table: HashTable | None = state["table"]
            if table is None:
                return index, gate, logits
            sure = table.chance[:, :, layer, 0] >= state["threshold"]
            named, factor = table.expert_index[:, :, layer, 0], table.gate[:, :, layer, 0]
            if index.dim() == 2:  # sida_ext's router: experts
                index = torch.where(sure, named.to(index.dtype), index)
                state["chosen"].append(index)
                return index, torch.where(sure, factor, gate), logits
            # transformers' router: one-hot experts, gate with a last dimension of 1
            one_hot = F.one_hot(named.long().clamp(min=0), logits.shape[-1]) * (named >= 0)[..., None]
            index = torch.where(sure[..., None], one_hot.to(index.dtype), index)
            state["chosen"].append(torch.where(index.any(-1), index.argmax(-1), -1))
            return index, torch.where(sure, factor, gate[..., 0])[..., None].to(gate.dtype), logits

        return forward

    routers: list[Any] = list(facts.routers)
    try:
        for layer, router in enumerate(routers):
            router.forward = replaced(layer, router)
        yield state
    finally:
        for router in routers:
            router.__dict__.pop("forward", None)


@torch.no_grad()
def routing_curve(
    predictor: Predictor,
    model: nn.Module,
    traces: Iterable[Trace],
    sentences: int = 48,
    thresholds: tuple[float, ...] = THRESHOLDS,
) -> list[dict[str, float]]:
    """What routing="confident" changes and saves at each threshold, sentence by sentence as batches of one.

    Args:
        predictor: a Predictor of the model's encoder.
        model: plain or with swapped experts.
        traces: of held-out text; the first ``sentences`` sentences are run.
        thresholds: probabilities from which the table decides; 0 is routing="predicted", above 1 the router, which the
            last must be.

    Returns:
        For each threshold:
        - threshold
        - by_table: share of the tokens' choices that the table made.
        - output_error: |difference| / |router's| of the encoder's last hidden states, Frobenius norms.
        - same_class: share of sentences with the class that the router gives; only where the model is a classifier.
        - demanded: experts that a sentence wanted and no first choice named, which the computation has to wait for.
        - transfers_saved: the share of the router's such transfers that this threshold avoids.
    """
    if not thresholds or not thresholds[-1] > 1:
        raise ValueError(f"thresholds are {thresholds}, expected the last to be above 1: the router, to compare with")
    facts = stack_facts(model)
    whole: Any = model
    classifies = isinstance(getattr(model, "classifier", None), nn.Module)
    was_training = model.training
    model.train(False)
    totals = [dict.fromkeys(("tokens", "by_table", "error", "norm", "same", "demanded"), 0.0) for _ in thresholds]
    count = 0
    try:
        with confident_routers(facts) as state:
            for trace in traces:
                for row in range(min(trace.rows, sentences - count)):
                    input_ids, mask = trace.select(torch.tensor([row])).padded()
                    device = facts.embedding.device
                    arguments = {"input_ids": input_ids.to(device), "attention_mask": mask.long().to(device)}
                    state["table"] = table = predictor.predict(arguments["input_ids"], arguments["attention_mask"])
                    named = [set(experts) for experts in table.experts_by_layer()]
                    probability = table.chance[..., 0]
                    outputs = []
                    for threshold, total in zip(thresholds, totals, strict=True):
                        state["threshold"], state["chosen"] = threshold, []
                        if classifies:
                            output = whole(**arguments, output_hidden_states=True)
                            hidden = output.hidden_states[-1]
                        else:
                            output = facts.stack(**arguments)
                            hidden = output.last_hidden_state
                        outputs.append((hidden.float(), int(output.logits.argmax()) if classifies else 0))
                        total["tokens"] += probability.numel()
                        total["by_table"] += int((probability >= threshold).sum())
                        total["demanded"] += sum(
                            len(set(chosen.unique().tolist()) - {-1} - names)
                            for chosen, names in zip(state["chosen"], named, strict=True)
                        )
                    state["table"] = None  # the next trace may come from this very model
                    true = outputs[-1]
                    for (hidden, label), total in zip(outputs, totals, strict=True):
                        total["error"] += float((hidden - true[0]).square().sum())
                        total["norm"] += float(true[0].square().sum())
                        total["same"] += label == true[1]
                    count += 1
                if count >= sentences:
                    break
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("there is no traced sentence to route")
    curve = []
    for threshold, total in zip(thresholds, totals, strict=True):
        base = totals[-1]["demanded"]
        point = {
            "threshold": threshold,
            "by_table": total["by_table"] / total["tokens"],
            "output_error": (total["error"] / total["norm"]) ** 0.5,
            "demanded": total["demanded"] / count,
            "transfers_saved": 1 - total["demanded"] / base if base else 0.0,
        }
        if classifies:
            point["same_class"] = total["same"] / count
        curve.append(point)
    return curve
