"""A decoder-only model larger than memory: greedy decoding and prompts, beside accelerate's disk offload, under a
control group's limit.

    python -m bench.causal.checkpoint CHECKPOINT
    sida pack CHECKPOINT -o STORE --dtype bfloat16
    python -m bench.causal.decode CHECKPOINT --store STORE      # as root

Each way runs in a process of its own, from a cold page cache. Reported: the load's peak of anonymous memory, seconds of
the prompts, tokens/s of greedy decoding, bytes read for each token, hit rate, and what of a step was in whose code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.engine.memory_group import MemoryGroup, Peak, drop_page_cache

WAYS = ("ours", "accelerate")
POLL_SECONDS = 0.05


def load(way: str, arguments: argparse.Namespace) -> Any:
    if way == "accelerate":
        from transformers import AutoModelForCausalLM

        experts = "mlp.experts"
        layers = json.loads((arguments.checkpoint / "config.json").read_text())["num_hidden_layers"]
        places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        for number in range(layers):
            place = f"model.layers.{number}."
            places |= {f"{place}{name}": "cpu" for name in ("self_attn", "input_layernorm", "post_attention_layernorm")}
            places |= {f"{place}mlp.gate": "cpu", f"{place}{experts}": "disk"}
        return AutoModelForCausalLM.from_pretrained(
            arguments.checkpoint, dtype=torch.bfloat16, device_map=places, offload_folder=arguments.offload
        )
    import sida_ext

    return sida_ext.from_pretrained(
        arguments.checkpoint,
        expert_memory=arguments.expert_memory,
        expert_dtype=arguments.dtype,
        store=arguments.store,
        dtype=torch.bfloat16,
    )


def prompt(model: Any, ids: torch.Tensor) -> tuple[float, Any]:
    begin = time.perf_counter()
    output = model(input_ids=ids, use_cache=True)
    return time.perf_counter() - begin, output


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one process does, in its group."""
    group = MemoryGroup()
    group.enter()
    imported = group.memory()["anonymous"]
    begin = time.perf_counter()
    model = load(way, arguments)
    result: dict[str, Any] = {"way": way, "dtype": arguments.dtype, "load_seconds": time.perf_counter() - begin}
    result["tokens"] = "random" if arguments.random_tokens else "greedy"
    result["imported_mib"] = imported / 2**20
    random = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    runtime = getattr(model, "sida", None)
    print(json.dumps({"loaded": True}), flush=True)
    with torch.no_grad():
        result["prompt_seconds"] = [
            prompt(model, torch.randint(3, vocabulary, (1, arguments.prompt), generator=random))[0]
            for _ in range(arguments.prompts)
        ]
        if runtime is not None:
            result["prompt_read_gib"] = runtime.stats().bytes_read / 2**30 / arguments.prompts
        _, output = prompt(model, torch.randint(3, vocabulary, (1, 16), generator=random))
        steps: list[float] = []
        for step in range(arguments.warm + arguments.steps):
            if step == arguments.warm and runtime is not None:
                runtime.reset_stats()
            begin = time.perf_counter()
            token = output.logits[:, -1:].argmax(-1)
            if arguments.random_tokens:
                token = torch.randint(3, vocabulary, token.shape, generator=random)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - begin)
    timed = steps[arguments.warm :]
    result |= {"tokens_per_second": len(timed) / sum(timed), "median_step_ms": statistics.median(timed) * 1e3}
    result["slowest_step_ms"] = max(timed) * 1e3
    if runtime is not None:
        stats = runtime.stats()
        result |= {
            "hit_rate": stats.hit_rate,
            "read_mib_a_token": stats.bytes_read / 2**20 / len(timed),
            "stall_share": stats.stall_seconds / sum(timed),
            "direct": stats.direct,
            "expert_memory_mib": runtime.expert_memory / 2**20,
        }
        if arguments.profile:
            result["profile"] = profile(model, output, arguments.profile)
    return result


def profile(model: Any, output: Any, steps: int) -> dict[str, float]:
    """Shares of a decode step by operation, self time, those above 3 %."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        begin = time.perf_counter()
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        elapsed = (time.perf_counter() - begin) * 1e6
    rows = {event.key: event.self_cpu_time_total / elapsed for event in recorded.key_averages()}
    shares = {name: share for name, share in sorted(rows.items(), key=lambda row: -row[1]) if share > 0.03}
    shares["Python and what no operation covers"] = 1 - sum(rows.values())
    return shares


def run_way(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One way in a new process; its group's memory is watched from here, while it loads and while it runs."""
    group = MemoryGroup()
    group.set_limit(int(arguments.limit * 2**30))
    drop_page_cache()
    peaks = {"load": Peak(group), "run": Peak(group)}
    command = [sys.executable, "-m", "bench.causal.decode", *sys.argv[1:], "--child", way]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
        reader.start()
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            peaks["run" if any('"loaded"' in line for line in lines) else "load"].look()
        reader.join()
    group.remove()
    if process.returncode != 0:
        raise SystemExit(f"{way} ended with {process.returncode}: killed by the limit, if that is {-9}")
    result = json.loads(lines[-1])
    for when, peak in peaks.items():
        result |= {f"{when}_peak_{name}_mib": value / 2**20 for name, value in peak.bytes.items()}
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--store", type=Path, help="packed by sida pack; default: packed at first use")
    parser.add_argument("--limit", type=float, default=10.0, help="GiB")
    parser.add_argument("--expert-memory", default="8GiB")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--warm", type=int, default=16, help="decode steps that are not timed")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument(
        "--random-tokens", action="store_true", help="decode random tokens: a random model's greedy ones repeat"
    )
    parser.add_argument("--profile", type=int, default=0, help="decode steps to profile")
    parser.add_argument("--offload", type=Path, default=Path("offload"), help="accelerate's folder")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments)))
        return
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else []
    for way in arguments.ways:
        results.append(run_way(way, arguments) | {"limit_gib": arguments.limit, "prompt_tokens": arguments.prompt})
        print(json.dumps(results[-1], indent=1))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
