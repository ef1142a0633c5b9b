"""One MoE layer on a GPU: decode and prefill shapes, GB/s, TFLOP/s and how far from the floor. ``make bench-gpu``.

The floor is max(bytes that must move / memory bandwidth, FLOPs / bf16 GEMM peak), both measured in this process. Every
call gets fresh routing over weights that are larger than any cache. Skips, with the reason, where there is no CUDA
device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sida_ext import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

D_MODEL, D_FF, EXPERTS = 768, 3072, 128  # Switch-base
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "mxfp4": torch.uint8,
    "float32": torch.float32,
}
CALLS = 40


@dataclass(frozen=True)
class Case:
    phase: str
    tokens: int
    dtype: str  # of the weights; activations are bfloat16 where the weights have fewer bits
    top_k: int = 1

    def __str__(self) -> str:
        return f"{self.phase}-{self.tokens}-{self.dtype}-k{self.top_k}"


CASES = [
    *(Case("decode", tokens, dtype) for dtype in ("bfloat16", "float16", "int8") for tokens in (1, 8, 32)),
    *(Case("prefill", tokens, dtype) for dtype in ("bfloat16", "float16", "int8") for tokens in (512, 4096, 16384)),
    *(Case("decode", tokens, dtype) for dtype in ("int4", "mxfp4") for tokens in (1, 32)),
    *(Case("prefill", tokens, dtype) for dtype in ("int4", "mxfp4") for tokens in (512, 4096)),
    Case("decode", 8, "bfloat16", top_k=2),
    Case("prefill", 4096, "bfloat16", top_k=2),
    Case("decode", 8, "float32"),
    Case("prefill", 4096, "float32"),
]


def seconds_each(call: Callable[[], Any], calls: int) -> float:
    """Median of single calls, by events on the current stream."""
    times = []
    for _ in range(calls):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


@dataclass(frozen=True)
class Device:
    name: str
    bandwidth: float  # bytes/s, read and written
    gemm: float  # FLOP/s, bf16
    gemm_f32: float  # FLOP/s, fp32 without TF32


@pytest.fixture(scope="module")
def device() -> Device:
    """What this device reaches: a copy within its memory, and square products."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = seconds_each(lambda: target.copy_(source), 20)
    peaks = []
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        torch.mm(a, b)
        peaks.append(2 * size**3 / seconds_each(lambda a=a, b=b: torch.mm(a, b), 20))
    return Device(torch.cuda.get_device_name(), 2 * (1 << 30) / copy, *peaks)


