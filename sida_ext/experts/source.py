"""What a store is packed from: the experts of a model, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sida_ext.experts.quantise import Quantised

__all__ = ["ExpertSource", "ExpertWeights"]


@dataclass(frozen=True)
class ExpertWeights:
    """One expert in the store's layout, whatever the checkpoint's was: rows of ``[out, in]``, gate rows before up rows.

    Attributes:
        wi: [d_ff, d_model], gated: [2 * d_ff, d_model], floating point on the CPU, or quantised.
        wo: [d_model, d_ff], of the same type.
        wi_bias, wo_bias: [rows of wi] and [d_model]; both or none.
    """

    wi: Tensor | Quantised
    wo: Tensor | Quantised
    wi_bias: Tensor | None = None
    wo_bias: Tensor | None = None


class ExpertSource(Protocol):
    """Where the experts of a store come from. Every expert has one shape."""

    @property
    def layers(self) -> Sequence[str]:
        """Module path of each experts module (Switch: of its MoE layer), in the order of the model's modules."""

    num_experts: int
    d_model: int
    d_ff: int
    gated: bool
    biased: bool
    family: str  # ``model_type`` of the configuration that the experts belong to
    layout: str  # a phrase on how the checkpoint holds them
    top_k: tuple[int, ...]  # experts for each token: one number, or one for each layer; empty: not known
    activation: str  # transformers' name of the activation function; "": the module's own
    gate: str  # the gate's formula: "act(gate) * up", "" without a gate, else the name of the module's own function
    fingerprint: str  # identity of the weights
    name: str

    def expert(self, layer: int, index: int, dtype: str | None = None) -> ExpertWeights:
        """The weights of expert ``index`` of ``layers[layer]``.

        Args:
            dtype: the store's type; matrices that are quantised in just this type may be given as they are.
        """
