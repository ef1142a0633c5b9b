"""Checkpoints of tiny models, and what their experts must be read as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sida_ext.experts.source import ExpertSource
from sida_ext.models.layouts import experts_modules

__all__ = ["assert_experts_are", "edit_config", "edit_weights", "expected_expert"]


def expected_expert(module: Any, index: int) -> dict[str, Tensor]:
    """The parts of one expert by what transformers' forward does with the module's parameters, not by our code: the
    rows of a product with the identity, gate and up told apart by the module's own flag."""
    eye = {side: torch.eye(size, dtype=module.down_proj.dtype) for side, size in zip("io", _sizes(module), strict=True)}
    up = (module.gate_up_proj if module.has_gate else module.up_proj)[index].detach()
    down = module.down_proj[index].detach()
    wi = (eye["i"] @ up if module.is_transposed else nn.functional.linear(eye["i"], up)).T
    wo = (eye["o"] @ down if module.is_transposed else nn.functional.linear(eye["o"], down)).T
    parts = {"wi": wi, "wo": wo}
    if module.has_bias:
        parts |= {"wi_bias": module.gate_up_proj_bias[index].detach(), "wo_bias": module.down_proj_bias[index].detach()}
    if module.has_gate and not module.is_concatenated:
        for name in ("wi", "wi_bias"):
            if name in parts:
                parts[name] = torch.cat([parts[name][::2], parts[name][1::2]])
    return parts


def _sizes(module: Any) -> tuple[int, int]:
    """d_model and d_ff."""
    _, first, second = module.down_proj.shape
    return (second, first) if module.is_transposed else (first, second)


def assert_experts_are(source: ExpertSource, model: nn.Module) -> None:
    """Every expert that ``source`` reads has the bits of the model's parameters, and zeros where it was padded."""
    modules = experts_modules(model)
    assert source.layers
    for layer, name in enumerate(source.layers):
        module: Any = modules[name]
        width = _sizes(module)[1]
        for index in range(source.num_experts):
            found, expected = source.expert(layer, index), expected_expert(module, index)
            for role in ("wi", "wo", "wi_bias", "wo_bias"):
                part = getattr(found, role)
                assert (part is None) == (role not in expected), role
                if part is None:
                    continue
                assert part.is_contiguous()
                units = part.movedim(0 if role.startswith("wi") else -1, 0)
                if role == "wo_bias":
                    assert torch.equal(part, expected[role])
                    continue
                halves = units.chunk(2) if source.gated and role.startswith("wi") else (units,)
                kept = torch.cat([half[:width] for half in halves])
                assert torch.equal(kept.float(), expected[role].movedim(-1 if role == "wo" else 0, 0).float()), (
                    f"{name} expert {index}: {role} differs"
                )
                assert not any(half[width:].any() for half in halves)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a checkpoint's configuration; None removes one."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a checkpoint's only weight file with what ``change`` made of the dictionary of its tensors."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, path, metadata={"format": "pt"})
