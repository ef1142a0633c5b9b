"""int4 and mxfp4 beside int8 and bfloat16: one gated MoE layer, and what a call costs.

Run it with ``python -m bench.kernels.four_bits``. For each number of tokens the types take turns, each call with fresh
tokens and fresh uniform routing. Printed are the least and the median time, the median over the floor of bytes (those
of the distinct experts at the read bandwidth, which is measured before and after) and over int8's median, and the rate
of floating-point operations of the median (two for each weight and token) over what fp32 multiply-adds in registers
reach in the set in force. Other work on the machine shows in medians first. Switch-base: ``--plain --d-model 768
--d-ff 3072 --top-k 1``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import sida_ext
from sida_ext import _C, ops

TOKENS = (1, 8, 32, 64, 256, 1024)
TYPES = ("bfloat16", "int8", "int4", "mxfp4")


def weights(dtype: str, experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Random weights and their scales, small enough for every sum to stay finite."""
    if dtype == "bfloat16":
        return torch.randn(experts, rows, columns, dtype=torch.bfloat16) * columns**-0.5, None
    if dtype == "int8":
        values = torch.randint(-127, 128, (experts, rows, columns), dtype=torch.int8)
        return values, torch.full((experts, rows), columns**-0.5 / 70)
    values = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8)
    if dtype == "int4":
        return values, torch.full((experts, rows, columns // 32), columns**-0.5 / 5, dtype=torch.float16)
    return values, torch.full((experts, rows, columns // 32), 120, dtype=torch.uint8)


class Layer:
    def __init__(self, dtype: str, experts: int, d_model: int, d_ff: int, gated: bool) -> None:
        self.wi, self.wi_scale = weights(dtype, experts, d_ff * (2 if gated else 1), d_model)
        self.wo, self.wo_scale = weights(dtype, experts, d_model, d_ff)
        self.slots = torch.arange(experts, dtype=torch.int32)
        self.activation = "gated-silu" if gated else "relu"
        parts = (self.wi, self.wo, self.wi_scale, self.wo_scale)
        self.expert_operations = 2 * (3 if gated else 2) * d_model * d_ff
        self.expert_bytes = sum(part[0].numel() * part.element_size() for part in parts if part is not None)

    def __call__(self, x: Tensor, index: Tensor, gate: Tensor) -> float:
        begin = time.perf_counter()
        ops.moe_ffn(
            x, index, gate, self.wi, self.wo, self.slots, self.wi_scale, self.wo_scale, activation=self.activation
        )
        return time.perf_counter() - begin


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    index = torch.rand(tokens, experts).topk(top_k, dim=1).indices.int()
    return index, torch.full((tokens, top_k), 1.0 / top_k)


def fixed_cost(repeats: int = 400) -> tuple[float, float]:
    """Seconds of a call of moe_ffn whose arithmetic is nothing: one token, 8 of 8 experts of 32 x 32. And what would be
    left of them with no expert, going on from 8 over 4.
    """
    layer, x = Layer("int4", 8, 32, 32, True), torch.randn(1, 32)
    routes = {experts: routing(1, 8, experts) for experts in (8, 4)}
    taken: dict[int, list[float]] = {experts: [] for experts in routes}
    for _ in range(repeats):
        for experts, (index, gate) in routes.items():
            taken[experts].append(layer(x, index, gate))
    eight, four = (statistics.median(taken[experts]) for experts in (8, 4))
    return eight, 2 * four - eight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--d-ff", type=int, default=768)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="experts without a gate")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--precision", nargs="+", default=sida_ext.precisions(), choices=("exact", "fast"))
    parser.add_argument("--seconds", type=float, default=1.5, help="for each number of tokens and precision")
    options = parser.parse_args()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    layers = {
        dtype: Layer(dtype, options.experts, options.d_model, options.d_ff, not options.plain)
        for dtype in options.types
    }
    nothing, no_expert = fixed_cost()
    print(
        f"{_C.instruction_set()}, {threads} threads; a call of nothing: {nothing * 1e6:.1f} us, "
        f"{no_expert * 1e6:.1f} without its eight experts"
    )
    print("| tokens | precision | weights | least ms | median ms | x bytes | x int8 | x fp32 rate |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in options.tokens:
        for precision in options.precision:
            sida_ext.set_precision(precision)
            rates = [_C.measure_memory_bandwidth(threads, 1 << 28)]
            fp32_rate = _C.measure_multiply_add_rate(threads)
            taken: dict[str, list[float]] = {dtype: [] for dtype in layers}
            distinct: list[int] = []
            until = time.perf_counter() + options.seconds
            while time.perf_counter() < until or len(distinct) < 3:
                x = torch.randn(tokens, options.d_model)
                index, gate = routing(tokens, options.experts, options.top_k)
                distinct.append(int(index.unique().numel()))
                for dtype, layer in layers.items():
                    taken[dtype].append(layer(x, index, gate))
            rates.append(_C.measure_memory_bandwidth(threads, 1 << 28))
            for dtype, layer in layers.items():
                median = statistics.median(taken[dtype])
                floor = statistics.mean(distinct) * layer.expert_bytes / max(rates)
                to_int8 = f"{median / statistics.median(taken['int8']):.2f}" if "int8" in taken else ""
                operations = tokens * options.top_k * layer.expert_operations
                print(
                    f"| {tokens} | {precision} | {dtype} | {min(taken[dtype]) * 1e3:.3f} | {median * 1e3:.3f} | "
                    f"{median / floor:.2f} | {to_int8} | {operations / median / fp32_rate:.2f} |",
                    flush=True,
                )
    sida_ext.set_precision("exact")


if __name__ == "__main__":
    main()
