"""Quantised checkpoints: which are read, and the numbers of an expert as they lie in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from sida_ext.experts.quantise import GROUP, Quantised

if TYPE_CHECKING:
    from sida_ext.models.layouts import ExpertLayout

__all__ = ["dequantised", "dequantizer_of", "quantization_of", "raw_mxfp4"]

# Read one expert at a time by transformers' own dequantisation.
READ = ("fp8", "mxfp8", "mxfp4")


def quantization_of(config: PretrainedConfig) -> Any:
    """The configuration's ``quantization_config``, its own or its text part's; None: not quantised."""
    found = getattr(config, "quantization_config", None)
    return found if found is not None else getattr(config.get_text_config(decoder=True), "quantization_config", None)


def _method(found: Any) -> str:
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    method = values.get("quant_method")
    return str(getattr(method, "value", method))


def dequantizer_of(config: PretrainedConfig) -> Any:
    """transformers' quantizer, set to dequantise; None for a checkpoint that is not quantised.

    Raises:
        ValueError: a quantisation that is not read.
    """
    found = quantization_of(config)
    if found is None:
        return None
    method = _method(found)
    if method not in READ:
        raise ValueError(
            f"config.json says that the checkpoint is quantised by {method!r}; {', '.join(READ)} and checkpoints that "
            "are not quantised are read. Take the original checkpoint and let the experts be packed in few bits: "
            "expert_dtype=, sida pack --dtype"
        )
    quantizer = AutoHfQuantizer.from_config(found, pre_quantized=True)
    quantizer.quantization_config.dequantize = True
    return quantizer


def dequantised(config: PretrainedConfig) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` must be told to dequantise the weights beside the experts too."""
    quantizer = dequantizer_of(config)
    return {} if quantizer is None else {"quantization_config": quantizer.quantization_config}


def raw_mxfp4(layout: ExpertLayout, name: str, index: int) -> tuple[Quantised, Quantised] | None:
    """``wi`` and ``wo`` of an expert as an MXFP4 checkpoint holds them, in the order of a store's rows; None: it is not
    MXFP4."""
    module, recipes = layout.modules[name], layout.recipes[name]
    parts: list[Quantised] = []
    for role in ("wi", "wo"):
        recipe = recipes[role]
        if [type(operation).__name__ for operation in recipe.operations] != ["Mxfp4Dequantize"]:
            return None
        pair: dict[str, Tensor] = {}
        for pattern, keys in recipe.sources.items():
            rows = layout.files.rows(keys[0], index, index + 1)[0]
            if role == "wi" and module.has_gate and not module.is_concatenated:
                rows = torch.cat([rows[0::2], rows[1::2]])
            pair["scales" if pattern.endswith("_scales") else "blocks"] = rows
        values, scales = pair["blocks"].flatten(1).contiguous(), pair["scales"].contiguous()
        parts.append(Quantised(values, scales, GROUP * scales.shape[1]))
    return parts[0], parts[1]
