"""Where the routers of a model of the experts seam are, and how one is asked ahead of its turn.

Families name and nest their routers and norms differently, so nothing is found by name: one dry forward over two
tokens, in which the experts answer zeros and no expert is read, shows which module made the choices that each experts
module was given, and which module made that router's input. A tensor is followed by its memory, which is kept until the
end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AskedRouter", "find_routers"]

DRY_TOKENS = (5, 6)


@dataclass
class AskedRouter:
    """The router of one experts module, to be asked on another layer's hidden states.

    Attributes:
        experts: path of the experts module.
        router: what chooses the experts: hidden states -> outputs that hold indices and weights.
        norm: what makes the router's input of the residual stream; None: the router reads something that no module made
            of one tensor, and is asked on what another layer's router reads.
        dims: of the router's input: 3 for [B, S, d_model], 2 for [tokens, d_model].
        further: the router's positional arguments behind the hidden states: parameters of the model.
        index_at, weights_at: which of the router's output tensors they are; ``weights_at`` None: none of them.
    """

    experts: str
    router: nn.Module
    norm: nn.Module | None
    dims: int
    further: tuple[Tensor, ...] = ()
    index_at: int = 0
    weights_at: int | None = None

    @property
    def reads(self) -> nn.Module:
        """The module whose input is the hidden state that this layer sees."""
        return self.router if self.norm is None else self.norm

    @torch.no_grad()
    def ask(self, hidden: Tensor, normalised: bool) -> tuple[Tensor, Tensor | None]:
        """The experts that the router would choose, [tokens, top_k], and their weights where it tells them.

        Args:
            hidden: [..., d_model].
            normalised: ``hidden`` is a router's input rather than the residual stream.
        """
        found = self._answer(hidden, normalised)
        index = found[self.index_at]
        weights = None if self.weights_at is None else found[self.weights_at]
        return index.reshape(-1, index.shape[-1]), weights

    @torch.no_grad()
    def margin(self, hidden: Tensor, normalised: bool, experts: int) -> Tensor:
        """How clearly the router would choose each expert, [tokens, experts] float32: the distance of its logit from
        the middle between the last that is chosen and the first that is not. 1 and -1 for chosen and not of a router
        that tells no number for every expert.

        Args:
            hidden, normalised: as :meth:`ask` takes them.
            experts: of the layer.
        """
        found = self._answer(hidden, normalised)
        index = found[self.index_at]
        index = index.reshape(-1, index.shape[-1])
        others = (tensor for at, tensor in enumerate(found) if at not in (self.index_at, self.weights_at))
        logits = next((t for t in others if t.is_floating_point() and t.shape[-1] == experts), None)
        if logits is None or logits.numel() != index.shape[0] * experts:
            named = index.new_full((index.shape[0], experts), -1, dtype=torch.float32)
            return named.scatter_(1, index.long().clamp(0, experts - 1), 1.0)
        logits = logits.reshape(-1, experts).float()
        chosen = index.shape[-1]
        best = logits.topk(min(chosen + 1, experts), dim=-1).values
        return logits - best[:, chosen - 1 :].mean(dim=-1, keepdim=True)

    def _answer(self, hidden: Tensor, normalised: bool) -> list[Tensor]:
        """The router's output tensors on another layer's hidden states."""
        # The forward functions themselves: hooks of others (transformers collects router logits by one) see nothing.
        if not normalised and self.norm is not None:
            hidden = self.norm.forward(hidden)
        if self.dims == 2:
            hidden = hidden.reshape(-1, hidden.shape[-1])
        elif hidden.dim() == 2:
            hidden = hidden.unsqueeze(0)
        return list(_tensors(self.router.forward(hidden, *self.further)))


@dataclass
class _Call:
    """What a module was given and gave in the dry forward."""

    module: nn.Module
    given: tuple[Any, ...]
    named: Mapping[str, Any]
    outputs: list[Tensor] = field(default_factory=list)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are views of the same numbers."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.dtype == other.dtype


def _position(outputs: list[Tensor], wanted: Tensor) -> int | None:
    return next((at for at, tensor in enumerate(outputs) if _same(tensor, wanted)), None)


class _Watch:
    """Stands at all modules and experts of a model for one forward."""

    def __init__(self, model: nn.Module, experts: Mapping[str, nn.Module]) -> None:
        self.found: dict[str, AskedRouter] = {}  # in the order in which they run first
        self.order: list[str] = []  # the order in which they run
        self.obstacles: dict[str, str] = {}
        self._calls: list[_Call] = []
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def called(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self._calls.append(_Call(module, given, named, list(_tensors(output))))

    def experts_called(self, name: str, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Stands in for the forward of the experts module ``name``."""
        self.order.append(name)
        if name not in self.found and name not in self.obstacles:
            self._find(name, index, weights)
        return torch.zeros_like(hidden)

    def _find(self, name: str, index: Tensor, weights: Tensor) -> None:
        call = next((c for c in reversed(self._calls) if _position(c.outputs, index) is not None), None)
        if call is None:
            self.obstacles[name] = "no module's output is the choice that its experts are given"
            return
        states, *further = call.given or (None,)
        read = [key for key, value in call.named.items() if value is not None]
        read += [f"argument {at}" for at, value in enumerate(further, 1) if id(value) not in self._own]
        if read or not isinstance(states, Tensor):
            what = ", ".join(read) or "no hidden states by position"
            self.obstacles[name] = f"its router, a {type(call.module).__name__}, also reads {what}"
            return
        at = _position(call.outputs, index)
        assert at is not None  # for the type checker: the call was chosen by it
        norm = self._maker(states, call)
        weights_at = _position(call.outputs, weights)
        self.found[name] = AskedRouter(name, call.module, norm, states.dim(), tuple(further), at, weights_at)

    def _maker(self, states: Tensor, router: _Call) -> nn.Module | None:
        """The module that made ``states`` of one tensor of the same size: a norm, whatever its name."""
        # The first that gave it: what follows may hand it on as it is.
        made = (call for call in self._calls if call is not router and _position(call.outputs, states) is not None)
        call = next(made, None)
        if call is None or len(call.given) != 1 or any(True for _ in _tensors(call.named)):
            return None
        source = call.given[0]
        if not isinstance(source, Tensor) or source.numel() != states.numel() or _same(source, states):
            return None
        return call.module if source.shape[-1] == states.shape[-1] else None


