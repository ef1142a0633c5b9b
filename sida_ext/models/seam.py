"""The experts seam of transformers 5: one adapter for every family whose experts module carries
``@use_experts_implementation`` (transformers, integrations/moe.py).

Such a module is called with hidden states ``[tokens, width]``, chosen experts ``[tokens, top_k]`` and their weights;
its parameters are ``gate_up_proj`` (or ``up_proj``), ``down_proj`` and their biases, each with a first dimension of
experts. A served module keeps its place, its attributes and its class's methods; its parameters are gone and its
forward takes the experts from the expert store. Routers, shared experts and attention stay transformers'.
"""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sida_ext import ops
from sida_ext.experts.runtime import Runtime
from sida_ext.experts.store import StoreHeader
from sida_ext.models.gates import gate_formula
from sida_ext.models.layers import ServedLayer

__all__ = ["ExpertsShape", "SeamExperts", "SeamFamily", "ServedExperts", "experts_modules", "is_experts_module"]

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
NO_EXPERT = -1


@dataclass(frozen=True)
class ExpertsShape:
    """Sizes of one experts module, read from its parameters: attributes differ between families."""

    num_experts: int
    d_model: int
    d_ff: int
    gated: bool
    biased: bool

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsShape:
        flags: Any = module
        down = flags.down_proj.shape  # [E, d_model, d_ff], transposed [E, d_ff, d_model]
        d_model, d_ff = (down[2], down[1]) if flags.is_transposed else (down[1], down[2])
        return cls(down[0], d_model, d_ff, flags.has_gate, flags.has_bias)


