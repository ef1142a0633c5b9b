"""Traces of a decoder-only model's routers: which experts every token of a prompt was given to, in every MoE layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.prediction.moe_facts import check_tokens, experts_of_seam, stack_facts
from sida_ext.training.traces import Trace

__all__ = ["CausalTrace", "collect_causal_traces"]


@dataclass(frozen=True)
class CausalTrace(Trace):
    """A Trace whose ``candidates`` [N, layers, choices] are exactly the experts that each token was given to, the one
    of most weight first; ``logits`` are the logarithms of their weights, less the first one's, and ``gate`` its
    weight."""

    @property
    def chosen(self) -> Tensor:
        return self.candidates.long()

    @property
    def weights(self) -> Tensor:
        """[N, layers, choices] float32: what the experts' outputs are weighted by."""
        return self.gate.unsqueeze(-1) * self.logits.float().exp()


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that takes the experts and weights [tokens, choices] of each experts module that is called."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        _, index, weights = given
        calls.append((index.detach().cpu().long(), weights.detach().cpu().float()))

    hooks = [module.register_forward_pre_hook(note) for module in experts_of_seam(model).values()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def collect_causal_traces(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[CausalTrace]:
    """Run a decoder-only model over batches and yield one CausalTrace for each; nothing else is held.

    Args:
        model: plain or with swapped experts; its mode is restored.
        batches: dicts with ``input_ids`` [B, S], ``attention_mask`` [B, S] (padding behind the tokens) and ``document``
            [B].

    Raises:
        ValueError: an unknown token, weights that are NaN or infinite, or a model that runs an experts module more or
            less than once in a forward.
    """
    facts = stack_facts(model, "causal")
    device = facts.embedding.device
    for batch in batches:
        input_ids, mask = batch["input_ids"], batch["attention_mask"]
        real = check_tokens(input_ids, mask, facts.embedding.shape[0]).cpu()
        was_training = model.training
        model.eval()
        try:
            with _recorded(model) as calls:
                facts.stack(input_ids=input_ids.to(device), attention_mask=real.long().to(device), use_cache=False)
        finally:
            model.train(was_training)
        if len(calls) != facts.layers:
            raise ValueError(
                f"{type(model).__name__} called its experts {len(calls)} times in a forward, expected once for each of "
                f"its {facts.layers} MoE layers: layers that run several times cannot be traced"
            )
        index, weights = (torch.stack(part, dim=1).unflatten(0, real.shape)[real] for part in zip(*calls, strict=True))
        if not bool(torch.isfinite(weights).all()):
            raise ValueError("the routers' weights hold NaN or inf; the model's weights or its dtype cannot be traced")
        weights, order = weights.abs().sort(dim=-1, descending=True, stable=True)
        logits = (weights.clamp(min=1e-6) / weights[..., :1].clamp(min=1e-6)).log()
        yield CausalTrace(
            input_ids.cpu()[real].long(),
            real.sum(dim=1),
            torch.as_tensor(batch["document"], dtype=torch.int64),
            index.gather(-1, order).to(torch.int16),
            logits.half(),
            weights[..., 0],
        )