def find_routers(
    model: PreTrainedModel, experts: Mapping[str, nn.Module]
) -> tuple[list[str], dict[str, AskedRouter], dict[str, str]]:
    """Ask a model, swapped or not, where its routers are; changes nothing.

    Args:
        experts: path -> experts module.

    Returns:
        The paths in the order in which they run (one that runs twice stands there twice), the routers that can be
        asked, and why each of the others cannot.

    Raises:
        ValueError: the model does not run on two tokens alone.
    """
    watch = _Watch(model, experts)
    inside = {id(part) for module in experts.values() for part in module.modules()}
    hooks = [
        module.register_forward_hook(_ignoring_result(watch), with_kwargs=True)
        for module in model.modules()
        if id(module) not in inside
    ]
    tokens = torch.tensor([DRY_TOKENS], device=next(model.parameters()).device)
    try:
        for name, module in experts.items():
            module.forward = _stand_in(watch, name)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(input_ids=tokens)
    except Exception as error:
        raise ValueError(
            f"RouterLookahead cannot find the routers of {type(model).__name__}, which does not run on two tokens "
            f"alone: {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module in experts.values():
            module.__dict__.pop("forward", None)
    for name in experts:
        if name not in watch.found:
            watch.obstacles.setdefault(name, "it does not run on text alone")
    return watch.order, watch.found, watch.obstacles


def _ignoring_result(watch: _Watch) -> Any:
    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        watch.called(module, given, named, output)

    return hook


def _stand_in(watch: _Watch, name: str) -> Any:
    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return watch.experts_called(name, hidden, index, weights)

    return forward
