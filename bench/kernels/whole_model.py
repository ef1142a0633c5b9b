"""A whole encoder with every expert in memory, beside transformers' own, in one process.

``python -m bench.kernels.whole_model`` builds one random encoder of Switch-base shapes, serves it with transformers in
float32 and with sida_ext (expert memory 100 %), turn and turn about, each forward with fresh tokens, and prints a
table: medians, the time inside the MoE layers, and the floor of their experts: the larger of the bytes of the distinct
ones over the measured read rate and of the FLOPs over the measured fp32 GEMM rate.

Both models of base-128 do not fit in 24 GiB together: ``--layers 6`` (half of the blocks, every second one sparse as in
base-128) is the default. The time per block is that of the whole model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

import sida_ext
from sida_ext import _C
from sida_ext.models.families import moe_layers

LENGTH, D_MODEL, D_FF = 32, 768, 3072
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def build(experts: int, layers: int) -> SwitchTransformersEncoderModel:
    """Switch-base shapes with random weights, float32."""
    config = SwitchTransformersConfig(
        d_model=D_MODEL,
        d_ff=D_FF,
        d_kv=64,
        num_heads=12,
        num_layers=layers,
        num_sparse_encoder_layers=layers // 2,
        num_experts=experts,
        expert_capacity=64,
        vocab_size=32128,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    with torch.device("meta"):
        model = SwitchTransformersEncoderModel(config)
    random = torch.Generator().manual_seed(0)
    state = {}
    for name, weight in model.state_dict().items():
        if weight.dim() < 2:
            state[name] = torch.ones(weight.shape)
        else:
            # Uniform: the normal distribution of a model of this size takes minutes.
            scale = 1.0 if "embed" in name or "shared" in name or "bias" in name else 3**0.5 * weight.shape[-1] ** -0.5
            state[name] = torch.empty(weight.shape).uniform_(-scale, scale, generator=random)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    return model.eval()


def with_shared_weights(model: SwitchTransformersEncoderModel) -> SwitchTransformersEncoderModel:
    with torch.device("meta"):
        twin = SwitchTransformersEncoderModel(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


class InMoe:
    """Seconds inside a model's MoE layers (router, dispatch and experts) and the distinct experts of each forward."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds, self.experts = 0.0, 0
        for layer in moe_layers(model).values():
            layer.register_forward_pre_hook(self.begin)
            layer.register_forward_hook(self.end)
            layer.router.register_forward_hook(self.routed)

    def begin(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def routed(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        chosen = output[0]
        if chosen.dim() == 2:  # indices, -1: none
            self.experts += int(torch.unique(chosen[chosen >= 0]).numel())

    def take(self) -> tuple[float, int]:
        taken = self.seconds, self.experts
        self.seconds, self.experts = 0.0, 0
        return taken


def timed(model: nn.Module, watch: InMoe, ids: torch.Tensor) -> tuple[float, float, int, torch.Tensor]:
    watch.take()
    start = time.perf_counter()
    with torch.inference_mode():
        hidden = model(input_ids=ids).last_hidden_state
    return time.perf_counter() - start, *watch.take(), hidden


def gemm_rate() -> float:
    """FLOP/s of torch's fp32 GEMM on large square matrices, best of a few."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 1536**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"], choices=sorted(BYTES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth, gemm = _C.measure_memory_bandwidth(threads=arguments.threads), gemm_rate()
    print(
        f"{_C.instruction_set()}, {arguments.threads} threads, {bandwidth / 1e9:.1f} GB/s read, "
        f"{gemm / 1e9:.0f} GFLOP/s fp32 GEMM, transformers {transformers.__version__}, torch {torch.__version__}; "
        f"{arguments.experts} experts, {arguments.layers} blocks"
    )
    reference = build(arguments.experts, arguments.layers)
    reference_watch = InMoe(reference)
    results = []
    columns = ("experts in", "batch", "transformers fp32, ms (in MoE)", "ours, ms (in MoE)", "ratio", "MoE floor, ms")
    print("| " + " | ".join((*columns, "largest difference")) + " |\n" + "|---" * 7 + "|")
    for dtype in arguments.dtypes:
        ours = sida_ext.swap_experts(with_shared_weights(reference), expert_memory="100%", expert_dtype=dtype)
        watch = InMoe(ours)
        with torch.inference_mode():  # brings every expert in
            warm = torch.Generator().manual_seed(1)
            for _ in range(50):
                ours.sida.reset_stats()
                ours(input_ids=torch.randint(2, 32000, (64, LENGTH), generator=warm))
                if ours.sida.stats().bytes_read == 0:
                    break
        for batch in arguments.batches:
            random = torch.Generator().manual_seed(batch)
            pairs, difference = [], 0.0
            for _ in range(arguments.runs + 1):
                ids = torch.randint(2, 32000, (batch, LENGTH), generator=random)
                theirs = timed(reference, reference_watch, ids)
                mine = timed(ours, watch, ids)
                difference = max(difference, (theirs[3] - mine[3]).abs().max().item())
                pairs.append((theirs[:3], mine[:3]))
            pairs = pairs[1:]  # the first one warms up
            their_ms, our_ms = (median(p[i][0] for p in pairs) * 1e3 for i in (0, 1))
            their_moe, our_moe = (median(p[i][1] for p in pairs) * 1e3 for i in (0, 1))
            experts = median(p[1][2] for p in pairs)
            expert_bytes = 2 * D_MODEL * D_FF * BYTES[dtype]
            tokens = batch * LENGTH * (arguments.layers // 2)
            floor = max(experts * expert_bytes / bandwidth, tokens * 4 * D_MODEL * D_FF / gemm) * 1e3
            results.append(
                {
                    "experts": arguments.experts,
                    "dtype": dtype,
                    "batch": batch,
                    "transformers_ms": their_ms,
                    "transformers_moe_ms": their_moe,
                    "ours_ms": our_ms,
                    "ours_moe_ms": our_moe,
                    "ratio": their_ms / our_ms,
                    "moe_floor_ms": floor,
                    "distinct_experts": experts,
                    "difference": difference,
                    "bandwidth": bandwidth,
                    "gemm": gemm,
                }
            )
            print(
                f"| {dtype} | {batch} x {LENGTH} | {their_ms:.0f} ({their_moe:.0f}) | {our_ms:.0f} ({our_moe:.0f}) | "
                f"{their_ms / our_ms:.2f}x | {floor:.0f} | {difference:.1e} |",
                flush=True,
            )
        ours.sida.close()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
