"""Switch Transformers: MoE layers that take their experts from an expert store, and how such a model is served."""

from __future__ import annotations

import re
from typing import cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from sida_ext import ops
from sida_ext.experts.runtime import Runtime
from sida_ext.experts.store import StoreHeader
from sida_ext.models.decoding import predict_decoder
from sida_ext.models.encoding import predict_encoder
from sida_ext.models.layers import ServedLayer
from sida_ext.models.packed_rows import Packing
from sida_ext.models.switch_source import SwitchModules

__all__ = ["SparseMLP", "SwitchFamily", "Top1Router", "check_release"]

# The first release whose MoE layer is the one that is served here (docs/versions.md).
MINIMUM_TRANSFORMERS = (5, 18)


def check_release(found: str = transformers.__version__) -> None:
    """Switch Transformers mean something else in older releases, and are not served there with a meaning of their own.

    Raises:
        RuntimeError: transformers is too old; the message says what differs.
    """
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < MINIMUM_TRANSFORMERS:
        raise RuntimeError(
            f"transformers {found} is installed, but Switch Transformers need 5.18 or later: before, the model's own "
            "router never drops a token beyond its expert's capacity, and results would differ; run: "
            "pip install --upgrade transformers"
        )


class Top1Router(SwitchTransformersTop1Router):
    """transformers' router with softmax, argmax and capacity in one op.

    Attributes:
        packing: of texts that stand one behind the other in one row, each with its own count of an expert's tokens;
            None: each row is a text.

    Returns ``expert_index`` [B, S] int32 (-1: over capacity), ``gate`` [B, S] float32 and the raw router logits
    [B, S, E], which transformers' output capture takes as the third result.
    """

    packing: Packing | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.input_dtype = hidden_states.dtype
        if self.classifier.weight.dtype != self.dtype:  # torch 2.10 cannot compile a module's `to`
            self.classifier = self.classifier.to(self.dtype)
        logits = self.classifier(hidden_states.to(self.dtype))
        # transformers rounds the probabilities to the router's dtype, then to the input's; the second rounding
        # changes nothing when the router computes in fp32 or the input is fp32.
        rounded = hidden_states.dtype if self.dtype == torch.float32 else self.dtype
        if hidden_states.dtype not in (torch.float32, rounded):
            raise ValueError(
                f"router_dtype is {self.dtype} and the model's dtype {hidden_states.dtype}; with a router below "
                "float32 the model must be float32 or of the router's dtype"
            )
        packing = self.packing
        rows = logits if packing is None else packing.rows(logits)
        expert_index, gate = ops.route_top1(rows, self.expert_capacity, probs_dtype=rounded)
        if packing is not None:
            expert_index, gate = packing.packed(expert_index), packing.packed(gate)
        return expert_index, gate, logits


class SparseMLP(ServedLayer):
    """An MoE layer whose experts live in a :class:`~sida_ext.experts.runtime.Runtime`; replaces
    SwitchTransformersSparseMLP.

    Args:
        router: the layer's own router, kept.
        name: module path of the layer, as in the store.
        table_layer: position of the layer in its stack's hash tables; None where no table covers it.
    """

    def __init__(self, router: SwitchTransformersTop1Router, name: str, table_layer: int | None) -> None:
        super().__init__()
        router.__class__ = Top1Router
        self.router = router
        self.name = name
        self.table_layer = table_layer
        self.training = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, d_model] -> [B, S, d_model], 0 for tokens over capacity."""
        if self.routing == "predicted" and self.table_layer is not None:
            expert_index, gate, _ = self._predicted(hidden_states)
        else:
            expert_index, gate, _ = self.router(hidden_states)
            if self.table_layer is not None:
                chosen = self.runtime.current.chosen
                if chosen is not None:
                    chosen[self.table_layer] = expert_index
            if self.routing == "confident" and self.table_layer is not None:
                named, factor, probability = (part.to(expert_index.device) for part in self._predicted(hidden_states))
                sure = probability >= self.confidence
                expert_index = torch.where(sure, named, expert_index)
                gate = torch.where(sure, factor, gate)
        self.tell(expert_index)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = ops.moe_layer(tokens, expert_index.reshape(-1, 1), gate.reshape(-1, 1), self.handle)
        return out.view(hidden_states.shape)

    def _predicted(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table's first choice for each token: expert_index [B, S], gate [B, S] and its probability [B, S]."""
        table = self.runtime.current.table
        if table is None:
            raise RuntimeError(
                f"{self.name}: routing={self.routing!r} needs the batch's hash table, and there is none; give the "
                "model a predictor (from_pretrained(..., predictor=...)) or run it through sida_ext.stream"
            )
        shape = tuple(table.expert_index.shape)
        if shape[:2] != tuple(hidden_states.shape[:2]) or shape[2] <= self.table_layer:
            raise ValueError(
                f"{self.name}: the hash table has shape {shape}, expected {tuple(hidden_states.shape[:2])} tokens and "
                f"more than {self.table_layer} layers"
            )
        probability = table.chance
        first = (slice(None), slice(None), self.table_layer, 0)
        return table.expert_index[first].int(), table.gate[first].float(), probability[first]

    def extra_repr(self) -> str:
        return f"name={self.name!r}, routing={self.routing!r}"


