"""Find and read the experts of a Switch Transformers checkpoint, without ever loading it whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["Checkpoint", "ModuleExperts", "resolve_folder"]

EXPERT_KEY = re.compile(r"^(?P<layer>.*\.mlp)\.experts\.expert_(?P<index>\d+)\.(?P<matrix>wi|wo)\.weight$")
OTHER_EXPERT_KEY = re.compile(r"\.experts\.expert_\d+\.")
# Blocks of each file that go into its fingerprint, beside its header and size.
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 64, 4096


def resolve_folder(path_or_id: str | os.PathLike[str], *, allow_pickle: bool = False, **hub: Any) -> Path:
    """The folder of a checkpoint: a local one as it is, a hub id through huggingface_hub's cache.

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be had.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file, expected a checkpoint folder or a hub id")
    patterns = ["*.json", "*.safetensors"] + (["*.bin"] if allow_pickle else [])
    try:
        return Path(snapshot_download(os.fspath(path_or_id), allow_patterns=patterns, **hub))
    except Exception as error:  # huggingface_hub raises many kinds; all of them mean that there is no checkpoint
        raise FileNotFoundError(f"{path_or_id} is no folder, and the hub did not give it: {error}") from error


def _layer_order(name: str) -> tuple[Any, ...]:
    """Encoder before decoder, blocks by number."""
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, {"encoder": 0, "decoder": 1}.get(part, 2), part)
        for part in name.split(".")
    )


