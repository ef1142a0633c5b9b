"""What a call costs beside its kernel: moe_ffn and moe_layer on experts of 32 x 32, whose arithmetic is nothing.

  python -m bench.kernels.call_cost [--threads 1] [--calls 20000] [--json FILE]

The lowest time, and quantiles, of single calls of sida_ext.ops under no_grad: on a busy machine the low ones are still
of a call that nobody disturbed. All experts are in memory. Runs on any release (PYTHONPATH), to compare two.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

import sida_ext
from sida_ext import ops

EXPERTS, WIDTH = 64, 32


def quantiles(call: Callable[[int], object], calls: int) -> dict[str, float]:
    """Microseconds of single calls."""
    for number in range(EXPERTS):
        call(number)
    times = []
    for number in range(calls):
        begin = time.perf_counter_ns()
        call(number)
        times.append(time.perf_counter_ns() - begin)
    times.sort()
    return {
        name: times[int(share * (calls - 1))] / 1e3 for name, share in (("lowest", 0), ("10 %", 0.1), ("half", 0.5))
    }


def routes(tokens: int) -> list[torch.Tensor]:
    """Expert indices [tokens, 1] of one call after another; each token has an expert of its own."""
    return [
        (torch.arange(tokens, dtype=torch.int32) + first).remainder(EXPERTS).reshape(tokens, 1)
        for first in range(EXPERTS)
    ]


def ffn_call(tokens: int, dtype: str) -> Callable[[int], object]:
    x, gate = torch.randn(tokens, WIDTH).bfloat16(), torch.ones(tokens, 1)
    slots, index = torch.arange(EXPERTS, dtype=torch.int32), routes(tokens)
    if dtype == "int8":
        wi, wo = (torch.randint(-100, 100, (EXPERTS, WIDTH, WIDTH), dtype=torch.int8) for _ in range(2))
        scales = (torch.full((EXPERTS, WIDTH), 1e-3),) * 2
    else:
        wi, wo = (torch.randn(EXPERTS, WIDTH, WIDTH).bfloat16() for _ in range(2))
        scales = (None, None)
    return lambda number: ops.moe_ffn(x, index[number % EXPERTS], gate, wi, wo, slots, *scales, "relu")


def layer_call(model: torch.nn.Module, tokens: int) -> Callable[[int], object]:
    handle = next(module.handle for module in model.modules() if hasattr(module, "handle"))
    x, gate, index = torch.randn(tokens, WIDTH).bfloat16(), torch.ones(tokens, 1), routes(tokens)
    return lambda number: ops.moe_layer(x, index[number % EXPERTS], gate, handle)


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=WIDTH,
        d_kv=8,
        d_ff=WIDTH,
        num_heads=2,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_experts=EXPERTS,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
    )
    SwitchTransformersEncoderModel(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for dtype in ("int8", "bfloat16"):
            found[f"moe_ffn, {dtype}, 1 token"] = quantiles(ffn_call(1, dtype), arguments.calls)
        found["moe_ffn, int8, 32 experts"] = quantiles(ffn_call(32, "int8"), arguments.calls)
        os.environ["SIDA_CACHE"] = str(Path(folder) / "cache")
        save_model(Path(folder) / "model")
        model = sida_ext.from_pretrained(
            Path(folder) / "model",
            model_class=SwitchTransformersEncoderModel,
            expert_memory="100%",
            expert_dtype="int8",
        )
        try:
            for tokens, name in ((1, "1 token"), (32, "32 experts")):
                found[f"moe_layer, int8, {name}"] = quantiles(layer_call(model, tokens), arguments.calls)
        finally:
            model.sida.close()
    for name, row in found.items():
        print(f"{name:28}", "  ".join(f"{quantile} {value:6.1f} us" for quantile, value in row.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "microseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
