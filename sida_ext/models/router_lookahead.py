"""Prefetching inside a forward: when a layer's experts are about to run, the next layers' routers are asked.

What a layer's router reads is kept by a hook until the layer's experts are called; there the routers of the layers
ahead are asked on it, and what they name is announced to the engine. The announcement begins nothing by itself: the
layer's own experts are demanded next, and come first. It holds until the next layer makes its own.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sida_ext.experts.runtime import Runtime
from sida_ext.models.layers import ServedLayer
from sida_ext.prediction.learned_steps import LearnedSteps, needed
from sida_ext.prediction.router_asking import AskedRouter
from sida_ext.prediction.router_lookahead import LookaheadState, RouterLookahead, in_time, most_wanted, within_room

__all__ = ["LayerAhead", "StepOdds", "attach_lookahead", "attach_steps"]

logger = logging.getLogger("sida_ext")


class _Standing:
    """What one thread has announced and kept between two layers of a forward."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.number = 0  # of the announcement that stands; 0: none
        self.hidden: Tensor | None = None  # what the layer under way reads
        self.began: float | None = None  # when the layer before began, in this forward
        self.named: dict[tuple[str, int], list[int]] = {}  # (layer, distance) -> experts
        self.asking: float | None = None  # seconds that asking took at the layer before; None: nobody was asked
        self.judged = False  # nobody only so that it is seen what the asking is worth, or somebody was
        self.step: StepOdds | None = None  # what is known of the step under way, where one was predicted

    def retire(self) -> None:
        number, self.number = self.number, 0
        if number:
            self.runtime.retire(number)

    def forget(self) -> None:
        """A forward is over, or has failed."""
        self.retire()
        self.named.clear()
        self.began = self.step = self.hidden = self.asking = None
        self.judged = False

    def __del__(self) -> None:
        # A thread that ended between two layers: its forward raised.
        if self.number and not self.runtime.closed:
            self.retire()


