"""The experts of any model whose experts go through transformers' experts seam, of a checkpoint or in memory."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS

from sida_ext.experts.checkpoint import WeightFiles
from sida_ext.experts.identity import identity_of
from sida_ext.experts.source import ExpertWeights
from sida_ext.models.checkpoint_files import CheckpointFiles
from sida_ext.models.layouts import ExpertLayout, canonical, expert_parameters, experts_modules, shared_modules
from sida_ext.models.quantized import dequantizer_of, raw_mxfp4
from sida_ext.models.refused import refuse_family

__all__ = ["ExpertFacts", "SeamCheckpoint", "SeamModules", "expert_facts", "meta_model"]


@dataclass(frozen=True)
class ExpertFacts:
    """What the experts modules of a model have in common, as a store's header says it.

    Attributes:
        widths: module path -> its own d_ff; ``d_ff`` is the widest, to which the others are padded with zeros.
        shared: path of a module -> path of the one whose parameters are also its own; only the latter is in a store.
    """

    layers: tuple[str, ...]
    num_experts: int
    d_model: int
    d_ff: int
    gated: bool
    biased: bool
    family: str
    top_k: tuple[int, ...]
    activation: str
    gate: str
    widths: Mapping[str, int]
    shared: Mapping[str, str]


def meta_model(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model without data, for names, shapes and rules."""
    with torch.device("meta"):
        return model_class._from_config(config)


def _shape(module: nn.Module) -> tuple[int, int, int]:
    """Experts, d_model, d_ff of an experts module."""
    experts, *sides = expert_parameters(module)["wo"].shape
    d_model, d_ff = reversed(sides) if module.is_transposed else sides
    return int(experts), int(d_model), int(d_ff)


