"""One set of options for everything that serves a model: Python, the command line and the server.

An option is added here and nowhere else in Python: ``from_pretrained``, ``swap_experts`` and ``Runtime`` take each
field of :class:`Options` as an argument of that name, or a whole object as ``options=``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from sida_ext._load import _C

__all__ = [
    "DENSE_DTYPES",
    "DTYPES",
    "EVICTIONS",
    "LOW_BIT_DTYPES",
    "MISSES",
    "PINS",
    "ROUTINGS",
    "Options",
    "options_from",
]

DTYPES = ("float32", "float16", "bfloat16", "int8", "int4", "mxfp4")
DENSE_DTYPES = (None, "bfloat16", "int8", "int4")
EVICTIONS = ("next_use", "lru", "lfu", "fifo")
ROUTINGS = ("router", "predicted", "confident")
PINS = ("require", "try")
MISSES = ("wait", "low_bit")
LOW_BIT_DTYPES = ("int4", "mxfp4")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is served. Checked when it is made; what needs the store or the machine is checked when it is used.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``: where the model computes; ``expert_memory`` is of its memory.
        expert_memory: the hard budget of expert memory: bytes, ``"2GiB"``, ``"25%"`` of the experts, or ``"auto"``.
        host_memory: the pinned pool between the store and a GPU: bytes, ``"8GiB"``, ``"50%"`` of the experts; None: all
            experts if they fit in half of the memory that is free, else as many, which is said. Not for the CPU.
        expert_dtype: what experts are packed as at first use: float32, float16, bfloat16, int8 (one factor for each
            row), int4 or mxfp4 (one for each 32 columns; :mod:`sida_ext.experts.quantise`). With ``store`` they are
            what the store holds.
        dense_dtype: what every other large matrix (attention, dense and shared feed-forward, the head) is kept as, and
            computed from by ``torch.ops.sida.linear``: bfloat16, int8 or int4; None: as transformers has it.
            Routers, norms and embeddings are left alone (:mod:`sida_ext.models.dense`). On the CPU only.
        routing: ``"router"``: the model's own router decides, predictions only prefetch, the output does not depend on
            budget or timing. ``"predicted"``: the hash table replaces router and scaling factors (SiDA as published).
            ``"confident"``: the table for a token and layer where its probability reaches ``confidence``, the router
            elsewhere. Other than ``"router"`` for Switch Transformers only.
        confidence: with ``routing="confident"``, the probability (``HashTable.probability``, or ``gate`` where a
            predictor gives none) from which the table decides. 0 gives the bits of ``"predicted"``, more than 1 those
            of ``"router"``. Expert capacity binds the router's choices alone; the router's choice for a token that the
            table decides still takes its place in it.
        store: an expert store made by ``sida pack``; None: the packed one in the cache.
        store_cache: folder of packed stores; None: ``$SIDA_CACHE``, else ``~/.cache/sida``.
        allow_pickle: read ``pytorch_model.bin`` files (with ``weights_only=True``); refused without it.
        lanes: reads under way at once; None: measured (:mod:`sida_ext.experts.read_plan`). On a GPU: copies to it,
            None: 2.
        read_bytes: largest single read, a multiple of 4096; 0: an expert at once; None: measured.
        eviction: next_use, lru, lfu or fifo.
        on_miss: what a layer does with an expert that is not in expert memory when nothing else is left to compute:
            ``"wait"``, which is exact; or ``"low_bit"``: compute it from an int4 copy, and read its record for the next
            time. The copies of all experts stay in memory beside ``expert_memory``. The output then depends on timing.
        max_low_bit: with ``on_miss="low_bit"``, share of the choices (an expert by a token) that copies serve at the
            most, to the nearest millionth; a layer waits for the others. It holds at every moment since the start or
            the last ``reset_stats()``, and what is left of it is saved up for 8192 choices at the most.
        low_bit_store: with ``on_miss="low_bit"``, an int4 or mxfp4 store of the same checkpoint; None: packed at first
            use as int4, into the cache.
        wait_deadline: seconds after which a wait for an expert raises TimeoutError.
        pin: ``"require"``: an error, with the limits, if the pool of a GPU machine cannot be pinned; ``"try"``: then it
            goes on with memory that is not, and slower copies.
        populate: ask the system for the budget's memory at the start, in the background, so that the first loads do not
            wait for it; False: as experts come.
        read_ahead: in a prompt each layer shows its input to the next layer's router, and what that names is read while
            the layers between compute (:class:`~sida_ext.prediction.router_lookahead.RouterLookahead`, with
            ``prompts_only``). For models of the experts seam on the CPU whose ``predictor`` holds no RouterLookahead;
            False: nothing is read that no predictor names.
        faults: injected faults, for tests: see ``_C.Faults``.

    Raises:
        ValueError, TypeError: an option that cannot work; the message names it, its value and what is expected.
    """

    device: str | torch.device = "cpu"
    expert_memory: str | int = "2GiB"
    host_memory: str | int | None = None
    expert_dtype: str = "bfloat16"
    dense_dtype: str | None = None
    routing: str = "router"
    confidence: float = 0.9
    store: str | os.PathLike[str] | None = None
    store_cache: str | os.PathLike[str] | None = None
    allow_pickle: bool = False
    lanes: int | None = None
    read_bytes: int | None = None
    eviction: str = "next_use"
    on_miss: str = "wait"
    max_low_bit: float = 0.05
    low_bit_store: str | os.PathLike[str] | None = None
    wait_deadline: float = 60.0
    pin: str = "require"
    populate: bool = True
    read_ahead: bool = True
    faults: _C.Faults | None = None

    def __post_init__(self) -> None:
        checked: tuple[tuple[str, tuple[str | None, ...]], ...] = (
            ("expert_dtype", DTYPES),
            ("dense_dtype", DENSE_DTYPES),
            ("routing", ROUTINGS),
            ("eviction", EVICTIONS),
            ("pin", PINS),
            ("on_miss", MISSES),
        )
        for name, allowed in checked:
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, allowed))}")
        if not _is_number(self.confidence) or not self.confidence >= 0:
            raise ValueError(
                f"confidence is {self.confidence!r}, expected a probability from which the table decides: 0 for "
                "always, above 1 for never"
            )
        if not _is_number(self.wait_deadline) or not self.wait_deadline > 0:
            raise ValueError(f"wait_deadline is {self.wait_deadline!r}, expected seconds above 0")
        if self.lanes is not None and (not _is_whole(self.lanes) or self.lanes < 1):
            raise ValueError(f"lanes is {self.lanes!r}, expected a number of reads of at least 1, or None")
        if self.read_bytes is not None and (not _is_whole(self.read_bytes) or self.read_bytes < 0):
            raise ValueError(f"read_bytes is {self.read_bytes!r}, expected a multiple of 4096, 0 or None")
        if not _is_number(self.max_low_bit) or not 0 <= self.max_low_bit <= 1:
            raise ValueError(f"max_low_bit is {self.max_low_bit!r}, expected a share of the choices, 0 to 1")
        self._check_on_miss()
        for name in ("allow_pickle", "populate", "read_ahead"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected True or False")

    def _check_on_miss(self) -> None:
        if self.on_miss == "wait":
            if self.low_bit_store is not None:
                raise ValueError(
                    f"low_bit_store is {os.fspath(self.low_bit_store)!r}, expected None with on_miss='wait', which "
                    "needs no copies"
                )
            return
        if self.expert_dtype in LOW_BIT_DTYPES:
            raise ValueError(
                f"on_miss is 'low_bit', expected 'wait' with expert_dtype={self.expert_dtype!r}: the experts have "
                "4 bits a weight already"
            )
        if str(self.device).partition(":")[0] != "cpu":
            raise ValueError(
                f"on_miss is 'low_bit', expected 'wait' on {str(self.device)!r}: copies serve the CPU alone"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


NAMES = tuple(field.name for field in fields(Options))


def options_from(options: Options | None, arguments: dict[str, Any], **defaults: Any) -> Options:
    """The options of a call, taken out of its keyword arguments.

    Args:
        options: the caller's ``options=``; None: the defaults.
        arguments: changed: the fields of :class:`Options` are taken out of it.
        defaults: of the callee, where they differ from those of :class:`Options`; they yield to both.

    Raises:
        TypeError: ``options`` is something else.
    """
    if options is not None and not isinstance(options, Options):
        raise TypeError(f"options is {type(options).__name__}, expected sida_ext.Options")
    given = {name: arguments.pop(name) for name in NAMES if name in arguments}
    return replace(options, **given) if options is not None else Options(**{**defaults, **given})
