"""Checkpoint to expert store: read a Switch checkpoint's experts, write them as aligned records, open the result.

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
from typing import Any, BinaryIO, Protocol

import filelock
import numpy as np
import torch
from torch import Tensor

from sida_ext import _C
from sida_ext.errors import StoreError
from sida_ext.experts.checkpoint import Checkpoint

__all__ = ["ExpertSource", "StoreHeader", "default_cache", "ensure_store", "open_store", "pack", "write_store"]

# The newest format that is read. A store is written in the oldest that holds it: 2 has biases.
FORMAT_VERSION = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# Bytes kept free on the disk beside a new store, so that packing never fills it up.
DISK_RESERVE = 256 << 20


class ExpertSource(Protocol):
    """Where the experts of a store come from."""

    @property
    def layers(self) -> Sequence[str]:
        """Module path of each MoE layer, encoder first."""

    num_experts: int
    d_model: int
    d_ff: int
    gated: bool
    """``wi`` has 2 * d_ff rows, the gate's first."""
    biased: bool
    """Experts have biases."""
    fingerprint: str
    name: str

    def expert(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        """``wi`` [d_ff or 2 * d_ff, d_model] and ``wo`` [d_model, d_ff] of one expert, floating point, on the CPU."""

    def biases(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        """The biases of the rows of ``wi`` and ``wo`` of one expert, floating point; asked for where ``biased``."""


@dataclass(frozen=True)
class StoreHeader:
    """What a store says of itself. Sizes in bytes."""

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


def _fill_record(record: np.ndarray, fmt: _C.ExpertFormat, dtype: str, wi: Tensor, wo: Tensor, where: str) -> None:
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


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise ValueError(
                f"{where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected a floating-point type of "
                f"shape {shapes[name]}"
            )


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
    fmt = _C.ExpertFormat(source.d_model, source.d_ff, dtype, source.gated, source.biased)
    wi_rows = source.d_ff * (2 if source.gated else 1)
    shapes = {"wi": (wi_rows, source.d_model), "wo": (source.d_model, source.d_ff)}
    bias_shapes = {"wi_bias": (wi_rows,), "wo_bias": (source.d_model,)}
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
                wi, wo = source.expert(layer, index)
                _check_shapes({"wi": wi, "wo": wo}, shapes, where)
                _fill_record(record, fmt, dtype, wi, wo, where)
                if source.biased:
                    wi_bias, wo_bias = source.biases(layer, index)
                    _check_shapes({"wi_bias": wi_bias, "wo_bias": wo_bias}, bias_shapes, where)
                    _fill_biases(record, fmt, wi_bias, wo_bias, where)
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


def pack(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str = "bfloat16",
    *,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **hub: Any,
) -> StoreHeader:
    """Pack the experts of a checkpoint folder or hub id into an expert store; see :func:`write_store`.

    Args:
        allow_pickle: read ``pytorch_model.bin`` files (with ``weights_only=True``); refused without it.
        hub: ``revision``, ``token``, ``cache_dir`` for a hub id.
    """
    with Checkpoint.open(checkpoint, allow_pickle=allow_pickle, **hub) as source:
        return write_store(source, out, dtype, progress)


def default_cache() -> Path:
    """Folder of packed stores: ``$SIDA_CACHE``, else ``~/.cache/sida``."""
    return Path(os.environ.get("SIDA_CACHE") or Path.home() / ".cache" / "sida")


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


def check_source(header: StoreHeader, source: ExpertSource | Mapping[str, Any], path: str) -> None:
    """Refuse a store that was packed from another checkpoint."""
    fingerprint = source["fingerprint"] if isinstance(source, Mapping) else source.fingerprint
    if header.fingerprint != fingerprint:
        raise StoreError(
            f"{path}: packed from a checkpoint with fingerprint {header.fingerprint} ({header.source}), expected "
            f"{fingerprint}; pack this checkpoint: sida pack CHECKPOINT -o STORE"
        )