def _top_k(model: nn.Module, name: str, module: nn.Module) -> int | None:
    """Experts for each token of an experts module: its router, a child of the same layer, says so, or its
    configuration."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for place in (parent, *parent.children(), module.config):
        for attribute in ("top_k", "num_experts_per_tok", "top_k_experts"):
            value = vars(place).get(attribute)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _activation(module: nn.Module) -> str:
    """transformers' name of the module's activation function, "" for one that has none."""
    function = getattr(module, "act_fn", None)
    for name, kind in ACT2CLS.items():
        kind = kind[0] if isinstance(kind, tuple) else kind
        if isinstance(kind, type) and type(function) is kind and name not in ("swish",):
            return name
    return "" if function is None else getattr(function, "__name__", type(function).__name__)


def _gate(module: nn.Module) -> str:
    if not module.has_gate:
        return ""
    own: Any = type(module)._apply_gate  # type: ignore[attr-defined]
    return "act(gate) * up" if own.__module__.startswith("transformers.integrations") else own.__qualname__


def expert_facts(model: PreTrainedModel) -> ExpertFacts:
    """See :class:`ExpertFacts`.

    Raises:
        ValueError: no experts modules, or modules that one store cannot hold together; the message says which.
    """
    modules = experts_modules(model)
    refuse_family(model, bool(modules))
    shared = shared_modules(modules)
    layers = tuple(name for name in modules if name not in shared)
    first = layers[0]
    shapes = {name: _shape(modules[name]) for name in layers}
    alike = {name: (*shapes[name][:2], modules[name].has_gate, modules[name].has_bias) for name in layers}
    for name in layers:
        if alike[name] != alike[first]:
            raise ValueError(
                f"{type(model).__name__}: {name} has (experts, d_model, gated, biased) {alike[name]}, {first} has "
                f"{alike[first]}; one store holds experts of one shape. Load the part of the model that you serve"
            )
        if shapes[name][0] != modules[name].num_experts:
            raise ValueError(f"{name} has {shapes[name][0]} experts, its num_experts is {modules[name].num_experts}")
    top_k = [_top_k(model, name, modules[name]) for name in layers]
    for name, k in zip(layers, top_k, strict=True):
        if k is not None and not 1 <= k <= shapes[name][0]:
            raise ValueError(f"{name}: the router picks {k} experts of {shapes[name][0]}; config.json is wrong")
    known = tuple(k for k in top_k if k is not None)
    return ExpertFacts(
        layers=layers,
        num_experts=shapes[first][0],
        d_model=shapes[first][1],
        d_ff=max(shape[2] for shape in shapes.values()),
        gated=bool(modules[first].has_gate),
        biased=bool(modules[first].has_bias),
        family=model.config.model_type,
        top_k=() if len(known) < len(layers) else (known if len(set(known)) > 1 else known[:1]),
        activation=_activation(modules[first]),
        gate=_gate(modules[first]),
        widths={name: shape[2] for name, shape in shapes.items()},
        shared=shared,
    )


def _weights(parts: dict[str, Tensor], gated: bool, d_ff: int) -> ExpertWeights:
    """The expert with ``d_ff`` units; those that it lacks have weights and biases of zero."""
    missing = d_ff - parts["wo"].shape[1]
    if missing:
        for role in ("wi", "wi_bias"):
            if role in parts:
                halves = parts[role].chunk(2) if gated else (parts[role],)
                zeros = parts[role].new_zeros((missing, *parts[role].shape[1:]))
                parts[role] = torch.cat([part for half in halves for part in (half, zeros)])
        parts["wo"] = nn.functional.pad(parts["wo"], (0, missing))
    return ExpertWeights(**parts)


class _SeamSource:
    """What both sources share: the facts as attributes."""

    def __init__(self, facts: ExpertFacts, name: str, layout: str) -> None:
        self.facts, self.name = facts, name
        self.layers, self.num_experts = facts.layers, facts.num_experts
        self.d_model, self.d_ff = facts.d_model, facts.d_ff
        self.gated, self.biased, self.family = facts.gated, facts.biased, facts.family
        self.top_k, self.activation, self.gate = facts.top_k, facts.activation, facts.gate
        narrow = {width for width in facts.widths.values() if width < facts.d_ff}
        if narrow:
            layout += f"; experts of width {', '.join(map(str, sorted(narrow)))} padded with zeros to {facts.d_ff}"
        self.layout = layout


class SeamCheckpoint(_SeamSource):
    """The experts of a checkpoint, an :class:`~sida_ext.experts.source.ExpertSource`, read by transformers' own
    conversion rules. Files stay open until closed.

    Args:
        found: the checkpoint.

    Raises:
        ValueError: a family, a quantisation or a layout that cannot be read, or experts that are not all there.
    """

    def __init__(self, found: CheckpointFiles) -> None:
        quantizer = dequantizer_of(found.config)
        model = meta_model(found.config, found.model_class)
        facts = expert_facts(model)
        self.config = found.config
        self.files = WeightFiles(found.weights)
        self._layout = ExpertLayout(model, self.files, quantizer)
        super().__init__(facts, found.name, self._layout.phrase)
        # The same files make other stores for another class of model: its names and shapes belong to the identity.
        plan = [self.layers, self.num_experts, self.d_model, self.d_ff, self.gated, self.biased]
        identity = identity_of({self.files.file_of(key) for key in self._layout.keys})
        self.fingerprint = hashlib.sha256(f"{identity} {json.dumps(plan)}".encode()).hexdigest()

    def expert(self, layer: int, index: int, dtype: str | None = None) -> ExpertWeights:
        """See :class:`~sida_ext.experts.source.ExpertSource`. With ``dtype="mxfp4"`` an expert that the checkpoint
        holds in MXFP4 (GPT-OSS) is given as it lies there, bit for bit; otherwise dequantised as transformers does."""
        name = self.layers[layer]
        if dtype == "mxfp4" and self.facts.widths[name] == self.d_ff:
            raw = raw_mxfp4(self._layout, name, index)
            if raw is not None:
                biases = self._layout.expert(name, index, ("wi_bias", "wo_bias")) if self.biased else {}
                return ExpertWeights(*raw, **biases)
        return _weights(self._layout.expert(name, index), self.gated, self.d_ff)

    def other_bytes(self, itemsize: int) -> int:
        """Bytes of all parameters but the experts' at ``itemsize`` bytes an element."""
        return self.files.numel(without=self._layout.keys) * itemsize

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> SeamCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SeamModules(_SeamSource):
    """The experts of a model in memory, an :class:`~sida_ext.experts.source.ExpertSource`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(expert_facts(model), type(model).__name__, "modules in memory")
        self._modules = experts_modules(model)
        self.fingerprint = secrets.token_hex(16)  # of a store that belongs to this model, and is compared with nothing

    def expert(self, layer: int, index: int, dtype: str | None = None) -> ExpertWeights:
        module = self._modules[self.layers[layer]]
        parts = {role: parameter.detach()[index].cpu() for role, parameter in expert_parameters(module).items()}
        return _weights(canonical(module, parts), self.gated, self.d_ff)
