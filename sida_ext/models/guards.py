"""What stands before methods of a model whose experts are elsewhere: training, moving, saving and pickling are refused,
and a stack's forward is entered by one way only."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sida_ext.models.layers import ServedLayer

__all__ = ["BoundMethod", "guard_model"]

# What tokens may be when an MoE layer gets them (:func:`sida_ext.ops.moe_layer`).
COMPUTED_FROM = (torch.float32, torch.float16, torch.bfloat16)


class BoundMethod:
    """Stands before one method of one module. The module is held weakly: a strong reference from its own attribute
    would be a cycle, and a dropped model would keep its expert memory until the cycle collector comes by.

    Args:
        module: whose attribute this becomes.
        call: is given the module and the arguments; must not hold the module itself.
        signature: what ``inspect.signature`` is to say of the method; None: that it takes anything.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any], signature: inspect.Signature | None = None) -> None:
        self._module, self._call = weakref.ref(module), call
        if signature is not None:
            self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if module is None:
            raise ReferenceError("a method of a model that is gone; keep the model itself, not one of its methods")
        return self._call(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundMethod:
        # A copied module is in the memo before its attributes are copied: its guard is its own.
        module = self._module()
        signature = getattr(self, "__signature__", None)
        return self if module is None else BoundMethod(memo.get(id(module), module), self._call, signature)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model whose experts are in an expert store cannot be pickled: they belong to this process")


def guard_model(model: nn.Module, layers: list[str]) -> None:
    """Freeze the model; refuse to train, move or save it, or any of its modules that holds one of ``layers``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    for name in {""} | {path.rsplit(".", cut)[0] for path in layers for cut in range(path.count(".") + 1)}:
        module = model.get_submodule(name)
        module.train = BoundMethod(module, _train)  # type: ignore[method-assign]
        module._apply = BoundMethod(module, _move)  # type: ignore[method-assign]
        for save in ("save_pretrained", "push_to_hub"):
            if hasattr(module, save):
                setattr(module, save, BoundMethod(module, _save))


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands before ``module.train``: a model without its experts' parameters cannot be trained."""
    if mode:
        raise RuntimeError(
            "train() on a model whose experts are in an expert store: they are frozen and their dropout is gone; "
            "train the model first, then swap its experts"
        )
    return type(module).train(module, False)


def _save(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    """Stands before ``module.save_pretrained``, which would leave a configuration without weights behind."""
    raise RuntimeError(
        f"save_pretrained() of {type(module).__name__} would lack its experts, which are in an expert store; copy the "
        "checkpoint that it was loaded from"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _instead(device: torch.device) -> str:
    """What to do instead of moving a model to ``device``."""
    if device.type in ("cpu", "cuda"):
        return f"load it with sida_ext.from_pretrained(..., device={str(device)!r})"
    if device.type == "meta":
        return "its shapes are those of model.config, and sida_ext.plan says what it takes"
    return "experts are computed on cpu or cuda alone"


def _move(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stands before ``module._apply``, through which every move and cast goes: refused before anything has moved."""
    own = next(
        (layer.runtime.device for layer in module.modules() if isinstance(layer, ServedLayer)), torch.device("cpu")
    )
    device = fn(torch.empty(0, device=own)).device
    if device != own:
        raise RuntimeError(
            f"this model's experts are computed on {own} and cannot move to {device}; {_instead(device)}"
        )
    for dtype in {parameter.dtype for parameter in module.parameters(recurse) if parameter.is_floating_point()}:
        cast = fn(torch.empty(0, device=own, dtype=dtype)).dtype
        if cast != dtype and cast not in COMPUTED_FROM:
            raise RuntimeError(
                f"this model cannot be cast to {_name(cast)}: its experts are computed from tokens of "
                f"{', '.join(map(_name, COMPUTED_FROM))}; nothing was changed"
            )
    return type(module)._apply(module, fn, recurse)
