"""A decoder-only model larger than memory, or all in it: decoding and prompts, beside accelerate's disk offload and
ik_llama.cpp, under a control group's limit.

    python -m bench.causal.checkpoint CHECKPOINT
    sida pack CHECKPOINT -o STORE --dtype bfloat16
    python -m bench.causal.decode CHECKPOINT --store STORE      # as root
    python -m bench.causal.decode CHECKPOINT --ways exact fast peer --limit 0 --expert-memory 100% --dtype int4 \\
        --dense-dtype int4 --random-tokens --peer-python PEER/bin/python

Each way runs in a process of its own, from a cold page cache, ``--rounds`` times in turns. Reported: the load's peak of
anonymous memory, seconds of the prompts, tokens/s of decoding, of the first steps apart, bytes read for each token, hit
rate, what of a step was in whose code, and a digest of the logits: with the same tokens it is the same for every limit
and budget. ``exact`` and ``ours`` are the same; ``fast`` rounds activations (``set_precision``).
"""

from __future__ import annotations

import argparse
import hashlib
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

WAYS = ("ours", "exact", "fast", "accelerate", "peer")
# The peer's type of about the same bits.
PEER_KINDS = {"int4": "Q4_0", "mxfp4": "Q4_0", "int8": "Q8_0"}
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

    sida_ext.set_precision("fast" if way == "fast" else "exact")
    return sida_ext.from_pretrained(
        arguments.checkpoint,
        expert_memory=arguments.expert_memory,
        expert_dtype=arguments.dtype,
        dense_dtype=arguments.dense_dtype,
        store=arguments.store,
        store_cache=arguments.store_cache,
        read_ahead=not arguments.no_read_ahead,
        lanes=arguments.lanes,
        dtype=getattr(torch, arguments.rest),
    )


def prompt(model: Any, ids: torch.Tensor) -> tuple[float, Any]:
    begin = time.perf_counter()
    output = model(input_ids=ids, use_cache=True)
    return time.perf_counter() - begin, output


def prompts(model: Any, tokens: list[torch.Tensor]) -> dict[str, Any]:
    """Seconds of each, of ours what was read and waited for too, and of all a digest of the logits."""
    runtime = getattr(model, "sida", None)
    seconds, engine, digest = [], [], hashlib.sha256()
    for ids in tokens:
        if runtime is not None:
            runtime.reset_stats()
        taken, output = prompt(model, ids)
        seconds.append(taken)
        digest.update(output.logits.float().numpy().tobytes())
        if runtime is not None:
            stats = runtime.stats()
            wasted, useful = stats.wasted_prefetches, stats.useful_prefetches
            engine.append({"read_gib": stats.bytes_read / 2**30, "stall_seconds": stats.stall_seconds})
            engine[-1] |= {"hit_rate": stats.hit_rate, "useful_prefetches": useful, "wasted_prefetches": wasted}
    found: dict[str, Any] = {"prompt_seconds": seconds, "prompt_digest": digest.hexdigest()}
    if engine:
        found |= {"prompt_read_gib": sum(row["read_gib"] for row in engine) / len(engine), "prompt_engine": engine}
    return found


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one process does, in its group."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    group = MemoryGroup()
    group.enter()
    imported = group.memory()["anonymous"]
    begin = time.perf_counter()
    model = load(way, arguments)
    result: dict[str, Any] = {"way": way, "dtype": arguments.dtype, "load_seconds": time.perf_counter() - begin}
    result |= {"dense_dtype": arguments.dense_dtype, "rest": arguments.rest, "threads": torch.get_num_threads()}
    digest = hashlib.sha256()
    result["tokens"] = "random" if arguments.random_tokens else "greedy"
    result["imported_mib"] = imported / 2**20
    random = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    runtime = getattr(model, "sida", None)
    print(json.dumps({"loaded": True}), flush=True)
    with torch.inference_mode():
        shape = (1, arguments.prompt)
        result |= prompts(
            model, [torch.randint(3, vocabulary, shape, generator=random) for _ in range(arguments.prompts)]
        )
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
            digest.update(output.logits.float().numpy().tobytes())
    timed = steps[arguments.warm :]
    result["logits_digest"] = digest.hexdigest()
    if arguments.warm:
        result["first_tokens_per_second"] = arguments.warm / sum(steps[: arguments.warm])
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
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        begin = time.perf_counter()
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        elapsed = (time.perf_counter() - begin) * 1e6
    rows = {event.key: event.self_cpu_time_total / elapsed for event in recorded.key_averages()}
    shares = {name: share for name, share in sorted(rows.items(), key=lambda row: -row[1]) if share > 0.03}
    shares["Python and what no operation covers"] = 1 - sum(rows.values())
    return shares


