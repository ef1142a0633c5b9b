"""``stream``: the hash-building thread runs ahead of the inference thread.

The hash-building thread takes batches from the caller's iterable, predicts their hash tables, decides the order in
which they run and announces them to the engine; the caller's thread computes them. Between the two stands one bounded
queue; an end, an error and the consumer's leaving all pass through it.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sida_ext._load import _C
from sida_ext.experts.cuda import on_predictor
from sida_ext.experts.runtime import Runtime, runtime_of
from sida_ext.models.layers import swapped_layers
from sida_ext.models.prompt_prediction import announcing_of
from sida_ext.prediction.drift import DriftWatch
from sida_ext.prediction.moe_facts import check_vocabulary
from sida_ext.prediction.prefetch import WASTE_COST, PrefetchPolicy, candidates_of
from sida_ext.prediction.protocol import HashTable, Predictor, check_table
from sida_ext.prediction.router_lookahead import within_room
from sida_ext.serving.ending import at_work, close_at_exit
from sida_ext.serving.lookahead import DEFAULT_LOOKAHEAD, choose_lookahead
from sida_ext.serving.overlap import bits_of, most_alike

__all__ = ["stream"]

ORDERS = ("given", "overlap")
# How long the end of a stream waits for a predictor that is still at work.
JOIN_SECONDS = 10.0
_starting = threading.Lock()


@dataclass
class _Item:
    """One batch on its way; ``error`` is set instead when the hash-building thread failed."""

    position: int = -1
    batch: dict[str, Any] | None = None
    table: HashTable | None = None
    wanted: dict[str, list[int]] = field(default_factory=dict)  # MoE layer -> experts to read ahead
    bits: int = 0  # the same experts, where another order may be chosen
    number: int = 0
    judged: bool = False  # something is announced, and may turn out to be in vain
    seconds: float = 0.0  # that its prediction took
    error: BaseException | None = None


class _Queue:
    """A bounded queue whose two ends know of each other's end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # of items that wait
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._closed = False  # the consumer has left
        self._ended = False  # the producer has put its last item

    def set_limit(self, limit: int) -> None:
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    def wait_for_room(self) -> bool:
        """Wait until an item can be put, which stays so for the one producer; False when the consumer has left."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._limit)
            return not self._closed

    def put(self, item: _Item) -> bool:
        """Wait for room; False when the consumer has left, which takes nothing any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._limit)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def get(self, timeout: float | None) -> _Item | None:
        """The next item; None at the end. Raises TimeoutError after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._items and not self._ended and not self._closed:
                # Short waits, so that Ctrl-C is taken on every platform.
                left = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError(
                        f"stream: no batch and no hash table came within {timeout} s; the caller's iterable or the "
                        "predictor is slower than the timeout"
                    )
                self._changed.wait(left)
            if self._closed:
                # Not by the consumer, which waits here: the program ends. To say that the batches end would be untrue.
                raise SystemExit
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> list[_Item]:
        """The consumer leaves; returns what it did not take."""
        with self._changed:
            self._closed = True
            left = list(self._items)
            self._items.clear()
            self._changed.notify_all()
            return left

    def waiting(self) -> list[_Item]:
        with self._changed:
            return list(self._items)

    @property
    def closed(self) -> bool:
        return self._closed


class _HashBuilder:
    """What the hash-building thread does; everything that it learns goes through the queue."""

    def __init__(
        self,
        runtime: Runtime,
        layers: list[str],
        num_experts: int,
        vocabulary: int,
        predictor: Predictor,
        prefetch: PrefetchPolicy,
        lookahead: int | None,
        order: str,
        window: int | None,
    ) -> None:
        self.vocabulary = vocabulary
        self.runtime, self.layers, self.num_experts = runtime, layers, num_experts
        self.prefetch, self.predictor, self.order = prefetch, predictor, order
        # Left open (None), the first batch tells how many experts one wants, and the rest follows from that.
        self.lookahead = 1 if lookahead is None else lookahead
        # A table that replaces the router is never wrong, and at no cost for waste nothing is in vain.
        judged = prefetch.routing != "predicted" and prefetch.waste_cost > 0
        self.announcing = announcing_of(runtime, predictor) if judged else None
        # Where nothing but what is read ahead depends on tables, a batch may go without one.
        self._may_skip = judged and prefetch.routing == "router" and order == "given"
        self._open = lookahead is None
        self._window = window
        self.queue = _Queue(self.lookahead)
        self.started = threading.Event()
        self._last = 0  # bits of the experts of the batch that was sent last

    def run(self, batches: Iterable[dict[str, Any]]) -> None:
        # One thread of its own and no team: a predictor is small, and a second team of workers would spin on the
        # processors that the model computes with.
        torch.set_num_threads(1)
        self.started.set()
        try:
            with at_work(), torch.no_grad():
                self._run(batches)
        except BaseException as error:
            # Not swallowed: the inference thread raises it in the caller, after the batches before it.
            self.queue.put(_Item(error=error))
        finally:
            self.queue.end()

    def _run(self, batches: Iterable[dict[str, Any]]) -> None:
        window: list[_Item] = []
        source = enumerate(batches)
        if self.announcing is not None:
            self.announcing.begin(shared=self.runtime.ahead is not None)
            self.announcing.predicts_ahead(self.lookahead)
        try:
            # In the given order a batch is taken when there is room for it; a window is gathered before that.
            while not self.queue.closed and (self._room() > 1 or self.queue.wait_for_room()):
                taken = next(source, None)
                if taken is None:
                    return
                window.append(self._predict(*taken))
                if self._open:
                    self._open = False
                    wanted = sum(len(experts) for experts in window[0].wanted.values())
                    self.lookahead = self._pick_lookahead(wanted)
                    self.queue.set_limit(self.lookahead)
                    if self.announcing is not None:
                        self.announcing.predicts_ahead(self.lookahead)
                if len(window) >= self._room() and not self._send(window):
                    return
        finally:
            # After a failure too: the batches before it are computed before it is raised.
            while window and self._send(window):
                pass

    def _pick_lookahead(self, wanted: int) -> int:
        """Batches to predict ahead with the budget that is in force, where a batch wants so many experts."""
        runtime, plan = self.runtime, self.runtime.read_plan
        picked = choose_lookahead(runtime.slots, runtime.header.total_experts, wanted, plan.disk_rate, plan.memory_rate)
        runtime.lookahead = picked
        return picked.batches

    def _room(self) -> int:
        """Batches that are gathered before one of them is chosen."""
        return (self._window or self.lookahead) if self.order == "overlap" else 1

    def _predict(self, position: int, batch: dict[str, Any]) -> _Item:
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch {position} is {type(batch).__name__}, expected a dict of the model's arguments")
        input_ids = batch.get("input_ids")
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            raise ValueError(f"batch {position} has no input_ids of shape [B, S], which the predictor reads")
        check_vocabulary(input_ids, None, self.vocabulary)
        mask = batch.get("attention_mask")
        if self.runtime.device.type != "cpu":
            input_ids, mask = on_predictor(self.predictor, input_ids, mask)
        if self._may_skip and self.announcing is not None and not self.announcing.may_predict():
            return _Item(position=position, batch=batch)
        begin = time.perf_counter_ns()
        with torch.profiler.record_function("sida::predict"):
            table = self.predictor.predict(input_ids, mask, top_k=candidates_of(self.predictor, self.num_experts))
        # MKL has a number of threads of its own; a team that waits would keep the model's from waiting actively.
        _C.release_threads()
        end = time.perf_counter_ns()
        self.runtime.record_prediction(f"batch {position}", begin, end)
        check_table(table, self.predictor, input_ids, len(self.layers), self.num_experts)
        wanted = dict(zip(self.layers, self.prefetch.experts_by_layer(table, self.num_experts), strict=True))
        bits = bits_of(wanted.values(), self.num_experts) if self.order == "overlap" else 0
        return _Item(position=position, batch=batch, table=table, wanted=wanted, bits=bits, seconds=(end - begin) / 1e9)

    def _send(self, window: list[_Item]) -> bool:
        """Announce one batch of the window and put it in the queue: the oldest, or the one that shares most experts
        with the batch before it. A batch is never overtaken by more than a window of others."""
        # First the room, then the announcement: what is announced and waits is never more than the look-ahead.
        if not self.queue.wait_for_room():
            return False
        choice = 0
        if self.order == "overlap" and len(window) > 1 and window[0].position > window[-1].position - 2 * self._room():
            choice = most_alike(self._last, [item.bits for item in window])
        item = window.pop(choice)
        self._last = item.bits
        self._announce(item)
        if not self.queue.put(item):
            self.runtime.retire(item.number)
            return False
        return True

    def _announce(self, item: _Item) -> None:
        """Announce a batch, as far as reading ahead is worth it at present."""
        wanted = item.wanted
        if self.announcing is not None:
            room = self.announcing.room(self.runtime.header.total_experts)
            wanted = dict(within_room(list(wanted.items()), room))
            item.judged = bool(wanted)
            if not room:
                self._take_back()
        self.runtime.read_early(self.announcing is None or self.announcing.early)
        item.number = self.runtime.announce(wanted)

    def _take_back(self) -> None:
        """What was announced before it was known to be in vain."""
        for item in self.queue.waiting():
            self.runtime.retire(item.number)

    def judge(self, number: int) -> None:
        """At a layer of the announced batch ``number``: it, and what waits, is taken back where it is in vain."""
        if self.announcing is not None and self.announcing.in_vain():
            self.runtime.retire(number)
            self._take_back()


def _without_predictor(batches: Iterable[dict[str, Any]]) -> Iterator[_Item]:
    for position, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch {position} is {type(batch).__name__}, expected a dict of the model's arguments")
        yield _Item(position=position, batch=batch)


def _from_queue(queue: _Queue, timeout: float | None) -> Iterator[_Item]:
    while (item := queue.get(timeout)) is not None:
        if item.error is not None:
            raise item.error
        yield item


def _compute(
    model: PreTrainedModel,
    runtime: Runtime,
    items: Iterator[_Item],
    watch: DriftWatch | None = None,
    builder: _HashBuilder | None = None,
) -> Iterator[Any]:
    """Outputs in the caller's order, whatever order the items come in."""
    announcing = None if builder is None else builder.announcing
    finished: dict[int, Any] = {}
    turn = 0
    while True:
        asked = time.monotonic()
        with at_work():
            item = next(items, None)
        if item is None:
            return
        begin = time.monotonic()
        chosen: dict[int, torch.Tensor] | None = None if watch is None else {}
        judge = None
        if builder is not None and item.judged:
            judge = functools.partial(builder.judge, item.number)
        try:
            with at_work(), torch.no_grad(), runtime.batch(item.number, item.table, chosen, judge=judge):
                finished[item.position] = model(**item.batch)  # type: ignore[arg-type]
        finally:
            if item.number:
                runtime.retire(item.number)
        if announcing is not None and item.position > 0:  # the first finds the memory cold
            # An iterable that is slow is not the predictor's fault.
            waited = min(begin - asked, item.seconds)
            assert item.batch is not None
            tokens = item.batch["input_ids"].numel()
            announcing.done(waited + time.monotonic() - begin, tokens, None if item.table is None else item.seconds)
        while turn in finished:
            yield finished.pop(turn)
            turn += 1
        # After the outputs, so that nobody waits for a figure of the past.
        if watch is not None and item.table is not None and chosen and len(chosen) == item.table.layers:
            rows = item.table.expert_index.shape[:2]  # layers of the experts seam tell [tokens, choices]
            each = [chosen[layer].cpu().reshape(*rows, -1) for layer in sorted(chosen)]
            watch.observe(item.table, torch.stack(each, dim=2))


