"""What ``device="cuda"`` needs of the host: which device, how much pinned memory, what to say where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sida_ext._load import _C
from sida_ext.experts.budget import available_memory, format_bytes, parse_memory

__all__ = ["cuda_blocking", "host_slots", "on_predictor", "resolve_device"]


def resolve_device(device: str | torch.device, host_memory: object = None) -> torch.device:
    """The device that a model is asked to compute on, checked before anything is loaded; ``cuda`` gets a number.

    Raises:
        ValueError: a device that there is not, or ``host_memory`` for the CPU.
        RuntimeError: CUDA is asked for and this build, this machine or this torch has none; the message says which.
    """
    wanted = torch.device(device)
    if wanted.type == "cpu":
        if host_memory is not None:
            raise ValueError(
                f"host_memory is {host_memory!r}, but the CPU computes from expert_memory alone; leave it out"
            )
        return wanted
    if wanted.type != "cuda":
        raise ValueError(f"device is {str(device)!r}, expected 'cpu', 'cuda' or 'cuda:N'")
    if not _C.cuda_built:
        raise RuntimeError(
            f"device is {str(device)!r}, but this build of sida_ext has no CUDA: install a CUDA build of torch "
            f"(this one is {torch.__version__}) and nvcc 12.8 or later, then build again: "
            "SIDA_CUDA=on pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    index = wanted.index
    if index is None:  # what "cuda" means to torch; without a device, 0 is there to say what is missing
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    _C.check_cuda_device(index)  # says what is missing: driver, device, capability
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"device is {str(device)!r}, but torch.cuda.is_available() is False in torch {torch.__version__}"
        )
    return torch.device("cuda", index)


def cuda_blocking() -> bool:
    """Whether SIDA_CUDA_BLOCKING=1 asks each MoE layer to wait for its kernels: a failure of the GPU is then raised by
    the call that caused it and not by a later one. Slow: to find a cause."""
    wish = os.environ.get("SIDA_CUDA_BLOCKING", "0")
    if wish not in ("0", "1"):
        raise ValueError(f"SIDA_CUDA_BLOCKING is {wish!r}, expected 0 or 1")
    return wish == "1"


def host_slots(
    host_memory: str | int | None, record_bytes: int, total_experts: int, say: Callable[[str], None] | None = None
) -> int:
    """Experts that the pinned pool holds.

    Args:
        host_memory: bytes, ``"8GiB"``, ``"50%"`` of the experts, or None: all experts if they fit in half of the memory
            that is free now, else as many as fit in that half, which is then said.
        record_bytes: of one expert. total_experts: of the store.
    """
    whole = record_bytes * total_experts
    if host_memory is not None:
        slots = min(parse_memory(host_memory, whole, "host_memory") // record_bytes, total_experts)
        if slots < 1:
            raise ValueError(
                f"host_memory is {host_memory!r}; the smallest that works is one expert of this store, {record_bytes} "
                f"bytes ({format_bytes(record_bytes)})"
            )
        return slots
    free = available_memory()
    slots = min(free // 2 // record_bytes, total_experts)
    if slots < 1:
        raise ValueError(
            f"half of the {format_bytes(free)} of free memory holds no expert of {format_bytes(record_bytes)}; give "
            "host_memory"
        )
    if slots < total_experts and say is not None:
        say(
            f"sida_ext: the pinned host pool holds {slots} of {total_experts} experts, "
            f"{format_bytes(slots * record_bytes)}, half of the memory that is free; the others are read from the "
            "store when they are wanted. host_memory= chooses another size."
        )
    return slots


def on_predictor(predictor: Any, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both where the predictor's parameters are: a model on a GPU is mostly predicted for by the CPU."""
    first = next(iter(predictor.parameters()), None) if isinstance(predictor, torch.nn.Module) else None
    device = first.device if first is not None else torch.device("cpu")
    return input_ids.to(device), None if mask is None else mask.to(device)