def peer_command(arguments: argparse.Namespace) -> list[str]:
    """The peer's run, in its own environment; its file is written if it is not there."""
    if arguments.peer_python is None:
        raise SystemExit("--ways peer needs --peer-python, the interpreter of an environment with ik-llama-cpp-python")
    kind = PEER_KINDS[arguments.dtype]
    file = (arguments.peer_folder or arguments.checkpoint.parent) / f"{arguments.checkpoint.name}.{kind}.gguf"
    program = [str(arguments.peer_python), "-m", "bench.causal.peer"]
    if not file.is_file():
        subprocess.run([*program, "write", arguments.checkpoint, file, "--kind", kind], check=True)
    options = [f"--{name}={getattr(arguments, name)}" for name in ("prompt", "prompts", "warm", "steps")]
    mapped = ["--mapped"] if arguments.limit else []
    return [*program, "run", str(file), *options, f"--threads={torch.get_num_threads()}", "--group", *mapped]


def run_way(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One way in a new process; its group's memory is watched from here, while it loads and while it runs."""
    command = [sys.executable, "-m", "bench.causal.decode", *sys.argv[1:], "--child", way]
    if way == "peer":
        command = peer_command(arguments)
    group = MemoryGroup()
    group.set_limit(int(arguments.limit * 2**30))
    drop_page_cache()
    peaks = {"load": Peak(group), "run": Peak(group)}
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
    parser.add_argument("--store-cache", type=Path)
    parser.add_argument("--limit", type=float, default=10.0, help="GiB for the whole process; 0: none")
    parser.add_argument("--expert-memory", default="8GiB")
    parser.add_argument("--dtype", default="bfloat16", help="of the experts")
    parser.add_argument("--dense-dtype", help="of every other large matrix")
    parser.add_argument("--rest", default="bfloat16", help="what transformers computes in: dtype=")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--rounds", type=int, default=1, help="of all ways, in turns")
    parser.add_argument("--peer-python", type=Path, help="interpreter of the peer's environment")
    parser.add_argument("--peer-folder", type=Path, help="where its files lie; default: beside the checkpoint")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--no-read-ahead", action="store_true", help="read_ahead=False")
    parser.add_argument("--lanes", type=int, help="lanes=; default: measured")
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
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else []
    results: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        for way in arguments.ways:
            results.append(run_way(way, arguments) | {"limit_gib": arguments.limit, "prompt_tokens": arguments.prompt})
            print(json.dumps(results[-1], indent=1), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(known + results, indent=1) + "\n")
    summarise(results, arguments)


def summarise(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Medians over the rounds, and how many times the last way's speed each has."""

    def middle(way: str, value: Any) -> float:
        return statistics.median(value(row) for row in results if row["way"] == way)

    speeds = {way: middle(way, lambda row: row["tokens_per_second"]) for way in arguments.ways}
    prompts = {way: middle(way, lambda row: arguments.prompt / min(row["prompt_seconds"])) for way in arguments.ways}
    last = arguments.ways[-1]
    print(f"\n{'':12} decode, tokens/s  x {last}   prompt, tokens/s  x {last}   peak of the group, MiB")
    for way in arguments.ways:
        peak = max(max(row["load_peak_all_mib"], row["run_peak_all_mib"]) for row in results if row["way"] == way)
        print(
            f"{way:12} {speeds[way]:16.2f} {speeds[way] / speeds[last]:8.2f} {prompts[way]:18.1f} "
            f"{prompts[way] / prompts[last]:8.2f} {peak:14.0f}"
        )
    digests = {row["logits_digest"] for row in results if row["way"] in ("ours", "exact")}
    if digests:
        print(
            "logits of exact runs:", "one digest" if len(digests) == 1 else "DIFFER", *sorted(d[:12] for d in digests)
        )


if __name__ == "__main__":
    main()