class Layer:
    """Weights of one dtype on the device and a source of calls."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        self.x_dtype = torch.bfloat16 if self.dtype.itemsize == 1 else self.dtype
        self.random = torch.Generator().manual_seed(0)
        self.scales: dict[str, Tensor] = {}
        shapes = (EXPERTS, D_FF, D_MODEL), (EXPERTS, D_MODEL, D_FF)
        if self.dtype == torch.int8:
            self.wi, self.wo = (torch.randint(-127, 128, s, dtype=torch.int8, device="cuda") for s in shapes)
            self.scales = {
                "wi_scale": torch.full((EXPERTS, D_FF), 1e-4, device="cuda"),
                "wo_scale": torch.full((EXPERTS, D_MODEL), 1e-4, device="cuda"),
            }
        elif self.dtype == torch.uint8:
            shapes = (EXPERTS, D_FF, D_MODEL // 2), (EXPERTS, D_MODEL, D_FF // 2)
            self.wi, self.wo = (torch.randint(256, s, dtype=torch.uint8, device="cuda") for s in shapes)
            # A factor of 2^-7 for each 32 weights, 16 bytes of them.
            kind, factor = (torch.float16, 2**-7) if case.dtype == "int4" else (torch.uint8, 120)
            self.scales = {
                name: torch.full((*s[:2], s[2] // 16), factor, dtype=kind, device="cuda")
                for name, s in zip(("wi_scale", "wo_scale"), shapes, strict=True)
            }
        else:
            self.wi, self.wo = (torch.randn(s, dtype=self.dtype, device="cuda").mul_(0.02) for s in shapes)
        self.slots = torch.arange(EXPERTS, dtype=torch.int32, device="cuda")

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens, top_k = self.case.tokens, self.case.top_k
        index = torch.randint(EXPERTS, (tokens, top_k), generator=self.random, dtype=torch.int32)
        x = torch.randn(tokens, D_MODEL, device="cuda", dtype=self.x_dtype)
        return x, index.cuda(), torch.rand(tokens, top_k, generator=self.random).cuda()

    def __call__(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        return ops.moe_ffn(x, index, gate, self.wi, self.wo, self.slots, **self.scales)

    def grouped(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """The same layer out of torch's grouped product; bfloat16 alone."""
        order = index.flatten().argsort()
        rows = order // index.shape[1]
        ends = index.flatten().bincount(minlength=EXPERTS).cumsum(0, dtype=torch.int32)
        hidden = F.relu(F.grouped_mm(x[rows], self.wi.transpose(1, 2), offs=ends))
        found = F.grouped_mm(hidden, self.wo.transpose(1, 2), offs=ends) * gate.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, rows, found.to(x.dtype))

    def bytes_of(self, index: Tensor) -> int:
        """Weights and factors of the distinct experts, once, and the activations in and out."""
        stored = (self.wi, self.wo, *self.scales.values())
        experts = int(index.unique().numel()) * sum(tensor.nbytes for tensor in stored) // EXPERTS
        return experts + 2 * self.case.tokens * D_MODEL * torch.finfo(self.x_dtype).bits // 8

    @property
    def flops(self) -> int:
        return 2 * 2 * self.case.tokens * self.case.top_k * D_MODEL * D_FF


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moe_ffn_on_a_gpu(benchmark: Any, device: Device, case: Case) -> None:
    layer = Layer(case)
    calls = CALLS if case.phase == "decode" else CALLS // 4
    inputs = [layer.draw() for _ in range(calls)]
    expected = layer(*inputs[0])

    def each(call: Callable[..., Tensor]) -> float:
        turn = iter(inputs)
        call(*inputs[0])
        torch.cuda.synchronize()
        return seconds_each(lambda: call(*next(turn)), calls)

    seconds = each(layer)
    grouped = None
    if case.dtype == "bfloat16":
        torch.testing.assert_close(layer.grouped(*inputs[0]), expected, rtol=0.05, atol=0.05)
        grouped = each(layer.grouped)

    def whole() -> None:  # with the launches' cost on the host
        layer(*inputs[0])
        torch.cuda.synchronize()

    benchmark.pedantic(whole, rounds=calls, warmup_rounds=3)
    moved = statistics.median(layer.bytes_of(index) for _, index, _ in inputs)
    peak = device.gemm_f32 if layer.x_dtype == torch.float32 else device.gemm
    floor = max(moved / device.bandwidth, layer.flops / peak)
    figures = {
        "device": device.name,
        "bandwidth": device.bandwidth,
        "gemm": peak,
        "case": str(case),
        "ms": seconds * 1e3,
        "gb_per_s": moved / seconds / 1e9,
        "tflop_per_s": layer.flops / seconds / 1e12,
        "x_floor": seconds / floor,
        "grouped_ms": None if grouped is None else grouped * 1e3,
    }
    benchmark.extra_info.update(figures)
    print(
        f"\n{case!s:26} {figures['ms']:9.4f} ms {figures['gb_per_s']:7.0f} GB/s {figures['tflop_per_s']:7.1f} TFLOP/s "
        f"{figures['x_floor']:6.2f} x floor, torch's grouped product "
        f"{'-' if grouped is None else f'{grouped * 1e3:.4f} ms'} "
        f"({device.name}: {device.bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.0f} TFLOP/s)"
    )
