"""Where the training of a causal shadow begins: each stand-in as the best linear map from its features to what the
model's experts really add, layer by layer. It is found in closed form from one run of the model over a little text, and
training goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from sida_ext.prediction.causal_net import CausalMoE, CausalNet
from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.prediction.moe_facts import experts_of_seam, stack_facts
from sida_ext.progress import progress_bar
from sida_ext.training.traces import Trace

__all__ = ["fit_stand_ins", "freeze_copies"]

TOKENS = 60_000  # read for it at the most
SENTENCES = 8  # run at once
EXACT = 0.98  # of the first router's choices: rounding makes ties
RIDGE = 1e-4  # of the mean square of a feature


class _Equations:
    """The normal equations of one layer's stand-in, summed up batch by batch."""

    def __init__(self, layer: CausalMoE) -> None:
        width = layer.out.in_features
        self.layer = layer
        self.inner = torch.zeros(width, width, dtype=torch.float64)
        self.right = torch.zeros(width, layer.hidden, dtype=torch.float64)
        self.real: Tensor | None = None  # [B * S] bool, of the batch under way

    def __call__(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        assert self.real is not None  # set before the model runs
        y, added = (part.detach().reshape(len(self.real), -1).cpu().float()[self.real] for part in (given[0], output))
        found = self.layer.features(y, self.layer.route(y)[1])
        self.inner += (found.T @ found).double()
        self.right += (found.T @ added).double()

    def solve(self) -> None:
        ridge = RIDGE * self.inner.diagonal().mean().clamp(min=1e-12)
        solved = torch.linalg.solve(self.inner + ridge * torch.eye(len(self.inner), dtype=torch.float64), self.right)
        self.layer.out.weight.copy_(solved.T)


@torch.no_grad()
def fit_stand_ins(
    predictor: HashPredictor,
    model: nn.Module,
    traces: Callable[[], Iterator[Trace]],
    tokens: int = TOKENS,
    progress: bool = False,
) -> bool:
    """Set the stand-ins of an untrained causal predictor; changes nothing else in it.

    Args:
        model: the decoder-only model that the predictor is for, plain or with swapped experts.
        traces: what is trained on.
        tokens: read at the most.

    Returns:
        False where nothing was done: a shadow narrower than the model, or experts of another width, have no stand-in
        that reads and gives what the experts do.
    """
    net = predictor.net
    facts = stack_facts(model, "causal")
    if not isinstance(net, CausalNet) or net.enter is not None:
        return False
    layers = [cast(CausalMoE, part) for part in net.feed_forward if isinstance(part, CausalMoE)]
    equations = [_Equations(layer) for layer in layers]
    modules = list(experts_of_seam(model).values())
    if not _same_width(model, facts.stack, modules, facts.embedding):
        return False
    hooks = [module.register_forward_hook(each) for module, each in zip(modules, equations, strict=True)]
    read = 0
    was_training = model.training
    model.eval()
    try:
        with progress_bar("fitting the stand-ins, tokens", shown=progress) as bar:
            for input_ids, mask in _batches(traces, tokens):
                for each in equations:
                    each.real = mask.flatten()
                device = facts.embedding.device
                facts.stack(input_ids=input_ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
                read += int(mask.sum())
                bar.advance(int(mask.sum()))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not read:
        return False
    for each in equations:
        each.solve()
    return True


@torch.no_grad()
def freeze_copies(predictor: HashPredictor, traces: Callable[[], Iterator[Trace]]) -> bool:
    """Keep what a causal predictor copied of its model from being trained, where the copy is right: where it names what
    the first router chose, which depends on no expert. What is learned are the stand-ins then.

    Returns:
        Whether that is so.
    """
    net = predictor.net
    if not isinstance(net, CausalNet) or net.enter is not None:
        return False
    for input_ids, mask, chosen in _first(traces):
        named = predictor(input_ids, mask.long())[mask][:, 0].topk(predictor.choices).indices
        found = (named.unsqueeze(-1) == chosen[:, 0].unsqueeze(-2)).any(-1).float().mean()
        if float(found) < EXACT:
            return False
    copied = [
        net.attention,
        *(part for moe in net.feed_forward if isinstance(moe, CausalMoE) for part in (moe.norm, moe.router)),
    ]
    for part in copied:
        part.requires_grad_(False)
    return True


def _first(traces: Callable[[], Iterator[Trace]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, mask and choices of the first few traced sentences, once."""
    for trace in traces():
        part = trace.select(torch.arange(min(SENTENCES, trace.rows)))
        yield (*part.padded(), part.chosen)
        return


def _same_width(model: nn.Module, stack: nn.Module, modules: list[nn.Module], embedding: Tensor) -> bool:
    """Whether the experts read and give rows of the model's width, as two tokens show."""
    widths: list[tuple[int, int]] = []

    def note(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        widths.append((given[0].shape[-1], output.shape[-1]))

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        stack(input_ids=torch.tensor([[0, 1]], device=embedding.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return set(widths) == {(embedding.shape[1], embedding.shape[1])}


def _batches(traces: Callable[[], Iterator[Trace]], tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and mask [rows, S], bool, of traced sentences until so many tokens have been given."""
    given = 0
    for trace in traces():
        for rows in torch.arange(trace.rows).split(SENTENCES):
            part = trace.select(rows)
            yield part.padded()
            given += part.input_ids.numel()
            if given >= tokens:
                return
