"""What every MoE layer with swapped experts has in common, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from sida_ext.experts.runtime import Runtime

__all__ = ["ServedLayer", "swapped_layers"]


class ServedLayer(nn.Module):
    """An MoE layer, or the experts module of one, whose experts live in a :class:`~sida_ext.experts.runtime.Runtime`.

    Attributes:
        name: module path of the layer, as in the store.
        table_layer: position of the layer in its stack's hash tables; None where no table covers it.
        ahead: told this layer's choices before its experts run, to announce those of the layers that follow; see
            :class:`sida_ext.models.router_lookahead.LayerAhead`. None: nothing is announced.
        observer: told the layer's name and the experts in force: ``[B, S]`` or ``[tokens, top_k]``, -1 for none.
    """

    name: str
    table_layer: int | None
    runtime: Runtime
    handle: int
    routing: str = "router"
    confidence: float = 0.0
    observer: Callable[[str, Tensor], None] | None = None
    ahead: Any = None

    def connect(self, runtime: Runtime, activation: str) -> None:
        """Compute from ``runtime``'s experts from now on.

        Args:
            activation: name of the kernel's activation, as :func:`sida_ext.ops.moe_ffn` takes it.
        """
        self.runtime = runtime
        self.handle = runtime.layer_handle(self.name, activation)
        self.routing, self.confidence = runtime.options.routing, runtime.options.confidence
        self.register_state_dict_pre_hook(refuse_state_dict)

    def tell(self, expert_index: Tensor) -> None:
        """Tell those who watch which experts are in force."""
        judge = self.runtime.current.judge
        if judge is not None:
            judge()
        if self.observer is not None:
            self.observer(self.name, expert_index)


def refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    layer = cast(ServedLayer, module)
    raise RuntimeError(
        f"state_dict() of a model whose experts are in an expert store would lack them ({layer.name}); use the "
        f"checkpoint that it was loaded from (store: {layer.runtime.store_path})"
    )


def swapped_layers(model: nn.Module) -> list[ServedLayer]:
    """The layers whose experts are in an expert store, in the order in which they run (encoder first)."""
    return list(_served(model))


def _served(model: nn.Module) -> Iterator[ServedLayer]:
    for module in model.modules():
        if isinstance(module, ServedLayer):
            yield module
