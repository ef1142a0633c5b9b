"""What the order in which batches ran saved: both orders through the engine's state machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sida_ext._load import _C
from sida_ext.experts.runtime import Runtime, runtime_of
from sida_ext.models.layers import swapped_layers

__all__ = ["OrderSavings", "watch_order"]


@dataclass(frozen=True)
class OrderSavings:
    """Bytes that the engine's state machine reads for a run's experts in either order; copies take no time and every
    table is right, so that only the order differs."""

    given_bytes: int
    run_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.given_bytes - self.run_bytes


@dataclass
class _Watch:
    """What a run does: which batches were given in which order, and which experts each used, in the order of the run.
    It keeps the token ids of every batch, by whose identity a batch is known again."""

    runtime: Runtime
    given: list[Tensor] = field(default_factory=list)
    run: list[Tensor] = field(default_factory=list)
    used: list[list[tuple[int, list[int]]]] = field(default_factory=list)

    def batches(self, given: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches, remembered."""
        for batch in given:
            self.given.append(batch["input_ids"])
            yield batch

    def savings(self, lookahead: int) -> OrderSavings:
        """What the order of the run saved over the given one, with the budget that is in force now."""
        header = self.runtime.header
        place = {id(ids): number for number, ids in enumerate(self.run)}
        in_given_order = [self.used[place[id(ids)]] for ids in self.given]

        def read(batches: list[list[tuple[int, list[int]]]]) -> int:
            _, loads, _ = _C.run_policy(
                len(header.layers),
                header.num_experts,
                batches,
                self.runtime.eviction,
                self.runtime.slots,
                lookahead,
                [],
            )
            return loads * header.record_bytes

        return OrderSavings(read(in_given_order), read(self.used))


@contextmanager
def watch_order(model: PreTrainedModel) -> Iterator[_Watch]:
    """Watch the batches that run through ``model`` inside the block, to say what their order saved."""
    runtime = runtime_of(model)
    watch = _Watch(runtime)

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.run.append(kwargs["input_ids"])
        watch.used.append([])

    def layer_used(name: str, expert_index: Tensor) -> None:
        distinct = expert_index.unique()
        watch.used[-1].append((runtime.header.layers.index(name), distinct[distinct >= 0].tolist()))

    layers = swapped_layers(model)
    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in layers:
        layer.observer = layer_used
    try:
        yield watch
    finally:
        hook.remove()
        for layer in layers:
            layer.observer = None