class _Shared:
    """Of one model and of its copies, whose expert memory is the same one."""

    def __init__(self, runtime: Runtime, state: LookaheadState) -> None:
        self.runtime, self.state = runtime, state
        self._thread = threading.local()

    @property
    def standing(self) -> _Standing:
        found = getattr(self._thread, "standing", None)
        if found is None:
            found = self._thread.standing = _Standing(self.runtime)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Keep:
    """The hook before what a layer reads. Holds no module: it would be a cycle."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    def __call__(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and not torch.compiler.is_compiling():
            self._shared.standing.hidden = given[0]


@dataclass
class StepOdds:
    """What a predictor of steps says before the step runs.

    Attributes:
        odds: [tokens, layers, experts] log odds of each token's choosing each expert.
        learned: joins them with what a router says ahead; None: a predictor that cannot, and the router alone counts.
        least: probability from which on an expert is read ahead, where the predictor says it itself.
    """

    odds: Tensor
    learned: LearnedSteps | None
    least: float | None = None

    def named(self, layer: int, distance: int, margin: Tensor | None, least: float) -> list[int]:
        """Experts of a layer that the step needs with a probability of at least ``least``, most likely first."""
        odds = self.odds[:, layer]
        if self.learned is not None:
            odds = self.learned.joined_odds(odds, layer, distance, margin)
        return needed(odds, least)


@dataclass
class Target:
    """A layer that follows.

    Attributes:
        name: of its experts, as in the store.
        position: in its stack's hash tables.
        router: to be asked; None: it is not.
    """

    name: str
    position: int
    router: AskedRouter | None = None


@dataclass
class LayerAhead:
    """What a served layer does before and after its experts run.

    Attributes:
        name: of the layer's experts, as in the store.
        targets: the layers that follow, the next one first.
        normalised: what this layer keeps is a router's input rather than the residual stream.
        prompts_only: see :class:`~sida_ext.prediction.router_lookahead.RouterLookahead`.
    """

    name: str
    targets: list[Target]
    normalised: bool
    shared: _Shared
    prompts_only: bool = False

    def before(self, expert_index: Tensor) -> None:
        """Announce what the layers ahead will want.

        Args:
            expert_index: [tokens, top_k] this layer's choices, -1 for none.
        """
        runtime, state, standing = self.shared.runtime, self.shared.state, self.shared.standing
        standing.retire()
        hidden, standing.hidden = standing.hidden, None
        if runtime.current.number:  # the batch was announced by another predictor, all layers of it
            state.pass_by()
            return
        # What is read in time goes by the measured pace, and a settled run is to be the same every time.
        passes = runtime.settled or expert_index.numel() < runtime.header.num_experts
        if self.prompts_only and standing.step is None and passes:
            standing.forget()
            return
        before, standing.began = standing.began, state.now()
        passed = None if before is None else standing.began - before
        if passed is not None and standing.step is None and standing.judged:
            state.took(passed, expert_index.shape[0], standing.asking)
        standing.asking, standing.judged = None, False
        level = min(state.level(passed, asked=min(len(self.targets), 1)), len(self.targets))
        if level and standing.step is None and not state.may_ask():
            level, standing.judged = 0, True
        if not level and not standing.named:
            return
        chosen = most_wanted(expert_index, None, runtime.header.num_experts)
        for key in [key for key in standing.named if key[0] == self.name]:
            state.compare(self.name, key[1], standing.named.pop(key), chosen)
        # What this layer computes from stays where it is: no more is named than there is room for beside it.
        room = runtime.slots - len(chosen)
        if not level or room <= 0:
            return
        asked = state.now()
        wanted = []
        for distance, target in enumerate(self.targets[:level], 1):
            experts = self._named(target, distance, hidden, standing.step)
            if experts is not None:
                standing.named[target.name, distance] = experts
                if self.prompts_only and standing.step is None:
                    experts = in_time(experts, runtime.held_of(target.name), state.pace.slowness)
                wanted.append((target.name, experts))
        kept = within_room(wanted, room)
        state.announced(sum(len(experts) for _, experts in kept))
        if kept:
            standing.number = runtime.announce(dict(kept), begin=False)
        standing.asking, standing.judged = state.now() - asked, True

    def _named(self, target: Target, distance: int, hidden: Tensor | None, step: StepOdds | None) -> list[int] | None:
        """Experts of a layer ahead, most wanted first; None: nobody knows."""
        experts = self.shared.runtime.header.num_experts
        asks = hidden is not None and not (self.prompts_only and step is not None)
        router = target.router if asks else None
        if router is not None and (step is None or step.learned is None):
            return most_wanted(*router.ask(hidden, self.normalised), experts)  # type: ignore[arg-type]
        if step is None:
            return None
        margin = None if router is None else router.margin(hidden, self.normalised, experts)  # type: ignore[arg-type]
        least = self.shared.state.least if step.least is None else step.least
        return step.named(target.position, distance, margin, least)

    def after(self) -> None:
        """The layer has run, or has failed to."""
        if not self.targets:
            self.shared.standing.forget()


def attach_lookahead(
    runtime: Runtime,
    layers: dict[str, ServedLayer],
    lookahead: RouterLookahead,
    routers: tuple[list[str], dict[str, AskedRouter], dict[str, str]],
) -> None:
    """Let a swapped model's layers announce what follows them.

    Args:
        layers: path of the experts module -> served layer.
        routers: what :func:`sida_ext.prediction.router_asking.find_routers` has found.
    """
    order, found, obstacles = routers
    if obstacles:
        what = "; ".join(f"{name}: {why}" for name, why in obstacles.items())
        # Who has asked for it is told; where it is only the default, stats().lookahead has it.
        level = logging.INFO if lookahead.prompts_only else logging.WARNING
        logger.log(level, "RouterLookahead does not ask %d of %d routers: %s", len(obstacles), len(layers), what)
    record, lanes = runtime.header.record_bytes, runtime.read_plan.lanes
    ran = list(dict.fromkeys(order))
    state = LookaheadState(lookahead, record, lanes, runtime.pace, time.monotonic, obstacles, len(ran))
    shared = _Shared(runtime, state)
    for at, name in enumerate(ran):
        if name not in found:
            continue
        following = [later for later in ran[at + 1 :] if later in found]
        targets = [
            Target(layers[later].name, _position(layers[later]), found[later] if distance <= lookahead.depth else None)
            for distance, later in enumerate(following, 1)
        ]
        layers[name].ahead = LayerAhead(
            layers[name].name, targets, found[name].norm is None, shared, lookahead.prompts_only
        )
        if targets:
            found[name].reads.register_forward_pre_hook(_Keep(shared))
    runtime.ahead = state


def attach_steps(runtime: Runtime, layers: list[ServedLayer]) -> Any:
    """Let a swapped model's layers announce what a predictor of steps says of those that follow, and what the routers
    say that are asked; done once, when the first step is predicted.

    Args:
        layers: in the order in which they run.

    Returns:
        What the layers share: ``state`` and ``standing``.
    """
    if layers[0].ahead is None:
        if runtime.ahead is None:
            lookahead = RouterLookahead(len(layers))
            record, lanes = runtime.header.record_bytes, runtime.read_plan.lanes
            runtime.ahead = LookaheadState(lookahead, record, lanes, runtime.pace, time.monotonic, {}, len(layers))
        shared = next((layer.ahead.shared for layer in layers if layer.ahead is not None), None)
        shared = shared or _Shared(runtime, runtime.ahead)
        for at, layer in enumerate(layers):
            if layer.ahead is None:
                targets = [Target(later.name, _position(later)) for later in layers[at + 1 :]]
                layer.ahead = LayerAhead(layer.name, targets, False, shared)
    shared = layers[0].ahead.shared
    shared.state.deepen(len(layers))
    return shared


def _position(layer: ServedLayer) -> int:
    assert layer.table_layer is not None  # for the type checker: layers of the experts seam stand in their tables
    return layer.table_layer
