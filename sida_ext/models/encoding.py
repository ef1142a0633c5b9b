"""Prediction at an encoder's entry: with predicted or confident routing its MoE layers read a hash table."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from sida_ext.experts.cuda import on_predictor
from sida_ext.experts.runtime import Runtime
from sida_ext.models.guards import BoundMethod
from sida_ext.prediction.protocol import check_table

__all__ = ["predict_encoder"]


def predict_encoder(model: nn.Module, runtime: Runtime, layers: int) -> None:
    """Let ``model.encoder`` build its hash table when it is called outside a stream, by ``model(x)`` or ``generate``.

    Args:
        model: holds a Switch encoder with swapped experts.
        layers: MoE layers of the encoder.
    """
    encoder = model.get_submodule("encoder")
    encoder.forward = BoundMethod(encoder, functools.partial(_forward, runtime, layers))


def _forward(runtime: Runtime, layers: int, encoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands before the encoder's forward."""
    batch = runtime.current
    table = None if batch.entered else batch.table  # of a stream's batch, for one forward; one inside it has its own
    if table is None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is not None and runtime.predictor is not None:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            if runtime.device.type != "cpu":
                input_ids, mask = on_predictor(runtime.predictor, input_ids, mask)
            with torch.profiler.record_function("sida::predict"):
                table = runtime.predictor.predict(input_ids, mask)
            check_table(table, runtime.predictor, input_ids, layers, runtime.header.num_experts)
    with runtime.batch(batch.number, table, None if batch.entered else batch.chosen, entered=True):
        return type(encoder).forward(encoder, *args, **kwargs)
