"""What a checkpoint says of itself before its weights are read: config.json and the headers of its safetensors files.

A folder is read here; a hub id through huggingface_hub, by range requests of the headers alone.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sida_ext.places import refuse_mistyped

__all__ = ["CheckpointHeaders", "TensorHeader", "read_headers"]

# Bits of an element. safetensors' names; F4 and F6_* are packed, F8_E8M0 is the scale byte of MX formats.
ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_HEADER = 100_000_000  # safetensors' own bound


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: safetensors' name of its type, its shape, its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class CheckpointHeaders:
    """A checkpoint without its weights.

    Attributes:
        name: folder or hub id, as it was given.
        config: of config.json.
        tensors: by name, of all files.
        folder: where the files lie; None: on the hub.
    """

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorHeader]
    folder: Path | None

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def _config_of(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{where} is not JSON ({error}), expected the configuration of a transformers model"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{where} holds a {type(config).__name__}, expected a JSON object")
    return config


def checked(name: str, dtype: object, shape: object, offsets: object, where: str) -> TensorHeader:
    """One entry of a header, whose bytes must be what type and shape give.

    Raises:
        ValueError: names the file, the tensor, the value found and the one expected.
    """
    if dtype not in ELEMENT_BITS:
        raise ValueError(f"{where}: {name} has dtype {dtype!r}, expected one of {', '.join(ELEMENT_BITS)}")
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{where}: {name} has shape {shape!r}, expected a list of sizes")
    if not isinstance(offsets, (list, tuple)) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        raise ValueError(f"{where}: {name} has data_offsets {offsets!r}, expected begin and end")
    begin, end = offsets
    tensor = TensorHeader(str(dtype), tuple(shape), end - begin)
    expected = (tensor.numbers * ELEMENT_BITS[tensor.dtype] + 7) // 8
    if begin < 0 or tensor.bytes != expected:
        raise ValueError(
            f"{where}: {name} has {end - begin} bytes ({begin} to {end}), but {dtype} of shape {list(shape)} {expected}"
        )
    return tensor


def _local_file(path: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file, checked against the file's size.

    Raises:
        ValueError: the header is cut off, no JSON, or tells of other bytes than the file has.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path} has {size} bytes, expected a safetensors file: 8 bytes of length and a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > LARGEST_HEADER:
            raise ValueError(f"{path} says that its header has {length} bytes, expected at most {LARGEST_HEADER}")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(
            f"{path}: the header is cut off: it has {length} bytes, but the file ends after {len(text)} of them; "
            "copy or download the file again"
        )
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: the header is not JSON ({error}); copy or download the file again") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: the header holds a {type(entries).__name__}, expected a JSON object")
    tensors: dict[str, TensorHeader] = {}
    last = 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: the entry of {name} is {entry!r}, expected a JSON object")
        offsets: Any = entry.get("data_offsets")
        tensors[name] = checked(name, entry.get("dtype"), entry.get("shape"), offsets, str(path))
        last = max(last, offsets[1])
    if size != 8 + length + last:
        raise ValueError(
            f"{path} has {size} bytes, but its header tells of {8 + length + last}; copy or download the file again"
        )
    return tensors


def _merge(
    files: Mapping[str, Mapping[str, TensorHeader]], weight_map: Mapping[str, str], where: str
) -> dict[str, Any]:
    """The tensors of all files, of those that the index names. None may be missing from the file that it names."""
    tensors = {}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise ValueError(f"{where}: {INDEX} says that {name} is in {file}, whose header does not name it")
        tensors[name] = files[file][name]
    return tensors


def _local(folder: Path) -> CheckpointHeaders:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, expected a checkpoint folder or a hub id")
    config = _config_of(config_file.read_bytes(), str(config_file))
    # As transformers: one file of all weights goes before an index.
    if (folder / SINGLE).is_file():
        return CheckpointHeaders(os.fspath(folder), config, _local_file(folder / SINGLE), folder)
    index = folder / INDEX
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pt") for path in folder.glob(pattern))
        found = f"; it holds {', '.join(others[:3])}, which is another format" if others else ""
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}{found}; sida plan reads safetensors headers"
        )
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a shard index: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {INDEX} names {', '.join(missing[:3])}, which is not there")
    files = {name: _local_file(folder / name) for name in names}
    return CheckpointHeaders(os.fspath(folder), config, _merge(files, weight_map, os.fspath(folder)), folder)


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a snapshot that was downloaded before, if its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    for name in (SINGLE, INDEX):
        found = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            if name == SINGLE or any(folder.glob("model-*.safetensors")):
                return folder
    return None


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub draws a bar for each file of a few kilobytes; the caller's choice is restored."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _from_hub(repo: str, revision: str | None, token: str | bool | None) -> CheckpointHeaders:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    where = repo if revision is None else f"{repo} at {revision}"
    try:
        with _without_bars():
            path = hf_hub_download(repo, "config.json", revision=revision, token=token)
            found = HfApi().get_safetensors_metadata(repo, revision=revision, token=token)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{where} is no folder here, and the hub has no such model: {_line(error)}") from error
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError, and no answer of the hub
        raise _unreachable(where, error) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{where} on the hub has no config.json: {_line(error)}") from error
    except NotASafetensorsRepoError as error:
        raise FileNotFoundError(
            f"{where} on the hub has no safetensors files, and sida plan reads their headers"
        ) from error
    except SafetensorsParsingError as error:
        raise ValueError(f"{where} on the hub: a header is damaged: {_line(error)}") from error
    except Exception as error:  # what the transport raises differs from version to version; all of it is: not reached
        raise _unreachable(where, error) from error
    files = {
        name: {
            key: checked(key, tensor.dtype, list(tensor.shape), list(tensor.data_offsets), f"{where}: {name}")
            for key, tensor in file.tensors.items()
        }
        for name, file in found.files_metadata.items()
    }
    return CheckpointHeaders(
        repo, _config_of(Path(path).read_bytes(), f"{where}: config.json"), _merge(files, found.weight_map, where), None
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unreachable(where: str, error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"{where} is no folder here, and the hub could not be asked for it ({type(error).__name__}: {_line(error)}); "
        "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder with config.json and safetensors files"
    )


def read_headers(
    path_or_id: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> CheckpointHeaders:
    """config.json and the safetensors headers of a folder, or of a hub id: no weight is read or downloaded.

    Args:
        revision, token: of a hub id, as huggingface_hub takes them.

    Raises:
        FileNotFoundError: neither a folder nor a hub id, or without config.json or safetensors files.
        ConnectionError: the hub cannot be reached, and no earlier download of the model is there.
        ValueError: a config.json or a header that is damaged; the message names the file.
    """
    name = os.fspath(path_or_id)
    folder = Path(name)
    if folder.is_dir():
        return _local(folder)
    refuse_mistyped(name)
    try:
        return _from_hub(name, revision, token)
    except ConnectionError:
        snapshot = _cached_snapshot(name, revision)
        if snapshot is None:
            raise
        local = _local(snapshot)
        return CheckpointHeaders(name, local.config, local.tensors, snapshot)
