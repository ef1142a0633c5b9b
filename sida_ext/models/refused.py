"""Families whose experts cannot be served, by name and with the reason."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["refuse_configuration", "refuse_family"]

_OWN_EXPERTS = (
    "its experts modules are its own and do not go through transformers' experts interface, so nothing can take their "
    "place"
)
_REASONS = {
    "nllb-moe": "transformers' own model runs only two of its experts, whatever the router chooses (it reads the "
    "router's mask as numbers), so there is nothing right to be compared with",
    "dbrx": _OWN_EXPERTS,
    "jetmoe": _OWN_EXPERTS,
    "llama4": "all of its experts run for every token (unchosen ones on zeros), so a budget of experts saves nothing",
    "llama4_text": "all of its experts run for every token (unchosen ones on zeros), so a budget of experts saves "
    "nothing",
    "longcat_flash": _OWN_EXPERTS,
    "step3p7": _OWN_EXPERTS,
    "step3p5": _OWN_EXPERTS,
    "vitpose": _OWN_EXPERTS,
    "vitpose_backbone": _OWN_EXPERTS,
}


def refuse_configuration(config: PretrainedConfig, where: str) -> None:
    """Raises ValueError for the configuration of a family that cannot be served: before a model is built of it, and
    before its weights are looked for."""
    for name in (config.model_type, config.get_text_config(decoder=True).model_type):
        if name in _REASONS:
            names = ", ".join(config.architectures or []) or type(config).__name__
            raise ValueError(f"{where}: {names} (model_type {name}) cannot be served: {_REASONS[name]}")


def refuse_family(model: nn.Module, has_experts: bool) -> None:
    """Raises ValueError for a family that cannot be served, and for a model without experts."""
    if has_experts:
        return
    names = [module.config.model_type for module in model.modules() if isinstance(module, PreTrainedModel)]
    for name in names:
        if name in _REASONS:
            raise ValueError(f"{type(model).__name__} (model_type {name}) cannot be served: {_REASONS[name]}")
    kind = names[0] if names else "none"
    raise ValueError(
        f"{type(model).__name__} (model_type {kind}) has no experts modules of transformers' experts interface and is "
        "no Switch Transformer; there are no experts to serve"
    )
