"""One MoE layer beside transformers, torch's grouped products and the floor; run it with ``python -m bench``.

The floor is max(bytes of the distinct experts / read bandwidth, floating-point operations / fp32 GEMM peak). What a
shared machine gives of either changes within seconds (bandwidth by a factor of 1.7 where this was written), so both
are measured before and after each call (each few milliseconds of short calls): the bandwidth by streaming memory that
is in no cache with all threads, the larger of both; the peak with torch's own ``mm`` where arithmetic may bound the
case, the best that was seen. Beside them stands the rate of fused multiply-adds in registers for the instruction set in
force, which no GEMM can pass.

Every call gets fresh tokens and fresh uniform routing (or Zipf's, in the skewed groups). A round during which the
system took a core away from this process (an involuntary context switch) is not counted, unless that happened in more
than half of the rounds; ``undisturbed`` says how many were counted that were not disturbed.
"""

from __future__ import annotations

import functools
import itertools
import resource
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
        """transformers' experts over the same memory, in the weights' dtype."""
        s = self.shape
        config = SwitchTransformersConfig(d_model=s.d_model, d_ff=s.d_ff, num_experts=s.experts, dropout_rate=0.0)
        with torch.device("meta"):
            experts = SwitchTransformersExperts(config).eval()
        for e in range(s.experts):
            experts[f"expert_{e}"].wi.weight = torch.nn.Parameter(self.wi[e], requires_grad=False)
            experts[f"expert_{e}"].wo.weight = torch.nn.Parameter(self.wo[e], requires_grad=False)

        def call(x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
            result: Tensor = experts(x.to(self.dtype), F.one_hot(index, s.experts), gate.to(self.dtype))
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


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


GEMM_SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048))  # an expert's two and a square one


class Rates:
    """What the machine gives at this moment: bytes a second of reading memory, FLOP/s of torch's float32 ``mm``."""

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        self._stream = torch.ones(1 << 28)  # 1 GiB: more than any cache holds
        self._windows = itertools.cycle(self._stream.split(1 << 24))  # 64 MiB: what was read last time is 1 GiB ago
        self._products = [
            (2.0 * rows * inner * columns, torch.randn(rows, inner), torch.randn(inner, columns))
            for rows, inner, columns in GEMM_SHAPES
        ]
        rates = [max(self._gemm(number) for _ in range(4)) for number in range(len(GEMM_SHAPES))]
        self._best = rates.index(max(rates))
        self.gemm_at_start = max(rates)
        self.multiply_add = _C.measure_multiply_add_rate(THREADS)

    def _gemm(self, number: int) -> float:
        flops, a, b = self._products[number]
        return flops / seconds_of(functools.partial(torch.mm, a, b))

    def bandwidth(self) -> float:
        # The best of three: the first one may find the pool's threads asleep.
        return max(window.numel() * 4 / seconds_of(window.sum) for window in itertools.islice(self._windows, 3))

    def gemm(self) -> float:
        return self._gemm(self._best)


@pytest.fixture(scope="session")
def rates() -> Rates:
    return Rates()


def switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def undisturbed(values: list[float], disturbed: list[bool]) -> list[float]:
    """The values of the undisturbed rounds, or all where those are less than half."""
    clean = [value for value, was in zip(values, disturbed, strict=True) if not was]
    return clean if 2 * len(clean) >= len(values) else values


