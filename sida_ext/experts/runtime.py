"""Runtime: the engine of one model; budget, batches, statistics and life cycle. Knows nothing of transformers."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from sida_ext._load import _C
from sida_ext.experts.budget import format_bytes, parse_memory
from sida_ext.experts.cuda import cuda_blocking, host_slots, resolve_device
from sida_ext.experts.low_bit import LowBitCopies
from sida_ext.experts.options import Options, options_from
from sida_ext.experts.read_plan import ReadPlan, read_plan
from sida_ext.experts.record import stored_expert
from sida_ext.experts.source import ExpertWeights
from sida_ext.experts.stats import LayerStanding, Stats
from sida_ext.experts.store import StoreHeader, open_store
from sida_ext.experts.timeline import Event, write_chrome_trace

__all__ = ["Runtime", "runtime_of"]


@dataclass
class _Batch:
    """What one thread computes now: the announced batch, for predicted routing its hash table, and, where somebody
    compares the two, a dict that takes each layer's choice of the router: table layer -> [B, S] or [B * S, top_k].
    ``entered``: a forward runs that the table belongs to. ``judge``: called at each MoE layer, while the batch is
    announced."""

    number: int = 0
    table: Any = None
    chosen: dict[int, Any] | None = None
    entered: bool = False
    judge: Callable[[], None] | None = None


def _shut_down(
    engines: list[_C.TransferEngine | _C.CudaServing], handles: dict[str, int], folder: Any, process: int
) -> None:
    if os.getpid() != process:  # a fork has neither the lanes nor a right to the folder
        return
    for handle in handles.values():
        _C.unregister_layer(handle)
    handles.clear()
    try:
        with ExitStack() as closing:
            for engine in reversed(engines):
                closing.callback(engine.close)
    finally:
        if folder is not None:
            folder.cleanup()


class ServingState:
    """What those who serve a model leave on its runtime, from call to call.

    Attributes:
        predictor: what ``stream`` takes when it is given none.
        decoder_predictor: what each step of a decoder is predicted by; may be changed at any time.
        drift, step_drift: a predictor and the watch over its hits, of batches and of a decoder-only model's steps.
        lookahead: what the latest ``stream(lookahead="auto")`` picked, and why.
        ahead: what the layers announce of those that follow them (a ``LookaheadState``); None: nothing.
        settled: see :meth:`Runtime.set_settled`.
        announcing: whether whole batches are announced (an ``AnnouncingState``); None: none was yet.
    """

    predictor: Any = None
    decoder_predictor: Any = None
    drift: tuple[Any, Any] | None = None
    step_drift: tuple[Any, Any] | None = None
    lookahead: Any = None
    ahead: Any = None
    settled: bool = False
    announcing: Any = None


def _say(text: str) -> None:
    logging.getLogger("sida_ext").warning(text)


class Runtime(ServingState):
    """Expert memory of one model: a bounded set of slots over an expert store.

    Args:
        store: path of the expert store.
        options: see :class:`~sida_ext.experts.options.Options`; what it says of the store itself is not read here.
        reserved: bytes that the model will yet need, which the budget ``"auto"`` leaves free.
        folder: a temporary folder to remove when the runtime is closed.
        arguments: fields of ``options`` by name; the budget's default is ``"auto"``.

    Raises:
        RuntimeError: a GPU is asked for where there is none that works; the message says what is missing.
        ValueError: a budget below one expert (the message says the smallest that works), an unknown eviction.
        StoreError, OSError: the store cannot be used.

    Thread-safe: several threads may compute layers at once; each demand is served on its own.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        options: Options | None = None,
        *,
        reserved: int = 0,
        folder: Any = None,
        **arguments: Any,
    ) -> None:
        options = options_from(options, arguments, expert_memory="auto")
        if arguments:
            raise TypeError(f"Runtime got {next(iter(arguments))!r}, expected a field of sida_ext.Options")
        self.options = options
        self.store_path = Path(store)
        self.device = resolve_device(options.device, options.host_memory)
        expert_store, self.header = open_store(store)
        self.read_plan = self._read_plan(options.lanes, options.read_bytes)
        deadline = round(options.wait_deadline * 1000)
        self._low_bit = self._low_bit_copies()
        slots = self._slots(options.expert_memory, reserved + self.low_bit_memory)
        if self._low_bit is not None:
            self._low_bit.check_room(slots * self.header.record_bytes)
            self._low_bit.load(
                lanes=self.read_plan.lanes, read_bytes=self.read_plan.read_bytes, wait_deadline_ms=deadline, say=_say
            )
        faults = options.faults if options.faults is not None else _C.Faults()
        self._tiers: _C.CudaServing | None = None
        if self.device.type == "cuda":
            self._tiers = _C.CudaServing(
                expert_store,
                device=self.device.index,
                slots=slots,
                host_slots=host_slots(options.host_memory, self.header.record_bytes, self.header.total_experts, _say),
                pin=options.pin,
                lanes=2 if options.lanes is None else options.lanes,
                host_lanes=self.read_plan.lanes,
                eviction=options.eviction,
                wait_deadline_ms=deadline,
                faults=faults,
                read_bytes=self.read_plan.read_bytes,
                blocking=cuda_blocking(),
            )
            if self._tiers.pin_obstacle:
                _say(f"{self._tiers.pin_obstacle}; copies to the GPU are slower")
            self._engine = self._tiers.engine
        else:
            self._engine = _C.TransferEngine(
                expert_store,
                slots=slots,
                lanes=self.read_plan.lanes,
                read_bytes=self.read_plan.read_bytes,
                eviction=options.eviction,
                wait_deadline_ms=deadline,
                faults=faults,
                populate=options.populate,
            )
        engines: list[_C.TransferEngine | _C.CudaServing] = [self._tiers or self._engine]
        if self._low_bit is not None and self._low_bit.engine is not None:
            engines.append(self._low_bit.engine)
            self._engine.set_max_low_bit(options.max_low_bit)
        self.max_low_bit = 0.0 if self._low_bit is None else options.max_low_bit
        self._reads_early = False
        self.eviction = options.eviction
        self._handles: dict[str, int] = {}
        self._thread = threading.local()
        self._tracing = False
        self._predictions: list[Event] = []
        self._finalizer = weakref.finalize(self, _shut_down, engines, self._handles, folder, os.getpid())

    header: StoreHeader
    read_plan: ReadPlan  # how the lanes read, and why so
    max_low_bit: float  # share of the choices that low-bit copies may serve now

    def _low_bit_copies(self) -> LowBitCopies | None:
        if self.options.on_miss == "wait":
            return None
        if self.options.low_bit_store is None:
            raise ValueError(
                "on_miss is 'low_bit', expected low_bit_store= with it, an int4 or mxfp4 store of what "
                f"{self.store_path} holds"
            )
        return LowBitCopies(self.options.low_bit_store, self.header)

    @property
    def low_bit_memory(self) -> int:
        """Bytes of the low-bit copies of all experts, beside :attr:`expert_memory`; 0 with ``on_miss="wait"``."""
        return 0 if self._low_bit is None else self._low_bit.bytes

    def set_max_low_bit(self, share: float) -> None:
        """Change the share of the choices that low-bit copies may serve, from now on; nothing is saved up.

        Raises:
            ValueError: not 0 to 1, or the model was not loaded with ``on_miss="low_bit"``.
        """
        if self._low_bit is None:
            raise ValueError(f"max_low_bit is {share!r}, expected on_miss='low_bit' when the model is loaded")
        self._engine.set_max_low_bit(share)
        self.max_low_bit = share

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside the block every layer waits for its experts, whatever ``on_miss`` is."""
        before = self.max_low_bit
        if before:
            self.set_max_low_bit(0.0)
        try:
            yield
        finally:
            if before and not self.closed:
                self.set_max_low_bit(before)

    def set_settled(self, settled: bool) -> None:
        """For tests and measurements, of one thread: each layer begins when no read is under way, and what is not there
        then counts as not there in time. With ``lanes=1`` the experts that low-bit copies serve, and so the output, are
        then the same in every run. Prompts are not read ahead unasked. Not on a GPU."""
        self._engine.set_settled(settled)
        self.settled = settled

    def read_early(self, early: bool) -> None:
        """Whether what is announced for the next layer is read as early as can be, or with the fewest reads: see
        :mod:`sida_ext.prediction.announcing`. A settled run always reads early, as it is to be the same every time."""
        early = early or self.settled
        if early != self._reads_early:
            self._engine.set_early_prefetch(early)
            self._reads_early = early

    def _read_plan(self, lanes: int | None, read_bytes: int | None) -> ReadPlan:
        if lanes is not None and read_bytes is not None:
            return ReadPlan(lanes, read_bytes, "set by hand")
        plan = read_plan(self.store_path)
        if lanes is not None:
            return replace(plan, lanes=lanes, why=f"lanes set by hand; read size: {plan.why}")
        if read_bytes is not None:
            return replace(plan, read_bytes=read_bytes, why=f"read size set by hand; lanes: {plan.why}")
        return plan

    def _slots(self, expert_memory: str | int, reserved: int = 0) -> int:
        record = self.header.record_bytes
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        wanted = parse_memory(expert_memory, self.header.experts_bytes, reserved=reserved, free=free)
        slots = min(wanted // record, self.header.total_experts)
        if slots < 1:
            raise ValueError(
                f"expert_memory is {expert_memory!r}, {format_bytes(wanted)}; the smallest that works is one expert of "
                f"this store, {record} bytes ({format_bytes(record)})"
            )
        return slots

    def layer_handle(self, name: str, activation: str) -> int:
        """Handle for ``torch.ops.sida.moe_layer`` of the store's MoE layer ``name`` (its module path)."""
        if name not in self.header.layers:
            raise ValueError(
                f"{self.store_path} has no MoE layer {name!r}, only {', '.join(self.header.layers)}; it was packed "
                "from another model"
            )
        if name not in self._handles:
            index = self.header.layers.index(name)
            experts = self.header.num_experts
            if self._tiers is not None:
                self._handles[name] = _C.register_cuda_layer(self._tiers, index, experts, activation)
            else:
                copies = None if self._low_bit is None else self._low_bit.engine
                self._handles[name] = _C.register_layer(self._engine, index, experts, activation, copies)
        return self._handles[name]

    def borrow(self, name: str, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """The records of distinct experts of a layer as tensors, each until the next is asked for; in the order in
        which they arrive. For what no kernel computes.

        Raises:
            RuntimeError: experts are computed on a GPU, whose slots Python cannot read.
        """
        if self._tiers is not None:
            raise RuntimeError(
                f"{name}: its gate is computed by the module's own function, which on {self.device} is not supported; "
                "load the model with device='cpu'"
            )
        lent = _C.Borrow(self._engine, self.header.layers.index(name), experts)
        try:
            while wave := lent.next():
                for expert, record in wave:
                    yield expert, stored_expert(record, self.header)
        finally:
            lent.finish()

    @property
    def expert_memory(self) -> int:
        """The budget in bytes: a whole number of slots."""
        return self._engine.budget * self.header.record_bytes

    @property
    def slots(self) -> int:
        """The budget in experts."""
        return self._engine.budget

    def set_budget(self, expert_memory: str | int) -> None:
        """Change the budget while the model runs, from any thread: grows at once; shrinks at once by what no layer
        computes from, and by the rest as the layers that compute now end. ``"auto"`` counts the expert memory that is
        in use now as free."""
        held = self._engine.stats()["committed_slots"] * self.header.record_bytes
        self._engine.set_budget(self._slots(expert_memory, reserved=-held))

    def announce(self, wanted: Mapping[str, Sequence[int]], *, begin: bool = True) -> int:
        """Tell the engine which experts a queued batch will want; returns the batch's number.

        Args:
            wanted: MoE layer name -> distinct experts, most wanted first, in the order in which layers run.
            begin: False: no read begins before the engine's next event. Who is about to demand a layer announces the
                later ones so, and the layer's own reads come first. Not on a GPU.
        """
        layers = [(self.header.layers.index(name), list(experts)) for name, experts in wanted.items()]
        if begin:
            return (self._tiers or self._engine).announce(layers)
        if self._tiers is not None:
            raise RuntimeError(
                f"announce: begin is False, expected True on {self.device}, whose two tiers begin at once"
            )
        return self._engine.announce(layers, begin=False)

    def retire(self, batch: int) -> None:
        """The announced batch is done, or will never be computed."""
        (self._tiers or self._engine).retire(batch)

    @contextmanager
    def batch(
        self,
        number: int,
        table: Any = None,
        chosen: dict[int, Any] | None = None,
        *,
        entered: bool = False,
        judge: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """What this thread computes inside the block is the announced batch ``number`` with hash table ``table``;
        ``chosen`` takes what the layers' routers choose, ``judge`` is called at each MoE layer."""
        before = self.current
        try:
            self._thread.batch = _Batch(number, table, chosen, entered, judge)
            _C.set_current_batch(number)
            yield
        finally:
            self._thread.batch = before
            _C.set_current_batch(before.number)

    @property
    def current(self) -> _Batch:
        return getattr(self._thread, "batch", None) or _Batch()

    def stats(self) -> Stats:
        """Counters since the start or the last :meth:`reset_stats`; see :class:`sida_ext.experts.stats.Stats`."""
        stats = Stats.from_engine(self._engine.stats(), self.header.layers)
        states = {"lookahead": self.ahead, "announcing": self.announcing}
        return replace(stats, **{name: state.stats() for name, state in states.items() if state is not None})

    @property
    def pace(self) -> Callable[[], tuple[int, int, int, float, float]]:
        """A function that tells useful and wasted prefetches, loads, and the seconds of reads and of stalls, as
        ``stats()`` does, cheaply enough to be asked at every layer; it does not keep the runtime alive."""
        return self._engine.pace

    @property
    def announcing_pace(self) -> Callable[[], tuple[int, int, int, int, int, float, float]]:
        """The same for batches that were announced: experts that a layer wanted of those that its batch's table had
        named, and that it did not, before what ``pace`` tells."""
        return self._engine.announcing_pace

    def standings(self) -> list[LayerStanding]:
        """Where every expert is at this moment, layer by layer as in ``header.layers``."""
        places, raw = self._engine.standings()
        demands = memoryview(raw).cast("q")
        experts = self.header.num_experts
        return [
            LayerStanding(places[first : first + experts], demands[first : first + experts].tolist())
            for first in range(0, len(places), experts)
        ]

    def held(self) -> frozenset[tuple[int, int]]:
        """(MoE layer, expert) of all experts that are in memory or on their way at this moment."""
        places, _ = self._engine.standings()
        experts = self.header.num_experts
        return frozenset(divmod(at, experts) for at, place in enumerate(places) if place)

    def held_of(self, name: str) -> frozenset[int]:
        """The experts of the MoE layer ``name`` that are in memory or on their way at this moment."""
        places, _ = self._engine.standings()
        first = self.header.layers.index(name) * self.header.num_experts
        return frozenset(at for at, place in enumerate(places[first : first + self.header.num_experts]) if place)

    @property
    def host_memory(self) -> int | None:
        """Bytes of the pinned pool under a GPU's slots, with small buffers; None on the CPU, 0 if not pinned."""
        return self._tiers.pinned_bytes if self._tiers is not None else None

    def host_stats(self) -> Stats | None:
        """Counters of the host pool under a GPU's slots: its misses are reads of the store. None on the CPU."""
        if self._tiers is None:
            return None
        return Stats.from_engine(self._tiers.pool_stats(), self.header.layers)

    def reset_stats(self) -> None:
        self._engine.reset_stats()
        if self._tiers is not None:
            self._tiers.reset_pool_stats()

    def start_trace(self) -> None:
        """Record what happens when, from now on: reads by lane, computation by layer, stalls, predictions."""
        self._predictions.clear()
        self._engine.take_trace()
        self._tracing = True
        self._engine.set_trace(True)

    def record_prediction(self, name: str, begin: int, end: int) -> None:
        """Add a prediction's interval (``time.perf_counter_ns``) to a trace that is being recorded."""
        if self._tracing:
            self._predictions.append(Event("predict", "predictor", name, begin, end))

    def take_trace(self) -> list[Event]:
        """End the recording and return it, in order of time.

        Raises:
            RuntimeError: more happened than a trace holds; record a shorter run.
        """
        self._engine.set_trace(False)
        self._tracing = False
        raw, dropped = self._engine.take_trace()
        if dropped:
            raise RuntimeError(f"the trace holds {len(raw)} events and {dropped} did not fit; record a shorter run")
        events = list(self._predictions)
        for kind, lane, layer, expert, batch, begin, end in raw:
            name = self.header.layers[layer]
            if kind == "copy":
                events.append(Event(kind, f"lane {lane}", f"{name} expert {expert}", begin, end, batch))
            else:
                many = f", {expert} expert{'s' if expert > 1 else ''}" if expert else ""
                events.append(Event(kind, "compute", name + many, begin, end, batch))
        return sorted(events, key=lambda event: event.begin)

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """End the recording and write it for ui.perfetto.dev or chrome://tracing."""
        write_chrome_trace(self.take_trace(), path)

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """End every wait, stop the lanes, give the expert memory back. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        # Experts are read-only, so copies of a model share them and their budget.
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model whose experts are in an expert store cannot be pickled: its slots and lanes belong to this "
            "process; pickle the arguments and call sida_ext.from_pretrained in the other one (store: "
            f"{self.store_path})"
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.slots} slots of {format_bytes(self.header.record_bytes)}"
        return f"Runtime({str(self.store_path)!r}, {state}, eviction={self.eviction!r})"


def runtime_of(model: Any) -> Runtime:
    """The runtime of a model with swapped experts; raises ValueError for any other object."""
    runtime = getattr(model, "sida", None)
    if not isinstance(runtime, Runtime):
        raise ValueError(f"{type(model).__name__} has no expert runtime; load it with sida_ext.from_pretrained")
    return runtime
