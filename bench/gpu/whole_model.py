"""A whole encoder of Switch-base-128's shapes on a GPU at several budgets, beside what else serves it.

    python -m bench.gpu.whole_model --checkpoint FOLDER [--json FILE]

One sentence of 32 tokens at a time, as in SiDA-MoE's figures 9 to 11 (MLSys 2024): tokens/s, seconds of a sentence and
GPU memory, for

- sida_ext with 10, 25, 50 and 100 % of the experts' bytes in GPU memory, without a predictor and with one that is
  always right (routing recorded beforehand: what prediction can give at most);
- transformers with every expert on the GPU;
- accelerate's CPU offload of the whole model.

Weights are random (``bench.engine.checkpoint``), so routing spreads widely; words follow Zipf's law over 20,000 types.
Everything is bfloat16. A trace of torch's profiler says in how much of the time in which experts were copied the GPU
computed as well. A row that fails is in the table with its error, and the others go on. ``--device cpu`` runs the same
without a GPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import SwitchTransformersEncoderModel

import sida_ext
from bench.gpu.intervals import common, length
from bench.gpu.report import whole_model_table
from sida_ext.models.families import moe_layers

LENGTH, TYPES, LOOKAHEAD = 32, 20_000, 4
PROFILED = 20  # sentences under the profiler, which slows them: no time is taken from these

Batch = dict[str, torch.Tensor]


def sentences(count: int, seed: int, device: str) -> list[Batch]:
    """Random sentences, a batch each; every one of a seed is the same everywhere."""
    random = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, TYPES + 1, dtype=torch.float64)
    drawn = torch.multinomial(weights, count * LENGTH, replacement=True, generator=random).view(count, 1, LENGTH)
    return [{"input_ids": (ids + 100).to(device)} for ids in drawn]


class Known:
    """A predictor that is always right: the routing of sentences that it was shown."""

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self._tables: dict[tuple[int, ...], Any] = {}
        routed: list[Any] = []
        hooks = [
            layer.router.register_forward_hook(lambda _, args, output: routed.append(output[:2]))
            for layer in moe_layers(model).values()
        ]
        with torch.inference_mode():
            for batch in batches:
                routed.clear()
                model(**batch)
                index = torch.stack([pair[0].cpu() for pair in routed], dim=2).unsqueeze(-1).clone()
                gate = torch.stack([pair[1].float().cpu() for pair in routed], dim=2).unsqueeze(-1).clone()
                gate[index < 0] = 0  # over capacity: no expert is wanted
                self._tables[self._key(batch["input_ids"])] = sida_ext.HashTable(index, gate)
        for hook in hooks:
            hook.remove()

    @staticmethod
    def _key(input_ids: torch.Tensor) -> tuple[int, ...]:
        return tuple(input_ids.flatten().tolist())

    def predict(self, input_ids: torch.Tensor, attention_mask: Any = None, top_k: int = 1) -> Any:
        return self._tables[self._key(input_ids)]


def used_memory(device: str) -> int:
    """Bytes of the GPU that anybody uses; 0 where there is none."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(run: Callable[[list[Batch]], Any], warm: list[Batch], batches: list[Batch], device: str) -> dict[str, float]:
    """`run` yields an output for each batch."""
    for _ in run(warm):
        pass
    synchronize(device)
    marks = [time.perf_counter()]
    for _ in run(batches):
        synchronize(device)
        marks.append(time.perf_counter())
    each = [after - before for before, after in itertools.pairwise(marks)]
    return {
        "tokens_per_s": len(batches) * LENGTH / (marks[-1] - marks[0]),
        "median_s": statistics.median(each),
        "p95_s": sorted(each)[int(0.95 * (len(each) - 1))],
    }


def overlap(run: Callable[[list[Batch]], Any], batches: list[Batch]) -> dict[str, float]:
    """Seconds in which bytes came to the GPU, and the share of them in which a kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in run(batches):
            pass
        torch.cuda.synchronize()
    copies, kernels = [], []
    for event in profiled.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        interval = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        if event.name.startswith("Memcpy HtoD"):
            copies.append(interval)
        elif not event.name.startswith(("Memcpy", "Memset")):
            kernels.append(interval)
    copied = length(copies)
    return {
        "copy_s": copied,
        "kernel_s": length(kernels),
        "copies_beside_kernels": common(copies, kernels) / copied if copied else 0.0,
    }


def ours(arguments: argparse.Namespace, share: int, known: bool) -> dict[str, Any]:
    device = arguments.device
    before = used_memory(device)
    model = sida_ext.from_pretrained(
        arguments.checkpoint, device=device, expert_memory=f"{share}%", dtype=torch.bfloat16, store=arguments.store
    )
    try:
        warm, batches = (sentences(arguments.sentences, seed, device) for seed in (1, 2))
        predictor = Known(model, warm + batches) if known else None

        def run(given: list[Batch]) -> Any:
            return sida_ext.stream(model, given, predictor, LOOKAHEAD)

        for _ in run(warm):
            pass
        model.sida.reset_stats()
        found: dict[str, Any] = timed(run, warm[:5], batches, device)
        stats = model.sida.stats()
        found |= {
            "gpu_bytes": used_memory(device) - before,
            "expert_memory": model.sida.expert_memory,
            "hit_rate": stats.hit_rate,
            "stall_s_each": stats.stall_seconds / (len(batches) + 5),
        }
        if device != "cpu":
            found |= overlap(run, batches[:PROFILED])
        return found
    finally:
        model.sida.close()


def plain(arguments: argparse.Namespace, offload: bool) -> dict[str, Any]:
    """transformers' own model: all of it on the device, or its weights brought there by accelerate when used."""
    device = arguments.device
    before = used_memory(device)
    model = SwitchTransformersEncoderModel.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16).eval()
    if offload:
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=torch.device(device))
    else:
        model.to(device)
    count = 3 if offload else arguments.sentences
    warm, batches = sentences(count, 1, device)[: 1 if offload else count], sentences(count, 2, device)

    @torch.inference_mode()
    def one(batch: Batch) -> Any:
        return model(**batch)

    found: dict[str, Any] = timed(lambda given: map(one, given), warm, batches, device)
    return found | {"gpu_bytes": used_memory(device) - before}


def ways(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """In the order of what is wanted most, should time run out."""
    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for share in arguments.budgets:
        for known in (True, False):
            name = f"sida_ext, {share} %, " + ("predicted" if known else "no predictor")
            rows[name] = lambda share=share, known=known: ours(arguments, share, known)
    rows["transformers, all on the GPU"] = lambda: plain(arguments, offload=False)
    rows["accelerate, CPU offload"] = lambda: plain(arguments, offload=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="made by python -m bench.engine.checkpoint")
    parser.add_argument("--store", type=Path, help="made here if it is not there; default: beside the checkpoint")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further row after this time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    arguments.store = arguments.store or arguments.checkpoint / "experts.sida"
    if not arguments.store.exists():
        sida_ext.pack(arguments.checkpoint, arguments.store, "bfloat16")
    results: dict[str, dict[str, Any]] = {}
    for name, row in ways(arguments).items():
        if time.perf_counter() - begin > arguments.seconds:
            results[name] = {"error": f"not begun within {arguments.seconds:.0f} s"}
        else:
            try:
                results[name] = row()
            except Exception as error:  # of any of the systems: the table says so, the others go on
                results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        gc.collect()
        if arguments.device != "cpu":
            torch.cuda.empty_cache()
        print(name, results[name], flush=True)
        if arguments.json is not None:  # also of a run that is cut off
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(whole_model_table(results))


if __name__ == "__main__":
    main()