def _watch(model: PreTrainedModel, runtime: Runtime, predictor: Predictor) -> DriftWatch | None:
    """The watch over this predictor's hits, kept from stream to stream; None where its report gives no rate."""
    expected = getattr(predictor, "held_out_top1", None)
    if expected is None:
        return None
    known = runtime.drift
    if known is None or known[0] is not predictor:
        source = getattr(model, "name_or_path", "") or "MODEL"
        folder = getattr(predictor, "path", None) or "PREDICTOR"
        runtime.drift = known = (
            predictor,
            DriftWatch(expected, retrain=f"sida train {source} TEXT... -o {folder}"),
        )
    return known[1]


def stream(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    predictor: Predictor | None = None,
    lookahead: int | str = DEFAULT_LOOKAHEAD,
    order: str = "given",
    *,
    timeout: float | None = None,
    waste_cost: float = WASTE_COST,
    drift: DriftWatch | bool = True,
    window: int | None = None,
) -> Iterator[Any]:
    """Run batches through a model whose experts are offloaded, predicting the experts of the next ones meanwhile.

    Args:
        model: from :func:`sida_ext.from_pretrained` or :func:`sida_ext.swap_experts`.
        batches: dicts of the model's arguments, with ``input_ids`` [B, S] and, where there is padding,
            ``attention_mask``. Taken by the hash-building thread, at most ``lookahead`` (with ``order="overlap"`` and
            ``window`` more) ahead of the batch that computes.
        predictor: names the experts; None: the model's own (``predictor=`` of ``from_pretrained``); without one the
            batches run one after the other and experts are loaded when they are demanded.
        lookahead: announced batches that wait at the most, the one that computes not counted. ``"auto"``: picked from
            the measured rates of memory and disk, the budget and what the first batch wants; ``model.sida.lookahead``
            then says how many, and why.
        order: ``"given"``, or ``"overlap"``: batches inside a window run in an order in which neighbours share experts.
        timeout: seconds to wait for the next hash table; None: as long as the iterable and the predictor take.
        waste_cost: what reading an expert that no token wants costs, as a share of what a miss costs. Of the candidates
            of a predictor with calibrated probabilities, those are read ahead whose probability of being needed by the
            batch is above waste_cost / (1 + waste_cost).
        drift: warn once (:class:`~sida_ext.prediction.drift.DriftWarning`) when the router no longer chooses what the
            predictor names as often as its report says; False: do not compare; a
            :class:`~sida_ext.prediction.drift.DriftWatch`: that one. A model with ``routing="predicted"`` asks no
            router, and is not watched.
        window: with ``order="overlap"``, batches that are gathered before the next one is chosen of them; None: as many
            as ``lookahead``. A batch is never overtaken by more than a window of others.

    Yields:
        The model's outputs, one for each batch, always in the caller's order, computed without gradients.

    Raises:
        Whatever the iterable, the predictor or the model raise, after the outputs before it; PredictorError for an
        answer that is no hash table of the batch.
    """
    runtime = runtime_of(model)
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
    if lookahead != "auto" and (isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 1):
        raise ValueError(f"lookahead is {lookahead!r}, expected a number of batches of at least 1, or 'auto'")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window is {window!r}, expected a number of batches of at least 1, or None")
    predictor = predictor if predictor is not None else runtime.predictor
    if predictor is not None and not callable(getattr(predictor, "predict", None)):
        raise TypeError(f"predictor is {type(predictor).__name__}, expected an object with a predict method")
    layers = swapped_layers(model)
    if predictor is None:
        if any(layer.routing != "router" for layer in layers):
            raise ValueError(
                f"routing={layers[0].routing!r} needs a predictor, and neither stream nor the model was given one"
            )
        if order == "overlap":
            raise ValueError("order='overlap' needs a predictor, and neither stream nor the model was given one")
        return _compute(model, runtime, _without_predictor(batches))
    covered = [layer for layer in layers if layer.table_layer is not None]
    policy = PrefetchPolicy(waste_cost, layers[0].routing, layers[0].confidence)
    watch = None
    if drift is not False and layers[0].routing != "predicted":
        watch = drift if isinstance(drift, DriftWatch) else _watch(model, runtime, predictor)
    names = [layer.name for layer in covered]
    builder = _HashBuilder(
        runtime,
        names,
        runtime.header.num_experts,
        cast(Tensor, model.get_input_embeddings().weight).shape[0],  # of now: it may have been resized
        predictor,
        policy,
        None if lookahead == "auto" else int(lookahead),
        order,
        window,
    )
    return _stream(model, runtime, builder, batches, timeout, watch)