class SwitchFamily:
    """How a Switch Transformers model is served."""

    name = "switch_transformers"
    predicted_routing = True
    # Keys of the checkpoint that no parameter of the stripped model takes.
    ignored_keys = (r"\.mlp\.experts\.expert_\d+\.",)

    @staticmethod
    def layers(model: nn.Module) -> dict[str, nn.Module]:
        """Module path -> MoE layer, swapped or not, in the order in which they run (encoder first)."""
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (SwitchTransformersSparseMLP, SparseMLP))
        }

    @classmethod
    def source(cls, model: PreTrainedModel) -> SwitchModules:
        """The experts of a model in memory, to be packed."""
        return SwitchModules(
            {name: cast(nn.ModuleDict, layer.experts) for name, layer in cls.layers(model).items()},
            type(model).__name__,
            model.config.dense_act_fn,
        )

    @classmethod
    def strip(cls, model: nn.Module) -> list[ServedLayer]:
        """Put a :class:`SparseMLP` in the place of every MoE layer; the experts' parameters go with the old ones."""
        check_release()
        replaced: list[ServedLayer] = []
        tables = 0
        for name, layer in cls.layers(model).items():
            parent_name, _, attribute = name.rpartition(".")
            decoder = "decoder" in name.split(".")
            served = SparseMLP(cast(SwitchTransformersTop1Router, layer.router), name, None if decoder else tables)
            tables += not decoder
            setattr(model.get_submodule(parent_name), attribute, served)
            replaced.append(served)
        return replaced

    @staticmethod
    def activation(model: PreTrainedModel, layer: ServedLayer) -> str:
        """Name of the kernel's activation."""
        return model.config.dense_act_fn

    @staticmethod
    def check_activation(model: PreTrainedModel, runtime: Runtime) -> None:
        """Raises ValueError for an activation that the kernels do not know."""
        runtime.layer_handle(runtime.header.layers[0], model.config.dense_act_fn)

    @staticmethod
    def has_decoder(model: nn.Module) -> bool:
        """Whether the model has a decoder with MoE layers."""
        return any("decoder" in name.split(".") for name in SwitchFamily.layers(model))

    @staticmethod
    def check_fit(model: PreTrainedModel, header: StoreHeader, layers: list[ServedLayer], path: str) -> None:
        """The store must hold the model's layers in the model's shapes."""
        config = model.config
        for field, found, expected in (
            ("d_model", header.d_model, config.d_model),
            ("d_ff", header.d_ff, config.d_ff),
            ("num_experts", header.num_experts, config.num_experts),
        ):
            if found != expected:
                raise ValueError(
                    f"{path}: {field} is {found}, expected the model's {expected}; it was packed from another model"
                )
        missing = [layer.name for layer in layers if layer.name not in header.layers]
        if missing:
            raise ValueError(f"{path} lacks the MoE layer {missing[0]}; it was packed from another model")

    @staticmethod
    def enter(model: PreTrainedModel, runtime: Runtime, layers: list[ServedLayer]) -> None:
        """Stand before the stacks' forwards: a decoder's steps are predicted in every routing, an encoder's hash table
        is built where a layer reads it."""
        decoder = [layer.name for layer in layers if layer.table_layer is None]
        if decoder:
            predict_decoder(model, runtime, decoder)
        if runtime.options.routing != "router" and len(decoder) < len(layers):
            predict_encoder(model, runtime, len(layers) - len(decoder))
