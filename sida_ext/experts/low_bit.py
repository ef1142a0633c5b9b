"""Low-bit copies of all experts, resident beside expert memory: what serves an expert that is not there in time.

The copies lie in an engine of their own, over an int4 or mxfp4 store of the same checkpoint, with a slot for every
expert: they are read, and checked, once, and never leave.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from sida_ext._load import _C
from sida_ext.errors import StoreError
from sida_ext.experts.budget import available_memory, format_bytes
from sida_ext.experts.options import LOW_BIT_DTYPES
from sida_ext.experts.store import StoreHeader, open_store

__all__ = ["LowBitCopies"]

SHAPE = ("layers", "num_experts", "d_model", "d_ff", "gated", "biased")


class LowBitCopies:
    """Every expert of a model in 4 bits, about 4.5 bits a weight with the scales.

    Args:
        path: an int4 or mxfp4 store.
        exact: header of the store whose experts they stand in for.

    Attributes:
        header: of the store of copies.
        bytes: of memory that they take, all of it from :meth:`load` on.

    Raises:
        StoreError: the store is damaged, of another checkpoint or not of 4 bits.
    """

    def __init__(self, path: str | os.PathLike[str], exact: StoreHeader) -> None:
        self.path = os.fspath(path)
        self._store, self.header = open_store(path)
        if self.header.dtype not in LOW_BIT_DTYPES:
            raise StoreError(
                f"{self.path}: its experts are {self.header.dtype}, expected {' or '.join(LOW_BIT_DTYPES)}; pack the "
                "checkpoint: sida pack CHECKPOINT -o STORE --dtype int4"
            )
        if exact.dtype in LOW_BIT_DTYPES:
            raise ValueError(
                f"on_miss is 'low_bit', expected 'wait' with a store of {exact.dtype}: the experts have 4 bits already"
            )
        for field in SHAPE:
            found, expected = getattr(self.header, field), getattr(exact, field)
            if found != expected:
                raise StoreError(
                    f"{self.path}: {field} is {found}, expected {expected}, as in the store of the experts"
                )
        if self.header.family and exact.family and self.header.fingerprint != exact.fingerprint:
            raise StoreError(
                f"{self.path}: packed from a checkpoint with fingerprint {self.header.fingerprint} "
                f"({self.header.source}), expected {exact.fingerprint}, that of the experts"
            )
        self.bytes = self.header.experts_bytes
        self.engine: _C.TransferEngine | None = None

    def check_room(self, budget: int) -> None:
        """Refuse copies that do not fit into the memory that is free now, control groups respected, beside a budget of
        ``budget`` bytes.

        Raises:
            ValueError: with the numbers.
        """
        free = available_memory()
        if self.bytes + budget <= free:
            return
        raise ValueError(
            f"on_miss is 'low_bit', whose {self.header.dtype} copies of all {self.header.total_experts} experts take "
            f"{format_bytes(self.bytes)} beside an expert_memory of {format_bytes(budget)}, but "
            f"{format_bytes(free)} are free; "
            + (f"lower expert_memory to {format_bytes(free - self.bytes)}, or " if self.bytes < free else "")
            + "use on_miss='wait'"
        )

    def load(self, *, lanes: int, read_bytes: int, wait_deadline_ms: int, say: Callable[[str], None]) -> None:
        """Read all of them into memory; takes as long as the disk takes.

        Args:
            lanes, read_bytes, wait_deadline_ms: as for the experts' own engine.
            say: is told what is read, and how much.
        """
        say(
            f"on_miss='low_bit': {self.header.dtype} copies of all {self.header.total_experts} experts stay in memory, "
            f"{format_bytes(self.bytes)} beside expert_memory; output depends on which experts are read in time"
        )
        engine = _C.TransferEngine(
            self._store,
            slots=self.header.total_experts,
            lanes=lanes,
            read_bytes=read_bytes,
            eviction="lru",
            wait_deadline_ms=wait_deadline_ms,
            faults=_C.Faults(),
            populate=False,
        )
        try:
            engine.load_all()
        except BaseException:
            engine.close()
            raise
        self.engine = engine
