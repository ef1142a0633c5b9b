"""Which family a model is of, and what is asked of a family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from sida_ext.experts.runtime import Runtime
from sida_ext.experts.store import StoreHeader
from sida_ext.models.layers import ServedLayer
from sida_ext.models.refused import refuse_family
from sida_ext.models.seam import SeamFamily
from sida_ext.models.switch import SwitchFamily

__all__ = ["Family", "family_of", "moe_layers"]


class Family(Protocol):
    """How the models of a family are served; a class without state."""

    name: str

    @property
    def ignored_keys(self) -> Sequence[str]:
        """Patterns of the checkpoint's keys that no parameter of the stripped model takes."""

    predicted_routing: bool

    @staticmethod
    def layers(model: nn.Module) -> dict[str, nn.Module]:
        """Module path -> MoE layer or experts module, swapped or not, in the order in which they run."""

    @classmethod
    def source(cls, model: PreTrainedModel) -> Any:
        """The experts of a model in memory, an :class:`~sida_ext.experts.source.ExpertSource`."""

    @classmethod
    def strip(cls, model: nn.Module) -> list[ServedLayer]:
        """Take the experts' parameters out of a model that is not swapped yet; its served layers."""

    @staticmethod
    def activation(model: PreTrainedModel, layer: ServedLayer) -> str:
        """Name of the kernel's activation for a layer."""

    @staticmethod
    def check_activation(model: PreTrainedModel, runtime: Runtime) -> None:
        """Raises ValueError where this model, swapped or not yet, cannot be computed with the runtime's experts."""

    @staticmethod
    def check_fit(model: PreTrainedModel, header: StoreHeader, layers: list[ServedLayer], path: str) -> None:
        """Raises ValueError unless the store holds the model's layers in the model's shapes."""

    @staticmethod
    def has_decoder(model: nn.Module) -> bool:
        """Whether the model has a decoder whose steps a DecoderPredictor can predict."""

    @staticmethod
    def enter(model: PreTrainedModel, runtime: Runtime, layers: list[ServedLayer]) -> None:
        """Let predictions stand before the stacks' forwards."""


FAMILIES: tuple[Family, ...] = (SwitchFamily(), SeamFamily())


def family_of(model: nn.Module) -> Family:
    """The family of a model, swapped or not.

    Raises:
        ValueError: its experts cannot be served; the message names the model and says why.
    """
    for family in FAMILIES:
        if family.layers(model):
            return family
    refuse_family(model, has_experts=False)
    raise AssertionError("refuse_family raises")


def moe_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> MoE layer (of the seam: experts module), swapped or not, in the order in which they run (encoder
    first); empty where there is none."""
    return SwitchFamily.layers(model) or SeamFamily.layers(model)
