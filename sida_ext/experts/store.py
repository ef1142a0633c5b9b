"""The expert store: write experts as aligned records, open the result.

The file format is described in ``csrc/experts/store.h``; this module owns the JSON header inside it.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sida_ext._load import _C
from sida_ext.errors import StoreError
from sida_ext.experts.source import ExpertSource, ExpertWeights

__all__ = ["DTYPES", "StoreHeader", "fill_record", "format_of", "open_store", "quantize_rows", "write_store"]

# The newest format that is read. A store is written in the oldest that holds it: 2 has biases.
FORMAT_VERSION = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# Bytes kept free on the disk beside a new store, so that packing never fills it up.
DISK_RESERVE = 256 << 20


@dataclass(frozen=True)
class StoreHeader:
    """What a store says of itself. Sizes in bytes. A store that was packed before the last fields were known has their
    defaults, an empty ``family`` among them."""

    version: int
    dtype: str
    d_model: int
    d_ff: int
    gated: bool
    layers: tuple[str, ...]
    num_experts: int
    record_bytes: int
    data_offset: int
    checksums: tuple[tuple[int, int, int, int], ...]
    fingerprint: str
    source: str
    biased: bool = False
    family: str = ""
    layout: str = ""
    top_k: tuple[int, ...] = ()
    activation: str = ""
    gate: str = ""

    @property
    def total_experts(self) -> int:
        return len(self.layers) * self.num_experts

    @property
    def experts_bytes(self) -> int:
        return self.total_experts * self.record_bytes

    def to_json(self) -> bytes:
        fields = {
            "version": self.version,
            "dtype": self.dtype,
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "gated": self.gated,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "record_bytes": self.record_bytes,
            "data_offset": self.data_offset,
            "checksum": "crc32c-quarters",
            "checksums": ["".join(f"{part:08x}" for part in record) for record in self.checksums],
            "fingerprint": self.fingerprint,
            "source": self.source,
        }
        if self.biased:
            fields["biased"] = True
        if self.family:
            fields |= {
                "family": self.family,
                "layout": self.layout,
                "top_k": list(self.top_k),
                "activation": self.activation,
                "gate": self.gate,
            }
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: str, path: str) -> StoreHeader:
        """Parse and check a header; every field is checked before a record is believed.

        Raises:
            StoreError: names the file, the field, the value found and the one expected.
        """

        def bad(field: str, found: object, expected: str) -> StoreError:
            return StoreError(
                f"{path}: header field {field!r} is {found!r}, expected {expected}; pack the checkpoint again"
            )

        try:
            fields = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{path}: the header is not JSON ({error}); pack the checkpoint again") from error
        if not isinstance(fields, dict):
            raise bad("header", type(fields).__name__, "a JSON object")
        version = fields.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise bad("version", version, "a positive integer")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{path}: written in store format {version}, this sida_ext reads up to {FORMAT_VERSION}; "
                "update sida_ext or pack the checkpoint again"
            )
        if fields.get("dtype") not in DTYPES:
            raise bad("dtype", fields.get("dtype"), f"one of {', '.join(DTYPES)}")
        if fields.get("checksum") != "crc32c-quarters":
            raise bad("checksum", fields.get("checksum"), "'crc32c-quarters'")
        numbers = {}
        for field in ("d_model", "d_ff", "num_experts", "record_bytes", "data_offset"):
            value = fields.get(field)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**48:
                raise bad(field, value, "a positive integer")
            if field in ("d_model", "d_ff") and value > _C.largest_dimension:
                raise bad(field, value, f"at most {_C.largest_dimension}")
            numbers[field] = value
        if not isinstance(fields.get("gated"), bool):
            raise bad("gated", fields.get("gated"), "true or false")
        if not isinstance(fields.get("biased", False), bool):
            raise bad("biased", fields.get("biased"), "true or false")
        layers = fields.get("layers")
        if not isinstance(layers, list) or not layers or not all(isinstance(name, str) and name for name in layers):
            raise bad("layers", layers, "a list of module paths")
        if len(set(layers)) != len(layers):
            raise bad("layers", layers, "distinct module paths")
        for field in ("fingerprint", "source"):
            if not isinstance(fields.get(field), str):
                raise bad(field, fields.get(field), "a string")
        for field in ("family", "layout", "activation", "gate"):
            if not isinstance(fields.get(field, ""), str):
                raise bad(field, fields.get(field), "a string")
        top_k = fields.get("top_k", [])
        if not isinstance(top_k, list) or not all(type(k) is int and k > 0 for k in top_k):
            raise bad("top_k", top_k, "a list of positive integers")
        sums = fields.get("checksums")
        expected = len(layers) * numbers["num_experts"]
        if not isinstance(sums, list) or len(sums) != expected:
            found = f"{len(sums)} entries" if isinstance(sums, list) else sums
            raise bad("checksums", found, f"{expected} entries, one for each expert")
        for entry in sums:
            if not isinstance(entry, str) or not re.fullmatch(r"[0-9a-f]{32}", entry):
                raise bad("checksums", entry, "32 hexadecimal digits")
        header = cls(
            version=version,
            dtype=fields["dtype"],
            d_model=numbers["d_model"],
            d_ff=numbers["d_ff"],
            gated=fields["gated"],
            layers=tuple(layers),
            num_experts=numbers["num_experts"],
            record_bytes=numbers["record_bytes"],
            data_offset=numbers["data_offset"],
            checksums=tuple((int(s[0:8], 16), int(s[8:16], 16), int(s[16:24], 16), int(s[24:32], 16)) for s in sums),
            fingerprint=fields["fingerprint"],
            source=fields["source"],
            biased=fields.get("biased", False),
            family=fields.get("family", ""),
            layout=fields.get("layout", ""),
            top_k=tuple(top_k),
            activation=fields.get("activation", ""),
            gate=fields.get("gate", ""),
        )
        size = header.format().record_bytes
        if header.record_bytes != size:
            raise bad("record_bytes", header.record_bytes, f"{size}, what the shapes and the dtype give")
        return header

    def format(self) -> _C.ExpertFormat:
        return _C.ExpertFormat(self.d_model, self.d_ff, self.dtype, self.gated, self.biased)


def open_store(path: str | os.PathLike[str]) -> tuple[_C.ExpertStore, StoreHeader]:
    """Open an expert store and check everything but the records, which are checked when they are read.

    Raises:
        StoreError: not a store, damaged, truncated, foreign or newer; the message says which.
        OSError: the file cannot be opened.
    """
    store = _C.ExpertStore(os.fspath(path))
    header = StoreHeader.from_json(store.header_json, os.fspath(path))
    store.set_layout(
        header.format(),
        len(header.layers),
        header.num_experts,
        header.data_offset,
        [list(record) for record in header.checksums],
        list(header.layers),
    )
    return store, header


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one factor for each row: ``weight ~ q * scale[:, None]``, ``|q| <= 127``.

    Args:
        weight: [rows, columns] floating point, finite.

    Returns:
        q [rows, columns] int8 and scale [rows] float32 (1 for a row of zeros).
    """
    exact = weight.float()
    largest = exact.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return torch.round(exact / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _fill_weights(record: np.ndarray, fmt: _C.ExpertFormat, dtype: str, wi: Tensor, wo: Tensor, where: str) -> None:
    parts = ((wi, fmt.wi_offset, fmt.wi_scale_offset, "wi"), (wo, fmt.wo_offset, fmt.wo_scale_offset, "wo"))
    for weight, offset, scale_offset, name in parts:
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{where}: {name} holds NaN or infinity; the checkpoint is damaged")
        if dtype == "int8":
            stored, scale = quantize_rows(weight)
            raw = _bytes_of(scale)
            record[scale_offset : scale_offset + raw.size] = raw
        else:
            stored = weight.to(DTYPES[dtype])
            if not bool(torch.isfinite(stored).all()):
                raise ValueError(
                    f"{where}: {name} holds {weight.abs().max().item():g}, beyond the range of {dtype}; "
                    "pack with --dtype bfloat16"
                )
        raw = _bytes_of(stored)
        record[offset : offset + raw.size] = raw


def _fill_biases(record: np.ndarray, fmt: _C.ExpertFormat, wi_bias: Tensor, wo_bias: Tensor, where: str) -> None:
    for bias, offset, name in ((wi_bias, fmt.wi_bias_offset, "wi_bias"), (wo_bias, fmt.wo_bias_offset, "wo_bias")):
        if not bool(torch.isfinite(bias).all()):
            raise ValueError(f"{where}: {name} holds NaN or infinity; the checkpoint is damaged")
        raw = _bytes_of(bias.float())
        record[offset : offset + raw.size] = raw


def _check_shapes(
    tensors: Mapping[str, Tensor | None], shapes: Mapping[str, tuple[int, ...] | None], where: str
) -> None:
    for name, tensor in tensors.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shapes[name] or (tensor is not None and not tensor.is_floating_point()):
            kind = "" if tensor is None else f"{tensor.dtype} of shape "
            raise ValueError(
                f"{where}: {name} is {kind}{found}, expected a floating-point type of shape {shapes[name]}"
            )


def format_of(source: ExpertSource, dtype: str) -> _C.ExpertFormat:
    """Sizes and offsets of a record of ``source`` in ``dtype``."""
    return _C.ExpertFormat(source.d_model, source.d_ff, dtype, source.gated, source.biased)


def fill_record(record: np.ndarray, source: ExpertSource, dtype: str, weights: ExpertWeights, where: str) -> None:
    """Write one expert into ``record`` [record_bytes] uint8, whose gaps between the parts stay as they are (zero).

    Raises:
        ValueError: a shape is not the source's, or a number cannot be held in ``dtype``; ``where`` begins the message.
    """
    rows = source.d_ff * (2 if source.gated else 1)
    _check_shapes(
        {"wi": weights.wi, "wo": weights.wo, "wi_bias": weights.wi_bias, "wo_bias": weights.wo_bias},
        {
            "wi": (rows, source.d_model),
            "wo": (source.d_model, source.d_ff),
            "wi_bias": (rows,) if source.biased else None,
            "wo_bias": (source.d_model,) if source.biased else None,
        },
        where,
    )
    fmt = format_of(source, dtype)
    _fill_weights(record, fmt, dtype, weights.wi, weights.wo, where)
    if weights.wi_bias is not None and weights.wo_bias is not None:
        _fill_biases(record, fmt, weights.wi_bias, weights.wo_bias, where)


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
        dtype: float32, bfloat16, float16 or int8 (symmetric, one factor for each row).
        progress: called with (experts written, experts in all).

    Raises:
        ValueError: an unknown dtype, or weights that it cannot hold. OSError: the disk is full or fails.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    path = Path(path)
    fmt = format_of(source, dtype)
    total = len(source.layers) * source.num_experts

    def header(checksums: Sequence[tuple[int, int, int, int]], data_offset: int) -> StoreHeader:
        return StoreHeader(
            version=2 if source.biased else 1,
            dtype=dtype,
            d_model=source.d_model,
            d_ff=source.d_ff,
            gated=source.gated,
            biased=source.biased,
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

    # Checksums have a fixed width, so the header's length is known before they are; 2**47 stands for any offset.
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
                fill_record(record, source, dtype, source.expert(layer, index), where)
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
