"""Read tensors out of a checkpoint's weight files, whole or by slices, without ever loading a file."""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["WeightFiles"]

# Names that safetensors' headers use. A type that this torch lacks is an error when a tensor of it is asked for.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class WeightFiles:
    """The tensors of a checkpoint's weight files (``.safetensors``, or ``.bin`` if the caller trusts pickles).

    What is read of a safetensors file is a view of the mapped file: it takes no anonymous memory. Files stay open until
    :meth:`close`.

    Args:
        paths: the weight files; a tensor in two of them is the later one's, as in transformers.

    Raises:
        FileNotFoundError: a file is not there. ValueError: a file is damaged.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths: Sequence[Path] = tuple(paths)
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there, but the checkpoint's shard index names it")
            self._file_of.update(dict.fromkeys(self._opened(path).keys(), path))

    def _opened(self, path: Path) -> Any:
        """A mapping of tensors, or an open safetensors file."""
        if path not in self._open:
            try:
                if path.suffix == ".safetensors":
                    self._open[path] = safe_open(path, framework="pt")
                else:
                    self._open[path] = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            except SafetensorError as error:
                raise ValueError(f"{path} is not a safetensors file: {error}") from error
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise ValueError(f"{path} is not a file of weights: {error}") from error
        return self._open[path]

    @property
    def keys(self) -> Collection[str]:
        """Names of all tensors, in the order of the files."""
        return self._file_of.keys()

    def file_of(self, key: str) -> Path:
        return self._file_of[key]

    def _slice(self, key: str) -> Any:
        opened = self._opened(self._file_of[key])
        return opened[key] if isinstance(opened, dict) else opened.get_slice(key)

    def shape(self, key: str) -> tuple[int, ...]:
        found = self._slice(key)
        return tuple(found.shape if isinstance(found, Tensor) else found.get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Raises ValueError for a type that this torch does not know."""
        found = self._slice(key)
        if isinstance(found, Tensor):
            return found.dtype
        name = found.get_dtype()
        dtype = getattr(torch, _DTYPES.get(name, ""), None)
        if dtype is None:
            raise ValueError(f"{self._file_of[key]}: {key} has type {name}, which torch {torch.__version__} lacks")
        return dtype

    def tensor(self, key: str) -> Tensor:
        path = self._file_of[key]
        opened = self._opened(path)
        try:
            return opened[key] if isinstance(opened, dict) else opened.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot read {key}: {error}") from error

    def rows(self, key: str, begin: int, end: int) -> Tensor:
        """Elements ``begin`` to ``end`` of the tensor's first dimension."""
        try:
            return self._slice(key)[begin:end]
        except SafetensorError as error:
            raise ValueError(f"{self._file_of[key]}: cannot read {key}[{begin}:{end}]: {error}") from error

    def numel(self, without: Collection[str] = ()) -> int:
        """Numbers in all tensors but those of ``without``."""
        return sum(math.prod(self.shape(key)) for key in self._file_of if key not in without)

    def close(self) -> None:
        self._open.clear()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
