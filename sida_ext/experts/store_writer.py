"""Writing an expert store: experts as aligned records, rounded to the store's type.

The file format is described in ``csrc/experts/store.h``.
"""

from __future__ import annotations

import fcntl
import glob
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sida_ext._load import _C
from sida_ext.experts.quantise import Quantised, is_quantised, quantise
from sida_ext.experts.source import ExpertSource, ExpertWeights
from sida_ext.experts.store import DTYPES, StoreHeader

__all__ = ["Rounding", "fill_record", "format_of", "write_store"]

# Bytes kept free on the disk beside a new store, so that packing never fills it up.
DISK_RESERVE = 256 << 20


@dataclass
class Rounding:
    """Squared errors and squares of the weights of a layer, to say how much quantising moved them."""

    error: float = 0.0
    size: float = 0.0

    def add(self, weight: Tensor, quantised: Quantised) -> None:
        exact = weight.float()
        self.error += float((quantised.dequantise() - exact).square_().sum(dtype=torch.float64))
        self.size += float(exact.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.size) if self.size > 0 else 0.0


def format_of(source: ExpertSource, dtype: str) -> _C.ExpertFormat:
    """Sizes and offsets of a record of ``source`` in ``dtype``."""
    return _C.ExpertFormat(source.d_model, source.d_ff, dtype, source.gated, source.biased)


def _put(record: np.ndarray, tensor: Tensor, offset: int) -> None:
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    record[offset : offset + raw.size] = raw


def _stored(weight: Tensor | Quantised, dtype: str, where: str, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """What a record holds of a matrix: its elements, and its scales where it is quantised."""
    if isinstance(weight, Quantised):
        if weight.dtype == dtype:
            return weight.values, weight.scale
        weight = weight.dequantise()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where} holds NaN or infinity; the checkpoint is damaged")
    if is_quantised(dtype):
        quantised = quantise(weight, dtype)
        rounding.add(weight, quantised)
        return quantised.values, quantised.scale
    stored = weight.to(DTYPES[dtype])
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"{where} holds {weight.abs().max().item():g}, beyond the range of {dtype}; pack with --dtype bfloat16"
        )
    return stored, None


def _check_shape(given: Tensor | Quantised | None, expected: tuple[int, ...] | None, where: str) -> None:
    if given is None:
        found, kind, right = None, "", True
    elif isinstance(given, Quantised):
        found, kind, right = (*given.values.shape[:-1], given.columns), f"{given.dtype} of shape ", True
    else:
        found, kind, right = tuple(given.shape), f"{given.dtype} of shape ", given.is_floating_point()
    if found != expected or not right:
        raise ValueError(f"{where} is {kind}{found}, expected a floating-point type of shape {expected}")


def fill_record(
    record: np.ndarray, source: ExpertSource, dtype: str, weights: ExpertWeights, where: str, rounding: Rounding
) -> None:
    """Write one expert into ``record`` [record_bytes] uint8, whose gaps between the parts stay as they are (zero).

    Args:
        rounding: takes how far the weights were moved, if they are quantised here.

    Raises:
        ValueError: a shape is not the source's, or a number cannot be held in ``dtype``; ``where`` begins the message.
    """
    fmt, rows = format_of(source, dtype), source.d_ff * (2 if source.gated else 1)
    matrices = (
        ("wi", weights.wi, (rows, source.d_model), fmt.wi_offset, fmt.wi_scale_offset),
        ("wo", weights.wo, (source.d_model, source.d_ff), fmt.wo_offset, fmt.wo_scale_offset),
    )
    biases = (
        ("wi_bias", weights.wi_bias, (rows,) if source.biased else None, fmt.wi_bias_offset),
        ("wo_bias", weights.wo_bias, (source.d_model,) if source.biased else None, fmt.wo_bias_offset),
    )
    for name, given, shape, *_ in (*matrices, *biases):
        _check_shape(given, shape, f"{where}: {name}")
    for name, weight, _, offset, scale_offset in matrices:
        stored, scale = _stored(weight, dtype, f"{where}: {name}", rounding)
        _put(record, stored, offset)
        if scale is not None:
            _put(record, scale, scale_offset)
    for name, bias, _, offset in biases:
        if bias is None:
            continue
        if not bool(torch.isfinite(bias).all()):
            raise ValueError(f"{where}: {name} holds NaN or infinity; the checkpoint is damaged")
        _put(record, bias.float(), offset)