def _weight_files(folder: Path, allow_pickle: bool) -> dict[str, str]:
    """Tensor name -> file name."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            if index.startswith("pytorch") and not allow_pickle:
                break
            try:
                weight_map = json.loads((folder / index).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / index} is not a shard index: {error!r}") from error
            missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
            if missing:
                raise FileNotFoundError(f"{folder}: {index} names {', '.join(missing)}, which is not there")
            return weight_map
        single = folder / index.removesuffix(".index.json")
        if single.is_file():
            if single.suffix == ".bin":
                if not allow_pickle:
                    break
                return dict.fromkeys(torch.load(single, mmap=True, weights_only=True, map_location="cpu"), single.name)
            with _open_safetensors(single) as file:
                return dict.fromkeys(file.keys(), single.name)
    if any(folder.glob("pytorch_model*.bin*")):
        raise ValueError(
            f"{folder} holds only pytorch_model.bin files, which are Python pickles: loading one can run code that it "
            "carries. Convert it to safetensors, or pass allow_pickle=True (--allow-pickle) if you trust its source"
        )
    raise FileNotFoundError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _fingerprint(files: Sequence[Path]) -> str:
    """Identity of the weights, cheap and independent of path and time: sizes, headers and evenly spaced blocks."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with open(path, "rb") as file:
            for block in range(FINGERPRINT_BLOCKS):
                file.seek(block * max(0, size - FINGERPRINT_BLOCK) // max(1, FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(FINGERPRINT_BLOCK))
    return digest.hexdigest()[:32]


class Checkpoint:
    """The experts of a checkpoint folder, an :class:`~sida_ext.experts.store.ExpertSource`. Files stay open until
    closed."""

    gated = biased = False

    def __init__(self, folder: Path, allow_pickle: bool) -> None:
        self.folder = folder
        self.name = folder.name
        try:
            self.config = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} holds no config.json, expected a transformers checkpoint") from None
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
        self._files = _weight_files(folder, allow_pickle)
        self._open: dict[str, Any] = {}
        experts: dict[str, dict[int, dict[str, str]]] = {}
        for key in self._files:
            match = EXPERT_KEY.match(key)
            if match:
                experts.setdefault(match["layer"], {}).setdefault(int(match["index"]), {})[match["matrix"]] = key
            elif OTHER_EXPERT_KEY.search(key):
                raise ValueError(
                    f"{folder}: {key} is an expert parameter that a store cannot hold; it holds bias-free wi and wo"
                )
        if not experts:
            raise ValueError(f"{folder} has no Switch experts (keys like encoder.block.1.layer.1.mlp.experts.expert_0)")
        self.layers = sorted(experts, key=_layer_order)
        self.num_experts = int(self.config.get("num_experts", len(experts[self.layers[0]])))
        for layer in self.layers:
            for index in range(self.num_experts):
                for matrix in ("wi", "wo"):
                    if matrix not in experts[layer].get(index, {}):
                        raise ValueError(
                            f"{folder}: {layer}.experts.expert_{index}.{matrix}.weight is missing; config.json says "
                            f"{self.num_experts} experts a layer"
                        )
            extra = sorted(set(experts[layer]) - set(range(self.num_experts)))
            if extra:
                raise ValueError(
                    f"{folder}: {layer} has expert {extra[0]}, but config.json says {self.num_experts} experts a layer"
                )
        self._keys = experts
        wi = self._tensor(experts[self.layers[0]][0]["wi"])
        if wi.dim() != 2:
            raise ValueError(f"{folder}: {experts[self.layers[0]][0]['wi']} has shape {tuple(wi.shape)}, expected 2-D")
        self.d_ff, self.d_model = wi.shape
        self.fingerprint = _fingerprint(sorted({folder / name for name in self._files.values()}))

    @classmethod
    def open(cls, path_or_id: str | os.PathLike[str], *, allow_pickle: bool = False, **hub: Any) -> Checkpoint:
        return cls(resolve_folder(path_or_id, allow_pickle=allow_pickle, **hub), allow_pickle)

    def _opened(self, name: str) -> Any:
        """The weight file `name`, a mapping of tensors or an open safetensors file."""
        if name not in self._open:
            path = self.folder / name
            if path.suffix == ".bin":
                self._open[name] = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            else:
                self._open[name] = _open_safetensors(path)
        return self._open[name]

    def _tensor(self, key: str) -> Tensor:
        name = self._files[key]
        opened = self._opened(name)
        try:
            return opened[key] if isinstance(opened, dict) else opened.get_tensor(key)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.folder / name}: cannot read {key}: {error}") from error

    def other_bytes(self, itemsize: int) -> int:
        """Bytes of all parameters but the experts' at `itemsize` bytes an element."""
        experts = {key for layer in self._keys.values() for expert in layer.values() for key in expert.values()}
        numbers = 0
        for key, name in self._files.items():
            if key not in experts:
                opened = self._opened(name)
                shape = opened[key].shape if isinstance(opened, dict) else opened.get_slice(key).get_shape()
                numbers += math.prod(shape)
        return numbers * itemsize

    def expert(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        keys = self._keys[self.layers[layer]][index]
        wi, wo = self._tensor(keys["wi"]), self._tensor(keys["wo"])
        for tensor, key, shape in (
            (wi, keys["wi"], (self.d_ff, self.d_model)),
            (wo, keys["wo"], (self.d_model, self.d_ff)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{self.folder}: {key} has shape {tuple(tensor.shape)}, expected {shape}")
            if not tensor.is_floating_point():
                raise ValueError(f"{self.folder}: {key} has dtype {tensor.dtype}, expected a floating-point type")
        return wi, wo

    def biases(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("Switch experts have no biases")

    def close(self) -> None:
        self._open.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ModuleExperts:
    """The experts of a model in memory, an :class:`~sida_ext.experts.store.ExpertSource`.

    Args:
        experts: module path of each MoE layer -> its experts (``expert_0`` ...), each with ``wi`` and ``wo``.
    """

    gated = biased = False

    def __init__(self, experts: dict[str, nn.ModuleDict], name: str) -> None:
        self.layers = sorted(experts, key=_layer_order)
        self.name = name
        self._experts = experts
        self.num_experts = len(experts[self.layers[0]])
        self.d_ff, self.d_model = map(int, self.expert(0, 0)[0].shape)
        digest = hashlib.sha256()
        for layer in self.layers:
            for index in range(self.num_experts):
                for tensor in self.expert(layer=self.layers.index(layer), index=index):
                    digest.update(f"{layer}.{index} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                    # float64 sums of the values and of their squares: identity of a model, not proof against forgery
                    exact = tensor.double()
                    digest.update(f"{exact.sum().item()!r} {exact.square().sum().item()!r}\n".encode())
        self.fingerprint = digest.hexdigest()[:32]

    def expert(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        module: Any = self._experts[self.layers[layer]][f"expert_{index}"]
        return module.wi.weight.detach().cpu(), module.wo.weight.detach().cpu()

    def biases(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("Switch experts have no biases")
