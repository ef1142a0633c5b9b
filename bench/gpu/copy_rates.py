"""Bytes/s from host memory into a GPU's, pinned and pageable: ``python -m bench.gpu.copy_rates [--json FILE]``.

Sizes are an int8 and a bfloat16 expert of Switch-base, and what is large enough to hide every latency. Every copy reads
another place of a buffer that no cache holds. Without a GPU the same copies go to another place in host memory, which
says that the script runs and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

SIZES = {"int8 expert": 2 * 768 * 3072, "bfloat16 expert": 4 * 768 * 3072, "large": 256 << 20}


def rate(source: torch.Tensor, target: torch.Tensor, size: int, rounds: int) -> float:
    """Median bytes/s of single copies of `size` bytes."""
    is_gpu = target.device.type == "cuda"
    places = max(1, source.numel() // size)
    seconds = []
    for number in range(rounds + 2):
        begin = number % places * size
        if is_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        target[:size].copy_(source[begin : begin + size], non_blocking=True)
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds[2:])


def measure(device: str, buffer_bytes: int, rounds: int) -> dict[str, dict[str, float]]:
    """Kind of host memory -> size's name -> bytes/s."""
    found: dict[str, dict[str, float]] = {}
    target = torch.empty(buffer_bytes // 2, dtype=torch.uint8, device=device)
    for kind in ("pinned", "pageable") if device != "cpu" else ("pageable",):
        source = torch.ones(buffer_bytes, dtype=torch.uint8, pin_memory=kind == "pinned")
        found[kind] = {
            name: rate(source, target, size, rounds) for name, size in SIZES.items() if size <= target.numel()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--buffer", type=int, default=1 << 30, help="bytes of host memory to copy from")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.device, arguments.buffer, arguments.rounds)
    for kind, rates in found.items():
        print(f"{kind}: " + ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in rates.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
