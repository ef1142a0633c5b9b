"""Does the time of a layer grow with the bytes of its distinct experts and with nothing else?

``python -m bench.kernels.bytes_needed`` routes the same 32 tokens over 8, 32, 128 and 256 experts, turn and turn about
with fresh tokens and routing, and prints the time for each byte of the distinct experts beside that of 128 experts.
All of them use the same 256 slots (each call maps its experts to other slots), so that no case finds its weights in a
cache because it has few of them. Where the floor of a case is its arithmetic, not its bytes, the line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as the engine's slots have; read when torch is loaded

import torch

from bench.kernels.bench_moe_ffn import DTYPES, THREADS, Layer, Rates, Shape, switches, undisturbed
from sida_ext import _C, ops

TOKENS = 32
EXPERTS = (8, 32, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"], choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    rates = Rates()
    gemm = rates.gemm_at_start
    print(
        f"{_C.instruction_set()}, {THREADS} threads, {TOKENS} tokens; {gemm / 1e9:.0f} GFLOP/s torch.mm float32, "
        "memory's rate measured before each call\n"
        f"{'weights':9} {'experts':>7} {'distinct':>8} {'ms':>8} {'GB/s':>6} {'ps/byte':>8} {'of 128':>7} "
        f"{'x floor':>8}  bound by"
    )
    results = []
    for dtype in arguments.dtypes:
        layer = Layer(Shape(experts=max(EXPERTS)), DTYPES[dtype])
        s = layer.shape
        flops = 4.0 * TOKENS * s.d_model * s.d_ff
        per_byte: dict[int, list[float]] = {e: [] for e in EXPERTS}
        seconds: dict[int, list[float]] = {e: [] for e in EXPERTS}
        distinct: dict[int, list[int]] = {e: [] for e in EXPERTS}
        disturbed: dict[int, list[bool]] = {e: [] for e in EXPERTS}
        bandwidths: dict[int, list[float]] = {e: [] for e in EXPERTS}
        for turn in range(arguments.rounds + 1):
            for experts in EXPERTS:
                slots = torch.randperm(s.experts, generator=layer.random)[:experts].int()
                index = torch.randint(experts, (TOKENS, 1), generator=layer.random)
                x, gate = torch.randn(TOKENS, s.d_model, generator=layer.random), torch.ones(TOKENS, 1)
                bandwidth = rates.bandwidth()
                before, start = switches(), time.perf_counter()
                ops.moe_ffn(x, index, gate, layer.wi, layer.wo, slots, **layer.scales)
                took = time.perf_counter() - start
                if turn == 0:
                    continue  # warms up
                count = int(index.unique().numel())
                distinct[experts].append(count)
                seconds[experts].append(took)
                per_byte[experts].append(took / (count * layer.expert_bytes))
                bandwidths[experts].append(bandwidth)
                disturbed[experts].append(switches() > before)
        rate = {e: statistics.median(undisturbed(per_byte[e], disturbed[e])) for e in EXPERTS}
        for experts in EXPERTS:
            bytes_read = statistics.mean(distinct[experts]) * layer.expert_bytes
            bandwidth = statistics.median(bandwidths[experts])
            by_bytes, by_flops = bytes_read / bandwidth, flops / gemm
            took = statistics.median(undisturbed(seconds[experts], disturbed[experts]))
            line = {
                "dtype": dtype,
                "experts": experts,
                "distinct": statistics.mean(distinct[experts]),
                "ms": took * 1e3,
                "ps_per_byte": rate[experts] * 1e12,
                "of_128": rate[experts] / rate[128],
                "x_floor": took / max(by_bytes, by_flops),
                "floor_is": "bytes" if by_bytes >= by_flops else "arithmetic",
                "instruction_set": _C.instruction_set(),
                "bandwidth": bandwidth,
                "gemm": gemm,
            }
            results.append(line)
            print(
                f"{dtype:9} {experts:7d} {line['distinct']:8.1f} {line['ms']:8.3f} {bytes_read / took / 1e9:6.1f} "
                f"{line['ps_per_byte']:8.2f} {line['of_128']:7.2f} {line['x_floor']:8.2f}  {line['floor_is']}",
                flush=True,
            )
        del layer
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
