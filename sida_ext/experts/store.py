"""The expert store: its header, and opening it.

The file format is described in ``csrc/experts/store.h``; this module owns the JSON header inside it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sida_ext._load import _C
from sida_ext.errors import StoreError

__all__ = ["DTYPES", "FORMAT_VERSION", "StoreHeader", "open_store"]

# The newest format that is read. A store is written in the oldest that holds it: 2 has biases and 4-bit weights.
FORMAT_VERSION = 2
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "mxfp4": torch.uint8,
}


class _Fields:
    """The fields of a header, each checked as it is taken."""

    def __init__(self, text: str, path: str) -> None:
        self.path = path
        try:
            self.found = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{path}: the header is not JSON ({error}); pack the checkpoint again") from error
        if not isinstance(self.found, dict):
            raise self.bad("header", type(self.found).__name__, "a JSON object")

    def bad(self, field: str, found: object, expected: str) -> StoreError:
        return StoreError(
            f"{self.path}: header field {field!r} is {found!r}, expected {expected}; pack the checkpoint again"
        )

    def version(self) -> int:
        version = self.found.get("version")
        if type(version) is not int or version < 1:
            raise self.bad("version", version, "a positive integer")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{self.path}: written in store format {version}, this sida_ext reads up to {FORMAT_VERSION}; "
                "update sida_ext or pack the checkpoint again"
            )
        return version

    def one_of(self, field: str, known: Iterable[str]) -> str:
        value = self.found.get(field)
        if value not in known:
            raise self.bad(field, value, f"one of {', '.join(known)}")
        return value

    def number(self, field: str) -> int:
        value = self.found.get(field)
        if type(value) is not int or not 0 < value < 2**48:
            raise self.bad(field, value, "a positive integer")
        return value

    def dimension(self, field: str) -> int:
        value = self.number(field)
        if value > _C.largest_dimension:
            raise self.bad(field, value, f"at most {_C.largest_dimension}")
        return value

    def flag(self, field: str, default: bool | None = None) -> bool:
        value = self.found.get(field, default)
        if not isinstance(value, bool):
            raise self.bad(field, value, "true or false")
        return value

    def text(self, field: str, default: str | None = None) -> str:
        value = self.found.get(field, default)
        if not isinstance(value, str):
            raise self.bad(field, value, "a string")
        return value

    def layers(self) -> tuple[str, ...]:
        layers = self.found.get("layers")
        if not isinstance(layers, list) or not layers or not all(isinstance(name, str) and name for name in layers):
            raise self.bad("layers", layers, "a list of module paths")
        if len(set(layers)) != len(layers):
            raise self.bad("layers", layers, "distinct module paths")
        return tuple(layers)

    def checksums(self, expected: int) -> tuple[tuple[int, int, int, int], ...]:
        if self.found.get("checksum") != "crc32c-quarters":
            raise self.bad("checksum", self.found.get("checksum"), "'crc32c-quarters'")
        sums = self.found.get("checksums")
        if not isinstance(sums, list) or len(sums) != expected:
            found = f"{len(sums)} entries" if isinstance(sums, list) else sums
            raise self.bad("checksums", found, f"{expected} entries, one for each expert")
        for entry in sums:
            if not isinstance(entry, str) or not re.fullmatch(r"[0-9a-f]{32}", entry):
                raise self.bad("checksums", entry, "32 hexadecimal digits")
        return tuple((int(s[0:8], 16), int(s[8:16], 16), int(s[16:24], 16), int(s[24:32], 16)) for s in sums)

    def rounding(self, layers: int) -> tuple[float, ...]:
        rounding = self.found.get("rounding", [])
        if not isinstance(rounding, list) or len(rounding) not in (0, layers):
            raise self.bad("rounding", rounding, "a number for each layer")
        for entry in rounding:
            if not isinstance(entry, str) or not re.fullmatch(r"\d\.\d{3}e[-+]\d\d", entry):
                raise self.bad("rounding", entry, "a number of four digits")
        return tuple(map(float, rounding))

    def top_k(self) -> tuple[int, ...]:
        top_k = self.found.get("top_k", [])
        if not isinstance(top_k, list) or not all(type(k) is int and k > 0 for k in top_k):
            raise self.bad("top_k", top_k, "a list of positive integers")
        return tuple(top_k)


@dataclass(frozen=True)
class StoreHeader:
    """What a store says of itself. Sizes in bytes.

    ``rounding`` is how far quantising moved the weights of each layer, ``|stored - weight| / |weight|`` (roots of
    sums of squares), to four digits; empty where nothing was quantised. A store that was packed before the last fields
    were known has their defaults, an empty ``family`` among them.
    """

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
    rounding: tuple[float, ...] = ()
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
        if self.rounding:
            fields["rounding"] = [f"{error:.3e}" for error in self.rounding]
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

        fields = _Fields(text, path)
        version, layers, experts = fields.version(), fields.layers(), fields.number("num_experts")
        header = cls(
            version=version,
            dtype=fields.one_of("dtype", DTYPES),
            d_model=fields.dimension("d_model"),
            d_ff=fields.dimension("d_ff"),
            gated=fields.flag("gated"),
            layers=layers,
            num_experts=experts,
            record_bytes=fields.number("record_bytes"),
            data_offset=fields.number("data_offset"),
            checksums=fields.checksums(len(layers) * experts),
            fingerprint=fields.text("fingerprint"),
            source=fields.text("source"),
            biased=fields.flag("biased", False),
            rounding=fields.rounding(len(layers)),
            family=fields.text("family", ""),
            layout=fields.text("layout", ""),
            top_k=fields.top_k(),
            activation=fields.text("activation", ""),
            gate=fields.text("gate", ""),
        )
        size = header.format().record_bytes
        if header.record_bytes != size:
            raise fields.bad("record_bytes", header.record_bytes, f"{size}, what the shapes and the dtype give")
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
