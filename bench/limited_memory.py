"""A model larger than memory: the encoder of a checkpoint under a control group's memory limit.

``python -m bench.limited_memory CHECKPOINT --limit 3`` runs each way in a process of its own, cold (page cache
dropped), one after the other, and prints a table: first forwards from the cold start, then forwards after a warm-up.
The limit needs root and a memory control group (v1 or v2); ``--limit 0`` runs without.

  mmap         transformers, experts memory-mapped from safetensors: the page cache is the expert cache
  accelerate   transformers, experts offloaded to disk by accelerate
  ours         sida_ext, experts read on demand
  oracle       sida_ext, hash tables that know the true routing, four batches ahead

``--reuse 40`` draws the sentences from that many. Our ways also tell what bounds them: the time of a forward
less its waits, the disk's rate, measured in the same process after the runs, and, where the routing is
known, what Belady's optimal replacement would have read over the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WAYS = ("mmap", "accelerate", "ours", "oracle")
LENGTH = 32


class MemoryGroup:
    """A control group with a memory limit that this process enters; works with v1 and v2."""

    def __init__(self, limit: int) -> None:
        root = Path("/sys/fs/cgroup")
        if (root / "memory").is_dir():
            self.folder, self.limit_name, self.peak_name = root / "memory/sida_bench", "memory.limit_in_bytes", ""
            self.peak_name = "memory.max_usage_in_bytes"
        else:
            self.folder, self.limit_name, self.peak_name = root / "sida_bench", "memory.max", "memory.peak"
        self.folder.mkdir(exist_ok=True)
        (self.folder / self.limit_name).write_text(str(limit))
        if self.peak_name == "memory.max_usage_in_bytes":
            (self.folder / self.peak_name).write_text("0")
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        return int((self.folder / self.peak_name).read_text())


def batches(count: int, batch: int, seed: int, reuse: int = 0) -> Iterator[dict[str, Any]]:
    """Random sentences; with `reuse`, each drawn from that many."""
    import torch

    random = torch.Generator().manual_seed(seed)
    known = torch.randint(2, 32000, (reuse, LENGTH), generator=random)
    for _ in range(count):
        if reuse:
            yield {"input_ids": known[torch.randint(reuse, (batch,), generator=random)]}
        else:
            yield {"input_ids": torch.randint(2, 32000, (batch, LENGTH), generator=random)}


def load_mmap(checkpoint: Path) -> Any:
    import torch
    from safetensors import safe_open
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    with torch.device("meta"):
        model = SwitchTransformersEncoderModel(SwitchTransformersConfig.from_pretrained(checkpoint))
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(checkpoint / name, "pt") for name in sorted(set(weight_map.values()))}
    state = {}
    for key, name in weight_map.items():
        tensor = files[name].get_tensor(key)
        state[key] = tensor if ".experts." in key else tensor.float()
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    for key, module in model.named_modules():
        if ".experts." in key and key.endswith((".wi", ".wo")):
            module.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16),))
    return model.eval()


def load_accelerate(checkpoint: Path) -> Any:
    import torch
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook
    from accelerate.utils import OffloadedWeightsLoader
    from accelerate.utils.modeling import set_module_tensor_to_device
    from safetensors import safe_open
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    with init_empty_weights():
        model = SwitchTransformersEncoderModel(SwitchTransformersConfig.from_pretrained(checkpoint))
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    entries = {}
    for key, name in weight_map.items():
        path = str(checkpoint / name)
        if ".experts." in key:
            entries[key] = {"safetensors_file": path, "weight_name": key, "dtype": "bfloat16"}
            continue
        with safe_open(path, "pt") as file:
            set_module_tensor_to_device(model, key, "cpu", value=file.get_tensor(key), dtype=torch.float32)
    model.encoder.embed_tokens = model.shared
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            index = {k.removeprefix(name + "."): v for k, v in entries.items() if k.startswith(name + ".")}
            loader = OffloadedWeightsLoader(index=index)
            attach_align_device_hook(module, execution_device="cpu", offload=True, weights_map=loader)
    return model.eval()


def oracle(checkpoint: Path, inputs: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    """A predictor that answers with the true routing, found beforehand by a pass that is not timed."""
    import torch

    import sida_ext
    from sida_ext import _C
    from sida_ext.switch import moe_layers

    model = load_ours(checkpoint, arguments)
    tables: dict[int, Any] = {}
    used: list[list[tuple[int, list[int]]]] = []
    routed: list[Any] = []
    for layer in moe_layers(model).values():
        layer.router.register_forward_hook(lambda _, args, output: routed.append(output[:2]))
    with torch.inference_mode():
        for batch in inputs:
            routed.clear()
            model(**batch)
            index = torch.stack([pair[0] for pair in routed], dim=2).unsqueeze(-1).clone()
            gate = torch.stack([pair[1] for pair in routed], dim=2).unsqueeze(-1).clone()
            gate[index < 0] = 0  # over capacity: no expert is wanted
            used.append([(layer, index[:, :, layer].unique().tolist()) for layer in range(index.shape[2])])
            used[-1] = [(layer, [expert for expert in experts if expert >= 0]) for layer, experts in used[-1]]
            tables[hash(batch["input_ids"].numpy().tobytes())] = sida_ext.HashTable(index, gate)
    header = model.sida.header
    optimal = _C.run_optimal(len(header.layers), header.num_experts, used, model.sida.slots)[1] * header.record_bytes
    model.sida.close()

    class Oracle:
        optimal_bytes = optimal

        def predict(self, input_ids: Any, attention_mask: Any = None, top_k: int = 1) -> Any:
            return tables[hash(input_ids.numpy().tobytes())]

    return Oracle()


def load_ours(checkpoint: Path, arguments: argparse.Namespace) -> Any:
    import torch

    import sida_ext

    return sida_ext.from_pretrained(
        checkpoint,
        expert_memory=arguments.expert_memory,
        expert_dtype=arguments.expert_dtype,
        store=arguments.store,
        dtype=torch.float32,
    )


def measure(run: Callable[[list[dict[str, Any]]], None], inputs: list[dict[str, Any]], cold: int, warm_up: int) -> dict:
    """Seconds a forward: of the first ``cold`` ones, then of those after ``warm_up`` more."""
    start = time.perf_counter()
    run(inputs[:cold])
    first = (time.perf_counter() - start) / cold
    run(inputs[cold : cold + warm_up])
    rest = inputs[cold + warm_up :]
    start = time.perf_counter()
    run(rest)
    return {"cold_ms": first * 1e3, "warm_ms": (time.perf_counter() - start) / max(1, len(rest)) * 1e3}


def child(way: str, arguments: argparse.Namespace) -> None:
    """One way, in this process; prints one JSON line."""
    group = MemoryGroup(int(arguments.limit * 2**30)) if arguments.limit else None
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    count = arguments.cold + arguments.warm_up + arguments.runs
    inputs = list(batches(count, arguments.batch, seed=0, reuse=arguments.reuse))
    read: list[int] = []
    extra: dict[str, Any] = {}
    if way in ("mmap", "accelerate"):
        model = (load_mmap if way == "mmap" else load_accelerate)(arguments.checkpoint)

        def run(part: list[dict[str, Any]]) -> None:
            with torch.inference_mode():
                for batch in part:
                    model(**batch)
    else:
        import sida_ext

        predictor = oracle(arguments.checkpoint, inputs, arguments) if way == "oracle" else None
        model = load_ours(arguments.checkpoint, arguments)

        def run(part: list[dict[str, Any]]) -> None:
            model.sida.reset_stats()
            for _ in sida_ext.stream(model, part, predictor):
                pass
            read.append(model.sida.stats().bytes_read)

    result = measure(run, inputs, arguments.cold, arguments.warm_up)
    if way in ("ours", "oracle"):
        stats = model.sida.stats()
        extra = {
            "slots": model.sida.slots,
            "hit_rate": stats.hit_rate,
            "read_mib": stats.bytes_read / max(1, arguments.runs) / 2**20,
            "stall_ms": stats.stall_seconds / max(1, arguments.runs) * 1e3,
        }
        extra |= bounds(model, inputs[-1], stats.bytes_read / max(1, arguments.runs), result["warm_ms"])
        if predictor is not None:
            extra["read_x_optimal"] = sum(read) / predictor.optimal_bytes
        model.sida.close()
    result |= {
        "way": way,
        "tokens_per_second": arguments.batch * LENGTH / result["warm_ms"] * 1e3,
        "peak_group_mib": group.peak() >> 20 if group else None,
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        **extra,
    }
    print(json.dumps(result), flush=True)


def bounds(model: Any, batch: dict[str, Any], read: float, warm_ms: float) -> dict[str, float]:
    """What a forward could not be faster than: its computation alone, or its reads at the disk's rate."""
    import torch

    from sida_ext import _C

    times = []
    with torch.inference_mode():
        for _ in range(12):
            model.sida.reset_stats()
            start = time.perf_counter()
            model(**batch)
            times.append(time.perf_counter() - start - model.sida.stats().stall_seconds)
    compute_ms = sorted(times)[len(times) // 2] * 1e3
    rate = _C.measure_disk_rate(str(model.sida.store_path.parent), bytes=2**30, readers=4).bytes_per_second
    disk_ms = read / rate * 1e3
    return {
        "compute_ms": compute_ms,
        "disk_gb_per_second": rate / 1e9,
        "disk_ms": disk_ms,
        "x_bound": warm_ms / max(compute_ms, disk_ms),
    }


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--store", type=Path, help="expert store of the checkpoint; default: packed into the cache")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["mmap", "ours"])
    parser.add_argument("--limit", type=float, default=3.0, help="GiB; 0: none")
    parser.add_argument("--expert-memory", default="2GiB")
    parser.add_argument("--expert-dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cold", type=int, default=4, help="forwards from the cold start")
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--runs", type=int, default=20, help="forwards measured after the warm-up")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all ways; medians are printed")
    parser.add_argument("--reuse", type=int, default=0, help="draw the sentences from so many; 0: all are new")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        child(arguments.child, arguments)
        return
    results: list[dict[str, Any]] = []
    for _ in range(arguments.repeat):
        for way in arguments.ways:
            drop_page_cache()
            command = [sys.executable, "-m", "bench.limited_memory", *sys.argv[1:], "--child", way]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            results.append(json.loads(lines[-1]))
            print(results[-1], file=sys.stderr)
    print_table(results, arguments.ways)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def print_table(results: list[dict[str, Any]], ways: list[str]) -> None:
    from statistics import median

    def middle(way: str, key: str) -> float:
        return median(r[key] for r in results if r["way"] == way)

    print("| way | first forwards, ms | warm, ms | tokens/s | x the first row | peak of the group, MiB |")
    print("|---|---|---|---|---|---|")
    for way in ways:
        warm, peak = middle(way, "warm_ms"), next(r["peak_group_mib"] for r in results if r["way"] == way)
        print(
            f"| {way} | {middle(way, 'cold_ms'):.0f} | {warm:.0f} | {middle(way, 'tokens_per_second'):.1f} | "
            f"{middle(ways[0], 'warm_ms') / warm:.2f} | {peak if peak is not None else '-'} |"
        )


if __name__ == "__main__":
    main()