def _stream(
    model: PreTrainedModel,
    runtime: Runtime,
    builder: _HashBuilder,
    batches: Iterable[dict[str, Any]],
    timeout: float | None,
    watch: DriftWatch | None,
) -> Iterator[Any]:
    queue = builder.queue
    close_at_exit(queue)
    thread = threading.Thread(target=builder.run, args=(batches,), name="sida-hash-builder", daemon=True)
    # torch gives the number last set to every thread that is born later; the builder's is its own. One stream at a
    # time: another's thread would take the builder's number for its own, and keep it.
    with _starting:
        threads = torch.get_num_threads()
        thread.start()
        builder.started.wait(JOIN_SECONDS)
        torch.set_num_threads(threads)
    try:
        yield from _compute(model, runtime, _from_queue(queue, timeout), watch, builder)
    finally:
        for item in queue.close():
            if item.number:
                runtime.retire(item.number)
        # A generator that nobody closed is closed by the interpreter's end, when no other thread runs any more.
        if not sys.is_finalizing():
            thread.join(JOIN_SECONDS)
        if thread.is_alive() and not sys.is_finalizing():
            warnings.warn(
                f"stream: the hash-building thread did not end within {JOIN_SECONDS:.0f} s; the caller's iterable or "
                f"{type(builder.predictor).__name__}.predict is still at work, and will be left to end by itself",
                RuntimeWarning,
                stacklevel=2,
            )
