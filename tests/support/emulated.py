"""device="cuda" without a GPU: the package's own Python over the two-tier engine and a recording CUDA runtime.

Tensors stay on the CPU, for torch has no other device here. Everything else is as on a GPU machine: the runtime's two
tiers, pinned pool, slots, lanes, events, budgets and counters; the CPU's kernels read the slots. Every call of the CUDA
runtime is recorded, and what is not ordered, not given back or made at the wrong time is a problem that the test fails
with. tests/cuda/emulated_serving.cpp is the C++ half.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sysconfig
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

import sida_ext.experts.cuda
import sida_ext.experts.runtime
import sida_ext.models.swap
from sida_ext import _C
from sida_ext.experts.runtime import Runtime

FREE_BYTES = 8 << 30  # that the emulated devices say they have


def load(folder: Path) -> ModuleType:
    """The C++ half, from the folder that it was built in."""
    spec = importlib.util.spec_from_file_location("sida_emulated_cuda", folder / "sida_emulated_cuda.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The pybind11 that _C was compiled with: only the same one shares classes.
BUILD_OPTIONS = (
    f"-DSIDA_PYTHON_INCLUDE={sysconfig.get_path('include')}",
    f"-DSIDA_PYBIND11_INCLUDE={pybind11.get_include()}",
)


class _TorchWithDevices:
    """torch, for the modules that ask it what devices there are."""

    cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        mem_get_info=lambda device=None: (FREE_BYTES, FREE_BYTES),
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Emulated:
    """Puts itself in the place of the GPU in sida_ext, for one test."""

    def __init__(self, module: ModuleType, patch: pytest.MonkeyPatch, devices: int) -> None:
        self.machine = module.Machine(devices)
        self.indices_on_host = False
        self._layers: dict[int, tuple[Any, int, int, str]] = {}
        self._handles = itertools.count(1 << 40)
        self._thread = threading.local()
        machine = self.machine

        class Serving(module.CudaServing):  # type: ignore[name-defined, misc]
            def pool_stats(self) -> dict[str, Any]:
                return self.pool.stats()

            def reset_pool_stats(self) -> None:
                self.pool.reset_stats()

        class EmulatedRuntime(Runtime):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.cuda_device, self.device = self.device, torch.device("cpu")

        set_batch = _C.set_current_batch

        def set_current_batch(batch: int) -> None:
            self._thread.batch = batch
            set_batch(batch)

        patch.setattr(_C, "cuda_built", True)
        patch.setattr(_C, "CudaServing", functools.partial(Serving, machine), raising=False)
        patch.setattr(_C, "check_cuda_device", machine.check_device, raising=False)
        patch.setattr(_C, "register_cuda_layer", self._register, raising=False)
        patch.setattr(_C, "set_current_batch", set_current_batch)
        patch.setattr(sida_ext.experts.cuda, "torch", _TorchWithDevices())
        patch.setattr(sida_ext.experts.runtime, "torch", _TorchWithDevices())
        patch.setattr(sida_ext.models.swap, "Runtime", EmulatedRuntime)
        self._ops = torch.library.Library("sida", "IMPL")
        self._ops.impl("moe_layer", self._moe_layer, "CPU")

    def _register(self, serving: Any, index: int, num_experts: int, activation: str) -> int:
        handle = next(self._handles)
        self._layers[handle] = (serving, index, num_experts, activation)
        return handle

    def _moe_layer(self, x: Tensor, expert_index: Tensor, gate: Tensor, handle: int) -> Tensor:
        serving, index, num_experts, activation = self._layers[handle]
        x, gate = x.contiguous(), gate.float().contiguous()
        expert_index = expert_index.int().contiguous()
        out = torch.zeros_like(x)
        partials = torch.zeros(*expert_index.shape, x.shape[1]) if expert_index.shape[1] > 1 else None
        serving.forward(
            self.machine,
            layer=index,
            batch=getattr(self._thread, "batch", 0),
            tokens=x.shape[0],
            top_k=expert_index.shape[1],
            d_model=x.shape[1],
            num_experts=num_experts,
            dtype=str(x.dtype).removeprefix("torch."),
            activation=activation,
            x=x.data_ptr(),
            expert_index=expert_index.data_ptr(),
            gate=gate.data_ptr(),
            out=out.data_ptr(),
            partials=0 if partials is None else partials.data_ptr(),
            indices_on_host=self.indices_on_host,
        )
        return out

    def end(self) -> list[str]:
        """Restores the op; returns what the recording has to say."""
        self._ops._destroy()
        self._layers.clear()
        self.machine.finish()
        return self.machine.problems()
