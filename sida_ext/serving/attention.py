"""For the length of a block, a model's attention goes through a function of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Attend", "SwitchedAttention"]

IMPLEMENTATION = "sida_joined"

# attend(module, query, key, value, mask, options) -> (output, None), as transformers' attention functions
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, "Tensor | None", dict[str, Any]], tuple[Tensor, None]]


class SwitchedAttention:
    """Switches the attention of one model over and back.

    Raises:
        ValueError: the parts of the model have different attention implementations.
    """

    def __init__(self, model: nn.Module) -> None:
        configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
        self._configs = list({id(config): config for config in configs}.values())
        names = {config._attn_implementation for config in self._configs} - {None}
        if len(names) != 1:
            raise ValueError(f"the model's attention implementations are {sorted(map(str, names))}, expected one")
        self.implementation: str = names.pop()
        self._eager: dict[type, Any] = {}
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)

    @contextmanager
    def switched(self, attend: Attend) -> Iterator[None]:
        """Inside, every attention of the model is computed by ``attend``; masks are not made where none is given."""
        global _active
        for config in self._configs:
            config._attn_implementation = IMPLEMENTATION
        _active = attend
        try:
            yield
        finally:
            _active = None
            for config in self._configs:
                config._attn_implementation = self.implementation

    def alone(self, module: nn.Module) -> Callable[..., Any]:
        """The attention function that the model uses outside of the block."""
        kind = type(module)
        if kind not in self._eager:
            eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
            if eager is None and self.implementation == "eager":
                raise RuntimeError(f"{kind.__name__}: there is no eager attention beside it; serve with --rows 1")
            self._eager[kind] = eager
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, self._eager[kind])


_active: Attend | None = None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if _active is None:
        raise RuntimeError(f"{type(module).__name__}: joined attention outside of a joined step")
    # No mode watches what is computed in here: it is for dense products, and each call through it costs microseconds.
    with torch._C.DisableTorchFunction():
        return _active(module, query, key, value, attention_mask, options)
