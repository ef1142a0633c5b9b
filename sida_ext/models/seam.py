"""The experts seam of transformers 5: one adapter for every family whose experts module carries
``@use_experts_implementation`` (transformers, integrations/moe.py).

Such a module is called with hidden states ``[tokens, width]``, chosen experts ``[tokens, top_k]`` and their weights;
its parameters are ``gate_up_proj`` (or ``up_proj``), ``down_proj`` and their biases, each with a first dimension of
experts. A served module keeps its place, its attributes and its class's methods; its parameters are gone and its
forward takes the experts from the expert store. Routers, shared experts and attention stay transformers'.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sida_ext import ops
from sida_ext.experts.quantise import Quantised
from sida_ext.experts.runtime import Runtime
from sida_ext.experts.store import StoreHeader
from sida_ext.models.causal_steps import predict_causal
from sida_ext.models.gates import by_rows, gate_formula, own_gate
from sida_ext.models.layers import ServedLayer
from sida_ext.models.layouts import expert_parameters, experts_modules, shared_modules
from sida_ext.models.seam_source import SeamModules

__all__ = ["ExpertsShape", "SeamFamily", "ServedExperts"]

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
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
        experts, *sides = expert_parameters(module)["wo"].shape  # [E, d_model, d_ff], transposed [E, d_ff, d_model]
        d_model, d_ff = reversed(sides) if flags.is_transposed else sides
        return cls(experts, d_model, d_ff, flags.has_gate, flags.has_bias)


class ServedExperts(ServedLayer):
    """Stands before the class of an experts module: its forward computes from a runtime's experts.

    ``formula`` is the kernel's activation that computes what the module's own gate does, or None: then the module's own
    function runs between two matrix products.
    """

    shape: ExpertsShape
    formula: str | None
    tied_to: frozenset[str]  # paths of modules whose parameters are to be the same ones
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
        gate = top_k_weights.float()
        if torch.compiler.is_compiling():
            return self._experts(hidden_states, expert_index, gate)
        self._tell_choices(expert_index)
        if self.ahead is None:
            return self._experts(hidden_states, expert_index, gate)
        self.ahead.before(expert_index)
        try:
            return self._experts(hidden_states, expert_index, gate)
        finally:
            self.ahead.after()

    def _experts(self, hidden_states: Tensor, expert_index: Tensor, gate: Tensor) -> Tensor:
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
            up = _product(hidden_states[rows // top_k].float(), weights.wi, weights.wi_bias)
            middle = by_rows(functools.partial(own_gate, self), up)
            down = _product(middle, weights.wo, weights.wo_bias)
            out[rows] = by_rows(own.post_expert_norm, down).float() if _has_norm(own) else down
        weighted = out.view(*expert_index.shape, self.shape.d_model) * gate.unsqueeze(-1)
        total = weighted[:, 0]
        for choice in range(1, top_k):  # one after the other: the order is part of the result's bits
            total = total + weighted[:, choice]
        return total.to(hidden_states.dtype)


def _product(x: Tensor, weight: Tensor | Quantised, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Quantised):
        return ops.linear(x, weight.values, weight.scale, bias)
    return ops.linear(x, weight, None, bias)


def _has_norm(module: Any) -> bool:
    return bool(getattr(module, "has_post_expert_norm", False))


def _kernel_formula(module: nn.Module) -> str | None:
    """The kernel's activation that computes what an experts module, swapped or not, does between its two products and
    behind them; None: there is none."""
    if _has_norm(module):
        return None
    shape = module.shape if isinstance(module, ServedExperts) else ExpertsShape.of(module)
    return gate_formula(module, shape.d_ff)


def _untie(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, frozenset[str]]:
    """Take the experts' parameters out of what transformers ties after loading; module path -> paths tied to it."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    pairs: dict[str, set[str]] = {}
    for target, source in list(tied.items()):
        one, other = target.rpartition(".")[0], source.rpartition(".")[0]
        if one in modules and target.rpartition(".")[2] in PARAMETERS:
            pairs.setdefault(one, set()).add(other)
            pairs.setdefault(other, set()).add(one)
            del tied[target]
    return {name: frozenset(others) for name, others in pairs.items()}


@functools.cache
def _served_class(kind: Any) -> type[nn.Module]:
    # Found under its qualified name, so that pickling a model gets as far as the runtime, which says why not.
    place = f"{kind.__module__}.{kind.__qualname__}".replace(".", "_")
    named = {"__module__": __name__, "__qualname__": place, "__doc__": kind.__doc__}
    globals()[place] = made = type(f"Served{kind.__name__}", (ServedExperts, kind), named)
    return made


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
    def source(model: PreTrainedModel) -> SeamModules:
        """The experts of a model in memory, to be packed."""
        return SeamModules(model)

    @staticmethod
    def strip(model: nn.Module) -> list[ServedLayer]:
        """Make every experts module a :class:`ServedExperts` without parameters."""
        served: list[ServedLayer] = []
        modules = experts_modules(model)
        owners = shared_modules(modules)
        tied = _untie(model, modules)
        for position, (name, module) in enumerate(modules.items()):
            own: Any = module
            shape = ExpertsShape.of(module)
            own.__class__ = _served_class(cast(Any, type(module)))
            # A module that shares another's parameters is served by the other's experts.
            own.name, own.table_layer, own.shape = owners.get(name, name), position, shape
            own.tied_to = tied.get(name, frozenset())
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
        module.formula = _kernel_formula(module)
        return module.formula or ("gated-linear" if module.shape.gated else "linear")

    @staticmethod
    def check_activation(model: PreTrainedModel, runtime: Runtime) -> None:
        """Every gate runs: by the kernel, or on a CPU by the module's own function.

        Raises:
            ValueError: on a GPU, a gate that no kernel computes.
        """
        for name, module in experts_modules(model).items():
            if _kernel_formula(module) is None and runtime.device.type != "cpu":
                raise ValueError(
                    f"{name}: no kernel computes what {type(module).__name__} does between its two products, and its "
                    f"own function cannot run on experts in {runtime.device}'s memory; load the model with device='cpu'"
                )

    @staticmethod
    def has_decoder(model: nn.Module) -> bool:
        """A decoder-only model is one, and its steps may be predicted."""
        return True

    @staticmethod
    def check_fit(model: PreTrainedModel, header: StoreHeader, layers: list[ServedLayer], path: str) -> None:
        """The store must hold the model's layers in the model's shapes."""
        for layer in layers:
            module = cast(ServedExperts, layer)
            if module.name not in header.layers:
                owner = next((name for name in header.layers if name in module.tied_to), None)
                if owner is None:
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
        """Prompts and steps are predicted while the runtime has a predictor. The kernel's result is held against the
        module's own function, on a few random rows of one layer of each kind.

        Raises:
            RuntimeError: they differ.
        """
        predict_causal(model, runtime, [layer.name for layer in layers])
        if runtime.device.type != "cpu":  # whose slots Python cannot read
            return
        kinds = {(type(layer), cast(ServedExperts, layer).formula): cast(ServedExperts, layer) for layer in layers}
        with runtime.exact():
            for layer in kinds.values():
                if layer.formula is not None:
                    _verify(layer)
        runtime.reset_stats()