def measure(call: Callable[..., Tensor], draws: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Median seconds over the undisturbed draws; the first one only warms up."""
    times, disturbed = [], []
    for arguments in draws:
        before, start = switches(), time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)
        disturbed.append(switches() > before)
    return statistics.median(undisturbed(times[1:], disturbed[1:]))


SWITCH_BASE = Shape()
COUNTS = (1, 8, 32, 64, 256, 1024, 4096)
CURVE = (1, 32, 256, 1024)
CASES = [
    *((SWITCH_BASE, dtype, t) for dtype in ("float32", "bfloat16", "int8", "float16") for t in COUNTS),
    *((Shape(1024, 4096), dtype, t) for dtype in ("float32", "bfloat16", "int8") for t in CURVE),
    *((Shape(experts=8), dtype, t) for dtype in ("float32", "bfloat16", "int8") for t in CURVE),
    *((Shape(experts=32), "bfloat16", t) for t in (32,)),
    *((Shape(experts=256), dtype, t) for dtype in ("bfloat16", "int8") for t in CURVE),
    *((Shape(skewed=True), dtype, t) for dtype in ("bfloat16", "int8") for t in CURVE),
    *((Shape(top_k=2), dtype, t) for dtype in ("bfloat16", "int8") for t in CURVE),
]
ROUNDS = {1: 301, 8: 61, 32: 31, 64: 21, 256: 13, 1024: 9, 4096: 5}
BLOCK = {1: 10, 8: 10, 32: 4, 64: 3, 256: 1, 1024: 1, 4096: 1}  # calls between two looks at the machine


# Float32 first: the lines of the same shape in other dtypes are compared with its transformers, too.
@pytest.mark.parametrize(("shape", "dtype", "tokens"), CASES, ids=lambda v: str(v).replace(" ", "-"))
def test_moe_ffn(benchmark: Any, rates: Rates, layers: Layers, shape: Shape, dtype: str, tokens: int) -> None:
    benchmark.group = f"{shape} {dtype}"
    layer = layers.get(shape, dtype)
    flops = 4.0 * tokens * shape.top_k * shape.d_model * shape.d_ff
    # A product is only timed where the GEMM's peak may be the floor (of bytes at the most that memory gave anywhere).
    by_bytes = min(tokens, shape.experts) * layer.expert_bytes / 65e9
    may_be_arithmetic = flops / rates.gemm_at_start > 0.8 * by_bytes
    distinct: list[int] = []
    disturbed: list[bool] = []
    found: list[float] = []  # bytes a second, before each block of calls
    gemm = [rates.gemm_at_start]

    def look() -> None:
        # The product first: memory that was idle for milliseconds is slower than one that streams, for both.
        if may_be_arithmetic:
            gemm.append(rates.gemm())
        found.append(rates.bandwidth())

    def setup() -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        if len(disturbed) % BLOCK[tokens] == 0:
            look()
            if BLOCK[tokens] > 1:  # the stream has swept the caches of all else, too: a short call would be of that
                layer.ours(*layer.draw(tokens))
        drawn = layer.draw(tokens)
        distinct.append(int(drawn[1].unique().numel()))
        return drawn, {}

    def call(x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        before = switches()
        out = layer.ours(x, index, gate)
        disturbed.append(switches() > before)
        return out

    rounds = ROUNDS[tokens]
    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return
    look()
    both = [max(pair) for pair in itertools.pairwise(found)]
    bandwidth = [both[number // BLOCK[tokens]] for number in range(len(disturbed))][-rounds:]
    seconds = list(benchmark.stats.stats.data)
    read = [experts * layer.expert_bytes for experts in distinct[-rounds:]]
    floors = [max(r / b, flops / max(gemm)) for r, b in zip(read, bandwidth, strict=True)]
    ratios = [s / f for s, f in zip(seconds, floors, strict=True)]
    speeds = [r / s for r, s in zip(read, seconds, strict=True)]
    flags = disturbed[-rounds:]
    median = statistics.median(undisturbed(seconds, flags))
    peers: dict[str, float] = {}
    draws = [layer.draw(tokens) for _ in range(3 if tokens >= 1024 else 4)]
    if dtype in ("float32", "bfloat16") and shape.top_k == 1:
        peers["transformers"] = measure(layer.transformers(), draws)
    grouped = layer.grouped() if dtype in ("float32", "bfloat16") and tokens <= 1024 else None
    if grouped is not None:
        peers["grouped"] = measure(grouped, draws)
    benchmark.extra_info |= {
        "instruction_set": _C.instruction_set(),
        "threads": THREADS,
        "bandwidth": statistics.median(bandwidth),
        "bandwidth_range": [min(bandwidth), max(bandwidth)],
        "gemm": max(gemm),
        "multiply_add": rates.multiply_add,
        "shape": str(shape),
        "dtype": dtype,
        "tokens": tokens,
        "distinct_experts": statistics.mean(distinct[-rounds:]),
        "ms": median * 1e3,
        "gb_per_s": statistics.median(undisturbed(speeds, flags)) / 1e9,
        "gflop_per_s": flops / median / 1e9,
        "x_floor": statistics.median(undisturbed(ratios, flags)),
        "rounds": rounds,
        "undisturbed": rounds - sum(flags),
        "peer_ms": {name: value * 1e3 for name, value in peers.items()},
        "flops_per_byte": flops / statistics.mean(read),
    }