def _remove_stale_partials(path: Path) -> None:
    """Remove what packers of ``path`` left that were killed: a living one holds the lock of its file."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        # Its packer may just have finished, or still be at work.
        with suppress(FileNotFoundError, BlockingIOError), open(stale, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink()


@contextmanager
def _partial_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new locked file beside ``path`` and its name; gone at the end, unless it has been renamed."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        with open(partial, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Between the two lines above another packer may have taken it for one that was left behind.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            try:
                yield file, partial
            finally:
                partial.unlink(missing_ok=True)
            return


def write_store(
    source: ExpertSource,
    path: str | os.PathLike[str],
    dtype: str = "bfloat16",
    progress: Callable[[int, int], None] | None = None,
) -> StoreHeader:
    """Write the experts of ``source`` to ``path``, one expert in memory at a time.

    The file appears under its name only when it is complete and synced; what stood there before stays until then.
    What a packer of the same store left when it was killed is removed first.

    Args:
        dtype: float32, bfloat16, float16, or one of :mod:`sida_ext.experts.quantise`: int8, int4, mxfp4. A matrix that
            the source has in this very type is kept bit for bit.
        progress: called with (experts written, experts in all).

    Raises:
        ValueError: an unknown dtype, or weights that it cannot hold. OSError: the disk is full or fails.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    path = Path(path)
    fmt = format_of(source, dtype)
    total = len(source.layers) * source.num_experts
    roundings = [Rounding() for _ in source.layers]

    def header(checksums: Sequence[tuple[int, int, int, int]], data_offset: int) -> StoreHeader:
        return StoreHeader(
            version=2 if source.biased or dtype in ("int4", "mxfp4") else 1,
            dtype=dtype,
            d_model=source.d_model,
            d_ff=source.d_ff,
            gated=source.gated,
            biased=source.biased,
            rounding=tuple(layer.relative for layer in roundings) if is_quantised(dtype) else (),
            layers=tuple(source.layers),
            num_experts=source.num_experts,
            record_bytes=fmt.record_bytes,
            data_offset=data_offset,
            checksums=tuple(checksums),
            fingerprint=source.fingerprint,
            source=source.name,
            family=source.family,
            layout=source.layout,
            top_k=tuple(source.top_k),
            activation=source.activation,
            gate=source.gate,
        )

    # Checksums and roundings have a fixed width, so the header's length is known before they are; 2**47 stands for any
    # offset.
    longest = len(header([(0, 0, 0, 0)] * total, 2**47).to_json()) + _C.store_prologue_bytes
    data_offset = -(-longest // 4096) * 4096
    needed = data_offset + total * fmt.record_bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_partials(path)
    free = shutil.disk_usage(path.parent).free
    if free < needed + DISK_RESERVE:
        raise OSError(
            f"{path}: the store needs {needed / 2**30:.2f} GiB and a reserve of {DISK_RESERVE >> 20} MiB, but "
            f"{free / 2**30:.2f} GiB are free there; free some space or choose another place"
        )
    checksums: list[tuple[int, int, int, int]] = []
    with _partial_file(path) as (file, partial):
        file.seek(data_offset)
        record = np.zeros(fmt.record_bytes, dtype=np.uint8)
        for layer, layer_name in enumerate(source.layers):
            for index in range(source.num_experts):
                where = f"{source.name}: {layer_name} expert {index}"
                fill_record(record, source, dtype, source.expert(layer, index, dtype), where, roundings[layer])
                a, b, c, d = _C.record_checksum(record)
                checksums.append((a, b, c, d))
                file.write(record.data)
                if progress is not None:
                    progress(len(checksums), total)
        done = header(checksums, data_offset)
        file.seek(0)
        file.write(_C.store_prologue(done.to_json()))
        file.write(done.to_json())
        file.flush()
        os.fsync(file.fileno())
        # The engine reads past the page cache; what the writing left there only takes room.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return done
