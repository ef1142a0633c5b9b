"""One MoE layer beside transformers, torch's grouped products and the floor; run it with ``python -m bench``.

The floor is max(bytes of the distinct experts / read bandwidth, multiply-adds / fp32 GEMM peak), both measured in this
process. Every call gets fresh tokens and fresh uniform routing (or Zipf's, in the skewed groups).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from sida_ext import _C, ops

THREADS = 2
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Shape:
    d_model: int = 768
    d_ff: int = 3072
    experts: int = 128
    top_k: int = 1
    skewed: bool = False

    def __str__(self) -> str:
        return f"{self.d_model}x{self.d_ff} E{self.experts} K{self.top_k}{' zipf' if self.skewed else ''}"


@dataclass
class Layer:
    """Weights of one dtype, the transformers module over the same memory for float32, and a source of calls."""

    shape: Shape
    dtype: torch.dtype
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        s = self.shape
        self.scales: dict[str, Tensor] = {}
        if self.dtype == torch.int8:
            self.wi = torch.randint(-127, 128, (s.experts, s.d_ff, s.d_model), generator=self.random, dtype=torch.int8)
            self.wo = torch.randint(-127, 128, (s.experts, s.d_model, s.d_ff), generator=self.random, dtype=torch.int8)
            self.scales = {
                "wi_scale": torch.full((s.experts, s.d_ff), 1e-4),
                "wo_scale": torch.full((s.experts, s.d_model), 1e-4),
            }
        else:
            # The values do not change the time; one expert's are repeated, which is quicker than 300 million draws.
            wi = (torch.randn(s.d_ff, s.d_model, generator=self.random) * 0.02).to(self.dtype)
            wo = (torch.randn(s.d_model, s.d_ff, generator=self.random) * 0.02).to(self.dtype)
            self.wi, self.wo = wi.repeat(s.experts, 1, 1), wo.repeat(s.experts, 1, 1)
        self.slots = torch.arange(s.experts, dtype=torch.int32)

    @property
    def expert_bytes(self) -> int:
        return 2 * self.shape.d_model * self.shape.d_ff * self.wi.element_size()

    def draw(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        s = self.shape
        odds = torch.arange(1, s.experts + 1).float() ** (-1.0 if s.skewed else 0.0)
        index = torch.multinomial(odds.expand(tokens, -1), s.top_k, generator=self.random)
        x = torch.randn(tokens, s.d_model, generator=self.random)
        return x, index, torch.rand(tokens, s.top_k, generator=self.random)

    def ours(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        return ops.moe_ffn(x, index, gate, self.wi, self.wo, self.slots, **self.scales)

    def transformers(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """transformers' experts over the same memory (float32, top-1)."""
        s = self.shape
        config = SwitchTransformersConfig(d_model=s.d_model, d_ff=s.d_ff, num_experts=s.experts, dropout_rate=0.0)
        with torch.device("meta"):
            experts = SwitchTransformersExperts(config).eval()
        for e in range(s.experts):
            experts[f"expert_{e}"].wi.weight = torch.nn.Parameter(self.wi[e], requires_grad=False)
            experts[f"expert_{e}"].wo.weight = torch.nn.Parameter(self.wo[e], requires_grad=False)

        def call(x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
            result: Tensor = experts(x, F.one_hot(index, s.experts), gate)
            return result

        return call

    def grouped(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """torch's grouped products over tokens sorted by expert; None where this torch has none for the dtype on a
        CPU."""
        product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if product is None or self.dtype == torch.int8:
            return None

        def call(x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
            flat = index.flatten()
            order = flat.argsort(stable=True)
            ends = torch.bincount(flat, minlength=self.shape.experts).cumsum(0).to(torch.int32)
            sorted_x = x[order // self.shape.top_k].to(self.dtype)
            hidden = product(sorted_x, self.wi.transpose(1, 2), offs=ends).relu()
            rows = product(hidden, self.wo.transpose(1, 2), offs=ends).float() * gate.flatten()[order, None]
            return torch.zeros_like(x).index_add_(0, order // self.shape.top_k, rows)

        try:
            call(*self.draw(4))
        except (RuntimeError, NotImplementedError):
            return None
        return call


class Layers:
    """Keeps one layer at a time: the float32 weights of 128 experts alone are 2.4 GB."""

    def __init__(self) -> None:
        self.key: tuple[Shape, str] | None = None
        self.layer: Layer | None = None

    def get(self, shape: Shape, dtype: str) -> Layer:
        if self.layer is None or self.key != (shape, dtype):
            self.layer = None
            self.layer, self.key = Layer(shape, DTYPES[dtype]), (shape, dtype)
        return self.layer


@pytest.fixture(scope="session")
def layers() -> Layers:
    return Layers()


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """Measured rates of this process; the best of several, as the floor must not be passed."""
    torch.set_num_threads(THREADS)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return {
        "instruction_set": _C.instruction_set(),
        "threads": THREADS,
        "bandwidth": _C.measure_memory_bandwidth(THREADS),
        "gemm": 2 * 2048**3 / min(times),
    }


def measure(call: Callable[..., Tensor], draws: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Median seconds over the draws."""
    times = []
    for arguments in draws:
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


SWITCH_BASE = Shape()
CASES = [
    *((SWITCH_BASE, dtype, t) for dtype in ("float32", "bfloat16", "int8") for t in (1, 8, 32, 64, 256, 1024, 4096)),
    *((SWITCH_BASE, "float16", t) for t in (1, 32, 1024)),
    *((Shape(skewed=True), "bfloat16", t) for t in (8, 64, 1024)),
    *((Shape(top_k=2), "bfloat16", t) for t in (8, 64, 1024)),
    *((Shape(1024, 4096), "bfloat16", t) for t in (1, 32, 1024)),
    *((Shape(experts=8), "bfloat16", t) for t in (1, 32, 1024)),
    *((Shape(experts=32), "bfloat16", t) for t in (32,)),
    *((Shape(experts=256), "bfloat16", t) for t in (32, 1024)),
]


# Float32 first: the other dtypes' lines are compared with its transformers.
@pytest.mark.parametrize(("shape", "dtype", "tokens"), CASES, ids=lambda v: str(v).replace(" ", "-"))
def test_moe_ffn(
    benchmark: Any, machine: dict[str, Any], layers: Layers, shape: Shape, dtype: str, tokens: int
) -> None:
    benchmark.group = f"{shape} {dtype}"
    layer = layers.get(shape, dtype)
    rounds = 5 if tokens >= 1024 else 15 if tokens >= 32 else 31
    distinct: list[int] = []

    def setup() -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        drawn = layer.draw(tokens)
        distinct.append(int(drawn[1].unique().numel()))
        return drawn, {}

    benchmark.pedantic(layer.ours, setup=setup, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median
    experts = statistics.mean(distinct)
    flops = 4.0 * tokens * shape.top_k * shape.d_model * shape.d_ff
    read = experts * layer.expert_bytes
    floor = max(read / machine["bandwidth"], flops / machine["gemm"])
    peers: dict[str, float] = {}
    draws = [layer.draw(tokens) for _ in range(3 if tokens >= 256 else 7)]
    if dtype == "float32" and shape.top_k == 1:
        peers["transformers"] = measure(layer.transformers(), draws)
    grouped = layer.grouped() if dtype in ("float32", "bfloat16") and tokens <= 1024 else None
    if grouped is not None:
        peers["grouped"] = measure(grouped, draws[:3])
    benchmark.extra_info |= {
        **machine,
        "shape": str(shape),
        "dtype": dtype,
        "tokens": tokens,
        "distinct_experts": experts,
        "ms": seconds * 1e3,
        "gb_per_s": read / seconds / 1e9,
        "gflop_per_s": flops / seconds / 1e9,
        "x_floor": seconds / floor,
        "peer_ms": {name: value * 1e3 for name, value in peers.items()},
        "flops_per_byte": flops / read,
    }
