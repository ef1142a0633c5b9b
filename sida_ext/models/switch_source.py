"""The experts of Switch Transformers, of a checkpoint or of a model in memory."""

from __future__ import annotations

import re
import secrets
from typing import Any

from torch import nn

from sida_ext.experts.checkpoint import WeightFiles
from sida_ext.experts.identity import identity_of
from sida_ext.experts.source import ExpertWeights
from sida_ext.models.checkpoint_files import CheckpointFiles

__all__ = ["SwitchCheckpoint", "SwitchModules"]

EXPERT_KEY = re.compile(r"^(?P<layer>.*\.mlp)\.experts\.expert_(?P<index>\d+)\.(?P<matrix>wi|wo)\.weight$")
OTHER_EXPERT_KEY = re.compile(r"\.experts\.expert_\d+\.")


def _layer_order(name: str) -> tuple[Any, ...]:
    """Encoder before decoder, blocks by number."""
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, {"encoder": 0, "decoder": 1}.get(part, 2), part)
        for part in name.split(".")
    )


class SwitchCheckpoint:
    """The experts of a Switch checkpoint, an :class:`~sida_ext.experts.source.ExpertSource`. Files stay open until
    closed.

    Raises:
        ValueError: not a Switch checkpoint, or one whose experts are not all there.
    """

    gated = biased = False
    family = "switch_transformers"
    layout = "one matrix for each expert"
    top_k: tuple[int, ...] = (1,)
    gate = ""

    def __init__(self, found: CheckpointFiles) -> None:
        self.name, self.config, where = found.name, found.config, found.path_or_id
        self.files = WeightFiles(found.weights)
        self.activation: str = found.config.dense_act_fn
        experts: dict[str, dict[int, dict[str, str]]] = {}
        for key in self.files.keys:
            match = EXPERT_KEY.match(key)
            if match:
                experts.setdefault(match["layer"], {}).setdefault(int(match["index"]), {})[match["matrix"]] = key
            elif OTHER_EXPERT_KEY.search(key):
                raise ValueError(
                    f"{where}: {key} is an expert parameter that a store cannot hold; it holds bias-free wi and wo"
                )
        if not experts:
            raise ValueError(f"{where} has no Switch experts (keys like encoder.block.1.layer.1.mlp.experts.expert_0)")
        self.layers = sorted(experts, key=_layer_order)
        self.num_experts = int(found.config.num_experts)
        for layer in self.layers:
            for index in range(self.num_experts):
                for matrix in ("wi", "wo"):
                    if matrix not in experts[layer].get(index, {}):
                        raise ValueError(
                            f"{where}: {layer}.experts.expert_{index}.{matrix}.weight is missing; config.json says "
                            f"{self.num_experts} experts a layer"
                        )
            extra = sorted(set(experts[layer]) - set(range(self.num_experts)))
            if extra:
                raise ValueError(
                    f"{where}: {layer} has expert {extra[0]}, but config.json says {self.num_experts} experts a layer"
                )
        self._keys = experts
        first = experts[self.layers[0]][0]["wi"]
        shape = self.files.shape(first)
        if len(shape) != 2:
            raise ValueError(f"{where}: {first} has shape {shape}, expected 2-D")
        self.d_ff, self.d_model = shape
        for matrix, expected in (("wi", shape), ("wo", shape[::-1])):
            for key in (expert[matrix] for layer in self.layers for expert in experts[layer].values()):
                if self.files.shape(key) != expected or not self.files.dtype(key).is_floating_point:
                    raise ValueError(
                        f"{where}: {key} is {self.files.dtype(key)} of shape {self.files.shape(key)}, expected a "
                        f"floating-point type of shape {expected}"
                    )
        self._expert_keys = {key for layer in experts.values() for expert in layer.values() for key in expert.values()}
        self.fingerprint = identity_of({self.files.file_of(key) for key in self._expert_keys})

    def other_bytes(self, itemsize: int) -> int:
        """Bytes of all parameters but the experts' at ``itemsize`` bytes an element."""
        return self.files.numel(without=self._expert_keys) * itemsize

    def expert(self, layer: int, index: int, dtype: str | None = None) -> ExpertWeights:
        keys = self._keys[self.layers[layer]][index]
        return ExpertWeights(self.files.tensor(keys["wi"]), self.files.tensor(keys["wo"]))

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> SwitchCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SwitchModules:
    """The experts of a Switch model in memory, an :class:`~sida_ext.experts.source.ExpertSource`.

    Args:
        experts: module path of each MoE layer -> its experts (``expert_0`` ...), each with ``wi`` and ``wo``.
        activation: ``config.dense_act_fn``.
    """

    gated = biased = False
    family = "switch_transformers"
    layout = "modules in memory"
    top_k: tuple[int, ...] = (1,)
    gate = ""

    def __init__(self, experts: dict[str, nn.ModuleDict], name: str, activation: str) -> None:
        self.layers = sorted(experts, key=_layer_order)
        self.name, self.activation = name, activation
        self._experts = experts
        self.num_experts = len(experts[self.layers[0]])
        first: Any = experts[self.layers[0]]["expert_0"]
        self.d_ff, self.d_model = map(int, first.wi.weight.shape)
        self.fingerprint = secrets.token_hex(16)  # of a store that belongs to this model, and is compared with nothing

    def expert(self, layer: int, index: int, dtype: str | None = None) -> ExpertWeights:
        module: Any = self._experts[self.layers[layer]][f"expert_{index}"]
        return ExpertWeights(module.wi.weight.detach().cpu(), module.wo.weight.detach().cpu())
