"""Learned steps: what a token table, the experts of the tokens before and the routers asked ahead are worth beside one
another, fitted by logistic regressions on text that none of them was counted on; and what that comes to on other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.prediction.calibration import Reliability, fit_mixture
from sida_ext.prediction.learned_steps import DISTANCES, JOINED, KNOWLEDGE, LearnedSteps
from sida_ext.prediction.moe_facts import experts_of_seam, stack_facts
from sida_ext.prediction.router_asking import AskedRouter, find_routers
from sida_ext.prediction.token_table import TokenTablePredictor
from sida_ext.progress import log
from sida_ext.training.traces import Trace

__all__ = ["StepTrace", "fit_steps", "judge_steps", "trace_steps"]

TOKENS = 20_000  # read at the most
NUMBERS = 4_000_000  # tokens x layers x experts that are held at the most


@dataclass
class StepTrace:
    """A text token by token: what each wanted, and what the routers said ahead.

    Attributes:
        sentences: token ids [n] of each.
        chosen: [n, layers, choices] int16 of each.
        margins: (layer, distance) -> [n, experts] float16 of each, where a router was asked so many layers before.
    """

    sentences: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    margins: list[dict[tuple[int, int], Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sentences)


class _Watch:
    """Stands at a model's experts and before its routers for one forward after the other."""

    def __init__(self, model: nn.Module, experts: int) -> None:
        self.modules = experts_of_seam(model)
        self.experts = experts
        self.routers: dict[str, AskedRouter] = {}
        try:
            self.routers = find_routers(model, self.modules)[1]  # type: ignore[arg-type]
        except ValueError as error:
            log.info("steps are learned without their routers: %s", error)
        self.names = list(self.modules)
        self.calls: list[Tensor] = []
        self.margins: dict[tuple[int, int], Tensor] = {}
        self._hidden: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        for at, (name, module) in enumerate(self.modules.items()):
            self._hooks.append(module.register_forward_pre_hook(lambda _, given, at=at: self._ran(at, given[1])))
            if name in self.routers:
                reads = self.routers[name].reads
                self._hooks.append(reads.register_forward_pre_hook(lambda _, given: self._keep(given[0])))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def _ran(self, at: int, index: Tensor) -> None:
        self.calls.append(index.detach().cpu().to(torch.int16))
        hidden, self._hidden = self._hidden, None
        if hidden is None or self.names[at] not in self.routers:
            return
        plain = self.routers[self.names[at]].norm is None
        for distance, later in enumerate(self.names[at + 1 : at + 1 + DISTANCES], 1):
            if later in self.routers:
                margin = self.routers[later].margin(hidden, plain, self.experts)
                self.margins[at + distance, distance] = margin.detach().cpu().clamp(-3e4, 3e4).half()


