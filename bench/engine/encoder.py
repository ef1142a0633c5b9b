"""A whole encoder of Switch-base shapes, one batch at a time, all experts resident: where does a forward's time go, and
what does ``dense_dtype`` change?

    python -m bench.engine.checkpoint 128 CHECKPOINT
    python -m bench.engine.encoder CHECKPOINT                    # this machine
    python -m bench.engine.encoder CHECKPOINT --isa avx2         # as on a CPU without AVX-512 and bfloat16 instructions

Each way runs in a process of its own, in turns. Reported, in ms a forward: the first of each batch, least and median
after that, the first after an idle moment, CPU time, and self time by operation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

# dtype of what transformers computes, dense_dtype
WAYS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float32, dense bfloat16": ("float32", "bfloat16"),
    "float32, dense int8": ("float32", "int8"),
    "float32, dense int4": ("float32", "int4"),
}
AVX2 = {
    "SIDA_CPU": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def load(arguments: argparse.Namespace, way: str) -> Any:
    import sida_ext

    dtype, dense_dtype = WAYS[way]
    options: dict[str, Any] = {} if dense_dtype is None else {"dense_dtype": dense_dtype}
    return sida_ext.from_pretrained(
        arguments.checkpoint,
        expert_memory="100%",
        expert_dtype=arguments.expert_dtype,
        dtype=getattr(torch, dtype),
        store_cache=arguments.store_cache,
        **options,
    )


def profile(forward: Any, count: int) -> dict[str, float]:
    """Self time of each operation in ms a forward, those above 2 %; the rest is Python and what none covers."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        begin = time.perf_counter()
        for _ in range(count):
            forward()
        elapsed = time.perf_counter() - begin
    rows = {event.key: event.self_cpu_time_total / 1e3 / count for event in recorded.key_averages()}
    whole = elapsed * 1e3 / count
    found = {name: ms for name, ms in sorted(rows.items(), key=lambda row: -row[1]) if ms > 0.02 * whole}
    return found | {"small operations": sum(rows.values()) - sum(found.values()), "Python": whole - sum(rows.values())}


def measure(arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load(arguments, way)
    random = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(2, 32000, (arguments.batch, arguments.tokens), generator=random)
        for _ in range(arguments.forwards)
    ]
    with torch.inference_mode():
        first = []
        for ids in batches:  # each brings experts that nothing has touched since they were read
            begin = time.perf_counter()
            model(input_ids=ids)
            first.append((time.perf_counter() - begin) * 1e3)
        times, cpu = [], time.process_time()
        for ids in batches:
            begin = time.perf_counter()
            model(input_ids=ids)
            times.append((time.perf_counter() - begin) * 1e3)
        cpu = (time.process_time() - cpu) * 1e3 / len(batches)
        idle = []
        for ids in batches[:3]:
            time.sleep(arguments.idle)
            begin = time.perf_counter()
            model(input_ids=ids)
            idle.append((time.perf_counter() - begin) * 1e3)
        operations = profile(lambda: model(input_ids=batches[0]), 5)
    model.sida.close()
    return {
        "way": way,
        "least_ms": min(times),
        "median_ms": statistics.median(times),
        "first_ms": statistics.median(first),
        "cpu_ms": cpu,
        "after_idle_ms": statistics.median(idle),
        "operations_ms": operations,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--isa", choices=["avx2"], help="restrict every library to this instruction set")
    parser.add_argument("--expert-dtype", default="int8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--forwards", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--idle", type=float, default=2.0, help="seconds before the forwards of 'after_idle_ms'")
    parser.add_argument("--store-cache", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, arguments.child)))
        return
    environment = os.environ | (AVX2 if arguments.isa else {})
    results = []
    for number in range(arguments.rounds):
        for way in arguments.ways:
            command = [sys.executable, "-m", "bench.engine.encoder", *sys.argv[1:], "--child", way]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]) | {"round": number})
            print(json.dumps(results[-1], indent=1), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    columns = ("first", "least", "median", "after_idle", "cpu")
    print(f"\n{'ms':24} " + " ".join(f"{name:>10}" for name in columns))
    for way in arguments.ways:
        own = [row for row in results if row["way"] == way]
        print(f"{way:24} " + " ".join(f"{min(row[f'{name}_ms'] for row in own):10.1f}" for name in columns))


if __name__ == "__main__":
    main()