def is_experts_module(module: nn.Module) -> bool:
    """Whether the module's class carries transformers' decorator."""
    return all(hasattr(module, flag) for flag in FLAGS)


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> experts module of the seam, swapped or not, in the order in which they are registered."""
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


class ServedExperts(ServedLayer):
    """Stands before the class of an experts module: its forward computes from a runtime's experts.

    ``formula`` is the kernel's activation that computes what the module's own gate does, or None: then the module's own
    function runs between two matrix products.
    """

    shape: ExpertsShape
    formula: str | None
    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' part of an MoE layer.

        Args:
            hidden_states: [T, d_model].
            top_k_index: [T, top_k] integers; what is below 0 or not below ``num_experts`` stands for no expert.
            top_k_weights: [T, top_k]; 0 stands for no expert too, and loads none.

        Returns:
            [T, d_model] of the hidden states' dtype: products of the stored weights in fp32, choices added in fp32 in
            their order, rounded once.
        """
        named = (top_k_index >= 0) & (top_k_index < self.num_experts) & (top_k_weights != 0)
        expert_index = torch.where(named, top_k_index, NO_EXPERT)
        if not torch.compiler.is_compiling():
            self._tell_choices(expert_index)
        gate = top_k_weights.float()
        if self.formula is None:
            return self._through_module(hidden_states, expert_index, gate)
        return ops.moe_layer(hidden_states, expert_index, gate, self.handle)

    def _tell_choices(self, expert_index: Tensor) -> None:
        if self.table_layer is not None:
            chosen = self.runtime.current.chosen
            if chosen is not None:
                chosen[self.table_layer] = expert_index
        self.tell(expert_index)

    @torch.compiler.disable
    def _through_module(self, hidden_states: Tensor, expert_index: Tensor, gate: Tensor) -> Tensor:
        """The same with the module's own function between the two products: right for any gate, and slower."""
        own = cast(Any, self)
        choices = expert_index.reshape(-1)
        top_k = expert_index.shape[1]
        out = hidden_states.new_zeros(choices.numel(), self.shape.d_model, dtype=torch.float32)
        wanted = [int(expert) for expert in choices.unique() if expert >= 0]
        for expert, weights in self.runtime.borrow(self.name, wanted):
            rows = (choices == expert).nonzero().squeeze(1)
            up = _product(hidden_states[rows // top_k].float(), weights.wi, weights.wi_scale, weights.wi_bias)
            if own.has_gate:
                middle = own._apply_gate(up if own.is_concatenated else _interleaved(up))
            else:
                middle = own.act_fn(up)
            down = _product(middle, weights.wo, weights.wo_scale, weights.wo_bias)
            out[rows] = own.post_expert_norm(down).float() if _has_norm(own) else down
        weighted = out.view(*expert_index.shape, -1) * gate.unsqueeze(-1)
        total = weighted[:, 0]
        for choice in range(1, top_k):  # one after the other: the order is part of the result's bits
            total = total + weighted[:, choice]
        return total.to(hidden_states.dtype)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    values = weight.float() if scale is None else weight.float() * scale.unsqueeze(1)
    return nn.functional.linear(x, values, bias)


def _has_norm(module: Any) -> bool:
    return bool(getattr(module, "has_post_expert_norm", False))


def _interleaved(up: Tensor) -> Tensor:
    """[..., gate rows, up rows] -> gate and up in turns."""
    return torch.stack(up.chunk(2, dim=-1), dim=-1).flatten(-2)


@functools.cache
def _served_class(kind: Any) -> type[nn.Module]:
    return type(f"Served{kind.__name__}", (ServedExperts, kind), {"__module__": __name__, "__doc__": kind.__doc__})


class SeamExperts:
    """The experts of a model in memory, an :class:`~sida_ext.experts.source.ExpertSource`.

    Experts of modules that are narrower than the widest (text beside images) get hidden rows of zeros, which contribute
    nothing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules: dict[str, Any] = {}
        owners: dict[int, str] = {}
        for name, module in experts_modules(model).items():
            down: Any = module.down_proj
            if owners.setdefault(id(down), name) == name:  # else its parameters are another module's: one copy serves
                self._modules[name] = module
        self.layers = list(self._modules)
        self.name = type(model).__name__
        self.family = model.config.model_type
        self.layout = "a model in memory"
        shapes = {name: ExpertsShape.of(module) for name, module in self._modules.items()}
        first = next(iter(shapes.values()))
        for name, shape in shapes.items():
            for field in ("num_experts", "d_model", "gated", "biased"):
                if getattr(shape, field) != getattr(first, field):
                    raise ValueError(
                        f"{self.name}: {name} has {field} {getattr(shape, field)}, expected {getattr(first, field)} as "
                        f"{self.layers[0]}; a store holds experts of one shape"
                    )
        self.num_experts, self.d_model = first.num_experts, first.d_model
        self.gated, self.biased = first.gated, first.biased
        self.d_ff = max(shape.d_ff for shape in shapes.values())
        self.fingerprint = secrets.token_hex(16)  # of a store that goes with the model, and is compared with nothing

    def expert(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        module = self._modules[self.layers[layer]]
        wi = (module.gate_up_proj if module.has_gate else module.up_proj)[index]
        wo = module.down_proj[index]
        if module.is_transposed:
            wi, wo = wi.t(), wo.t()
        return self._padded(_gate_first(wi.detach(), module), 0), self._padded(wo.detach(), 1)

    def biases(self, layer: int, index: int) -> tuple[Tensor, Tensor]:
        module = self._modules[self.layers[layer]]
        wi_bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[index].detach()
        return self._padded(_gate_first(wi_bias, module), 0), module.down_proj_bias[index].detach().cpu()

    def _padded(self, tensor: Tensor, dim: int) -> Tensor:
        """Rows of the hidden layer (in ``dim``) up to ``d_ff`` of each half."""
        tensor = tensor.cpu()
        halves = tensor.chunk(2, dim) if dim == 0 and self.gated else (tensor,)
        missing = self.d_ff - halves[0].shape[dim]
        if not missing:
            return tensor.contiguous()
        zeros = halves[0].new_zeros([missing if i == dim else n for i, n in enumerate(halves[0].shape)])
        return torch.cat([part for half in halves for part in (half, zeros)], dim)


def _gate_first(rows: Tensor, module: Any) -> Tensor:
    """Gate rows before up rows, whatever the module's order is."""
    if not module.has_gate or module.is_concatenated:
        return rows
    return torch.cat([rows[0::2], rows[1::2]])


def _verify(layer: ServedExperts) -> None:
    """Raises RuntimeError unless kernel and module agree on random rows of the layer's first expert."""
    rows = torch.randn(3, layer.shape.d_model, generator=torch.Generator().manual_seed(0))
    index, gate = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with torch.no_grad():
        found, wanted = ops.moe_layer(rows, index, gate, layer.handle), layer._through_module(rows, index, gate)
    error, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not error <= 1e-4 * largest + 1e-12:
        raise RuntimeError(
            f"{layer.name}: the kernel {layer.formula} gives {error:g} another result than the module's own function, "
            f"of {largest:g}; this family is not served rightly by this release of sida_ext"
        )


class SeamFamily:
    """How a model whose experts go through the seam is served."""

    name = "experts seam"
    predicted_routing = False
    ignored_keys = (r"\.experts\.",)

    @staticmethod
    def layers(model: nn.Module) -> dict[str, nn.Module]:
        """Module path -> experts module, swapped or not."""
        return experts_modules(model)

    @staticmethod
    def source(model: PreTrainedModel) -> SeamExperts:
        """The experts of a model in memory, to be packed."""
        return SeamExperts(model)

    @staticmethod
    def strip(model: nn.Module) -> list[ServedLayer]:
        """Make every experts module a :class:`ServedExperts` without parameters."""
        served: list[ServedLayer] = []
        owners: dict[int, str] = {}
        for position, (name, module) in enumerate(experts_modules(model).items()):
            own: Any = module
            shape = ExpertsShape.of(module)
            owner = owners.setdefault(id(own.down_proj), name)
            own.__class__ = _served_class(cast(Any, type(module)))
            # A module that shares another's parameters is served by the other's experts.
            own.name, own.table_layer, own.shape = owner, position, shape
            for parameter in PARAMETERS:
                gone = own._parameters.pop(parameter, None)
                if gone is not None:
                    # In its place something of the same shape and type without memory, for code that asks for either.
                    placeholder = torch.empty(gone.shape, dtype=gone.dtype, device="meta")
                    placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
                    setattr(own, parameter, placeholder)
            served.append(own)
        return served

    @staticmethod
    def activation(model: PreTrainedModel, layer: ServedLayer) -> str:
        """Name of the kernel's activation, found by asking the module itself; the module's own function where no kernel
        computes the same."""
        module = cast(ServedExperts, layer)
        module.formula = None if _has_norm(module) else gate_formula(module)
        return module.formula or ("gated-linear" if module.shape.gated else "linear")

    @staticmethod
    def check_activation(model: PreTrainedModel, runtime: Runtime) -> None:
        """Every gate runs: by the kernel, or by the module's own function."""

    @staticmethod
    def has_decoder(model: nn.Module) -> bool:
        """Decoder-only models have no decoder of their own that is predicted step by step."""
        return False

    @staticmethod
    def check_fit(model: PreTrainedModel, header: StoreHeader, layers: list[ServedLayer], path: str) -> None:
        """The store must hold the model's layers in the model's shapes."""
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        for layer in layers:
            module = cast(ServedExperts, layer)
            if module.name not in header.layers:
                owner = tied.get(f"{module.name}.down_proj", "").rpartition(".")[0]
                if owner not in header.layers:
                    raise ValueError(f"{path} lacks the experts of {module.name}; it was packed from another model")
                module.name = owner
            for field in ("num_experts", "d_model", "gated", "biased"):
                found, expected = getattr(header, field), getattr(module.shape, field)
                if found != expected:
                    raise ValueError(
                        f"{path}: {field} is {found}, expected {expected} as in {module.name}; it was packed from "
                        "another model"
                    )
        widest = max(cast(ServedExperts, layer).shape.d_ff for layer in layers)
        if header.d_ff != widest:
            raise ValueError(
                f"{path}: d_ff is {header.d_ff}, expected the model's {widest}; it was packed from another"
            )

    @staticmethod
    def enter(model: PreTrainedModel, runtime: Runtime, layers: list[ServedLayer]) -> None:
        """Nothing stands before the stacks' forwards. The kernel's result is held against the module's own function,
        on a few random rows of one layer of each kind.

        Raises:
            RuntimeError: they differ.
        """
        if runtime.device.type != "cpu":  # whose slots Python cannot read
            return
        kinds = {(type(layer), cast(ServedExperts, layer).formula): cast(ServedExperts, layer) for layer in layers}
        for layer in kinds.values():
            if layer.formula is not None:
                _verify(layer)
        runtime.reset_stats()