@torch.no_grad()
def trace_steps(model: nn.Module, traces: Callable[[], Iterator[Trace]], tokens: int | None = None) -> StepTrace:
    """Run a decoder-only model over traced sentences, one by one.

    Args:
        model: plain or with swapped experts; its mode is restored.
        tokens: read at the most; None: 20,000, fewer where the model's layers and experts are many.
    """
    facts: Any = stack_facts(model, "causal")
    tokens = tokens or max(1, min(TOKENS, NUMBERS // (facts.layers * facts.experts)))
    found, read = StepTrace(), 0
    was_training = model.training
    model.eval()
    try:
        with _Watch(model, facts.experts) as watch:
            for ids in _sentences(traces):
                if read >= tokens:
                    break
                ids = ids[: tokens - read]
                read += len(ids)
                watch.calls, watch.margins = [], {}
                facts.stack(input_ids=ids[None].to(facts.embedding.device), use_cache=False)
                found.sentences.append(ids)
                found.chosen.append(torch.stack(watch.calls, dim=1))
                found.margins.append(watch.margins)
    finally:
        model.train(was_training)
    return found


def _sentences(traces: Callable[[], Iterator[Trace]]) -> Iterator[Tensor]:
    for trace in traces():
        yield from trace.input_ids.split(trace.length.tolist())


def fit_steps(table: TokenTablePredictor, trace: StepTrace) -> LearnedSteps:
    """Weigh what is known of a step, layer by layer, and then what a router adds at each distance.

    Args:
        table: counted on other text than ``trace``.
    """
    known, happened = _known(LearnedSteps.untrained(table), trace)
    weights = torch.stack(
        [fit_mixture(known[:, layer].flatten(0, 1), happened[:, layer].flatten()) for layer in range(table.layers)]
    )
    joined = torch.zeros(table.layers, DISTANCES, JOINED)
    joined[..., 0] = 1.0
    for layer in range(table.layers):
        odds = known[:, layer] @ weights[layer]
        for distance in range(1, DISTANCES + 1):
            margin = _margins(trace, layer, distance)
            if margin is not None:
                both = torch.stack([odds, margin, torch.ones_like(odds)], dim=-1)
                joined[layer, distance - 1] = fit_mixture(both.flatten(0, 1), happened[:, layer].flatten())
    return LearnedSteps(table, weights, joined)


def _known(steps: LearnedSteps, trace: StepTrace) -> tuple[Tensor, Tensor]:
    """What is known of each token before it runs, [tokens, layers, experts, KNOWLEDGE], and what it then chose,
    [tokens, layers, experts] bool."""
    found, happened = [], []
    for ids, chosen in zip(trace.sentences, trace.chosen, strict=True):
        state = steps.start(torch.zeros(1, 0, 0), None)
        for at in range(len(ids)):
            table = steps.told(int(ids[at]))
            parts = (table, *(part[0] for part in steps.knowledge(state)), torch.ones_like(table))
            found.append(torch.stack(parts, dim=-1))
            state = steps.observe(state, chosen[None, at : at + 1])
        hot = torch.zeros(len(ids), steps.layers, steps.experts)
        happened.append(hot.scatter_(2, chosen.long(), 1.0) > 0)
    known = torch.stack(found)
    assert known.shape[-1] == KNOWLEDGE  # for the reader: the order is that of LearnedSteps.weights
    return known, torch.cat(happened)


def _margins(trace: StepTrace, layer: int, distance: int) -> Tensor | None:
    each = [margins.get((layer, distance)) for margins in trace.margins]
    if not each or any(margin is None for margin in each):
        return None
    return torch.cat(each).float()  # type: ignore[arg-type]


def judge_steps(steps: LearnedSteps, trace: StepTrace) -> dict[str, Any]:
    """How many of the routers' choices are among the k and 2k most probable candidates, k choices a token, and how far
    probabilities can be trusted.

    Returns:
        way -> ``among_k`` and ``among_2k`` by layer, their means, and ``ece`` over all experts. The ways are "last"
        (the last token's experts, and behind them those of the tokens before), "token table", "steps", and for each
        distance "lookahead N", "joined N" and, over the same layers, "steps N".
    """
    known, happened = _known(steps, trace)
    odds = (known * steps.weights[:, None]).sum(-1)
    last = known[..., 1] + known[..., 2].sigmoid() / 2
    every = range(steps.layers)
    found = {
        "tokens": trace.tokens,
        "last": _judged({layer: last[:, layer] for layer in every}, happened, steps.choices, calibrated=False),
        "token table": _judged({layer: known[:, layer, :, 0] for layer in every}, happened, steps.choices),
        "steps": _judged({layer: odds[:, layer] for layer in every}, happened, steps.choices),
        "top1": float(happened.gather(-1, odds.argmax(-1, keepdim=True)).float().mean()),
    }
    for distance in range(1, DISTANCES + 1):
        margins = {layer: _margins(trace, layer, distance) for layer in every}
        asked = {layer: margin for layer, margin in margins.items() if margin is not None}
        if not asked:
            continue
        joined = {layer: steps.joined_odds(odds[:, layer], layer, distance, margin) for layer, margin in asked.items()}
        alone = {layer: odds[:, layer] for layer in asked}
        found[f"lookahead {distance}"] = _judged(asked, happened, steps.choices, calibrated=False)
        found[f"steps {distance}"] = _judged(alone, happened, steps.choices)
        found[f"joined {distance}"] = _judged(joined, happened, steps.choices)
    return found


def _judged(odds: dict[int, Tensor], happened: Tensor, choices: int, calibrated: bool = True) -> dict[str, Any]:
    """One way's entry, of log odds [tokens, experts] by layer."""
    among_k: list[float] = []
    among_2k: list[float] = []
    trust = Reliability.empty()
    for layer, each in odds.items():
        wanted = happened[:, layer]
        total = max(float(wanted.sum()), 1.0)
        for shares, count in ((among_k, choices), (among_2k, min(2 * choices, each.shape[-1]))):
            shares.append(float(wanted.gather(-1, each.topk(count, dim=-1).indices).sum()) / total)
        trust.add(each.sigmoid().flatten(), wanted.flatten())
    means = {"mean_among_k": sum(among_k) / len(among_k), "mean_among_2k": sum(among_2k) / len(among_2k)}
    return {"layers": list(odds), "among_k": among_k, "among_2k": among_2k, **means} | (
        {"ece": trust.ece} if calibrated else {}
    )
