"""The cache of packed stores, and whether a store is a checkpoint's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np

from sida_ext._load import _C
from sida_ext.errors import StoreError
from sida_ext.experts.folders import default_cache
from sida_ext.experts.source import ExpertSource
from sida_ext.experts.store import StoreHeader, open_store
from sida_ext.experts.store_writer import Rounding, fill_record, format_of, write_store

__all__ = ["check_source", "ensure_store"]


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process packs a store; the others wait for it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"waiting for another process that packs {path.with_suffix('')}")
        lock.acquire(timeout=4 * 3600)
    try:
        yield
    finally:
        lock.release()


def ensure_store(
    source: ExpertSource,
    dtype: str,
    cache: str | os.PathLike[str] | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The packed store of ``source`` in the cache folder, packed now if it is not there yet.

    A store in the cache that cannot be opened, or is of another checkpoint, is packed again, and said so.
    """
    folder = Path(cache) if cache is not None else default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source.fingerprint}-{dtype}.sida"

    def usable() -> bool:
        if not path.exists():
            return False
        try:
            _, header = open_store(path)
        except StoreError as error:
            say(f"packing again: {error}")
            return False
        return header.fingerprint == source.fingerprint and header.dtype == dtype

    if not usable():
        with _lock(path.with_suffix(".sida.lock"), say):
            if not usable():
                say(f"packing {source.name} as {dtype} into {path}")
                write_store(source, path, dtype, progress)
    return path


def check_source(header: StoreHeader, source: ExpertSource, path: str) -> None:
    """Refuse a store that was packed from other weights.

    A store without a ``family`` is of a version that knew a checkpoint by samples of its bytes: its records' checksums
    are compared with those of the checkpoint's experts, which reads them all.

    Raises:
        StoreError: it was; the message says how it is known.
    """
    if header.fingerprint == source.fingerprint:
        return
    if not header.family and _same_records(header, source):
        return
    raise StoreError(
        f"{path}: packed from a checkpoint with fingerprint {header.fingerprint} ({header.source}), expected "
        f"{source.fingerprint}; pack this checkpoint: sida pack CHECKPOINT -o STORE"
    )


def _same_records(header: StoreHeader, source: ExpertSource) -> bool:
    shape = (tuple(source.layers), source.num_experts, source.d_model, source.d_ff, source.gated, source.biased)
    if shape != (header.layers, header.num_experts, header.d_model, header.d_ff, header.gated, header.biased):
        return False
    record = np.zeros(format_of(source, header.dtype).record_bytes, dtype=np.uint8)
    expected = iter(header.checksums)
    for layer, name in enumerate(source.layers):
        for index in range(source.num_experts):
            where = f"{name} expert {index}"
            fill_record(record, source, header.dtype, source.expert(layer, index, header.dtype), where, Rounding())
            if tuple(_C.record_checksum(record)) != next(expected):
                return False
    return True
