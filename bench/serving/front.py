"""What the HTTP server costs and gains: latency beside a direct call, throughput at 16 clients beside one by one and
beside transformers' own batch of 16. ``python -m bench.serving.front
[MODEL ...] [--requests N] [--shared] [--json FILE]``.

All rows of one model are measured in one process, one after the other; clients run in a process of their own
(:mod:`bench.serving.client`), so that what they cost is not counted as the server's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import sida_ext
from sida_ext.serving.scheduler import Limits
from tests.support.served import served_here

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32


def corpus(count: int) -> list[str]:
    """The first texts of the bundled corpus."""
    with gzip.open(ROOT / "examples/data/corpus.jsonl.gz", "rt") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]


def drive(port: int, path: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[float], int]:
    """Seconds for all requests, each request's latency, tokens written.

    Raises:
        RuntimeError: a request failed.
    """
    given = {"port": port, "path": path, "bodies": list(bodies), "clients": clients}
    client = [sys.executable, "-I", str(Path(__file__).with_name("client.py"))]
    done = subprocess.run(client, input=json.dumps(given), capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the client ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    if found["problems"]:
        raise RuntimeError(found["problems"][0])
    return found["seconds"], found["latencies"], found["written"]


def classifier(folder: str, requests: int, rounds: int, shared: bool) -> dict[str, Any]:
    """Classification: the front's cost at the median, and texts a second."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sida_ext.from_pretrained(folder, expert_memory="auto")
    # The library's batch is that of a model as it was loaded: --shared changes the one that is served.
    untouched = sida_ext.from_pretrained(folder, expert_memory="auto") if shared else model
    texts = [text for text in corpus(4 * requests) if len(tokenizer(text)["input_ids"]) <= 64][:requests]
    with served_here(model, tokenizer, name="bench", limits=Limits(queue=1024, shared=shared)) as server:
        port = int(server.url.rsplit(":", 1)[1])
        served = server.service.model
        ids = [tokenizer(text)["input_ids"] for text in texts]
        bodies = [{"input": text} for text in texts]
        drive(port, "/classify", bodies[:32], 4)
        direct: list[float] = []
        latencies: list[float] = []
        alone = direct_cpu = http_cpu = 0.0
        for _ in range(rounds):  # by turns, so that what else the machine does meets both
            cpu = time.process_time()
            for row in ids:
                begin = time.perf_counter()
                served.classify([row])
                direct.append(time.perf_counter() - begin)
            direct_cpu += time.process_time() - cpu
            cpu = time.process_time()
            seconds, found, _ = drive(port, "/classify", bodies, 1)
            http_cpu += time.process_time() - cpu
            alone += seconds / rounds
            latencies += found
        together = min(drive(port, "/classify", bodies, 16)[0] for _ in range(rounds))
        library = float("inf")
        for _ in range(rounds):
            begin = time.perf_counter()
            for start in range(0, len(texts), 16):
                batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True)
                with torch.no_grad():
                    untouched(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            library = min(library, time.perf_counter() - begin)
    return {
        "direct_ms": 1e3 * statistics.median(direct),
        "http_ms": 1e3 * statistics.median(latencies),
        "front_ms": 1e3 * (statistics.median(latencies) - statistics.median(direct)),
        "front_cpu_ms": 1e3 * (http_cpu - direct_cpu) / len(latencies),  # mean, of this process alone
        "one_by_one_per_s": len(texts) / alone,
        "clients_16_per_s": len(texts) / together,
        "library_16_per_s": len(texts) / library,
        "over_one_by_one": alone / together,
        "over_library": library / together,
    }


def _decode_alone(served: Any, ids: Sequence[int]) -> float:
    """Seconds of one greedy answer without server: the prompt and every step, nothing else."""
    begin = time.perf_counter()
    logits, row = served.start(ids, NEW_TOKENS)
    token = int(logits.argmax())
    for _ in range(NEW_TOKENS - 1):
        token = int(served.step([row], [token])[0].argmax())
    served.drop(row)
    return time.perf_counter() - begin


def generator(folder: str, requests: int, rounds: int, shared: bool) -> dict[str, Any]:
    """Generation: tokens a second, and what the server adds to a step of the model's own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sida_ext.from_pretrained(folder, expert_memory="auto")
    # The library's batch is that of a model as it was loaded: --shared changes the one that is served.
    untouched = sida_ext.from_pretrained(folder, expert_memory="auto") if shared else model
    texts = [" ".join(text.split()[:12]) for text in corpus(requests)]
    for each in (model, untouched):
        each.generation_config.eos_token_id = None  # every row writes as many tokens
    with served_here(model, tokenizer, name="bench", limits=Limits(queue=1024, shared=shared)) as server:
        port = int(server.url.rsplit(":", 1)[1])
        served = server.service.model
        bodies = [{"prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0} for text in texts]
        drive(port, "/v1/completions", bodies[:16], 16)
        few = bodies[: max(requests // 4, 4)]
        direct: list[float] = []
        latencies: list[float] = []
        alone, written, direct_cpu, http_cpu = 0.0, 0, 0.0, 0.0
        for _ in range(rounds):
            cpu = time.process_time()
            direct += [_decode_alone(served, tokenizer(body["prompt"])["input_ids"]) for body in few]
            direct_cpu += time.process_time() - cpu
            cpu = time.process_time()
            seconds, found, tokens = drive(port, "/v1/completions", few, 1)
            http_cpu += time.process_time() - cpu
            alone, written = alone + seconds, written + tokens
            latencies += found
        together, _, all_written = min(drive(port, "/v1/completions", bodies, 16) for _ in range(rounds))
        library = float("inf")
        for _ in range(rounds):
            begin = time.perf_counter()
            for start in range(0, len(texts), 16):
                batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True)
                ids, mask = batch["input_ids"], batch["attention_mask"]
                untouched.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            library = min(library, time.perf_counter() - begin)
    rate = {"one": written / alone, "sixteen": all_written / together, "library": len(texts) * NEW_TOKENS / library}
    step, over_http = (1e3 * statistics.median(part) / NEW_TOKENS for part in (direct, latencies))
    return {
        "direct_step_ms": step,
        "http_step_ms": over_http,
        "front_share_of_a_step": over_http / step - 1,
        "front_cpu_share_of_a_step": http_cpu / direct_cpu - 1,
        "one_by_one_tokens_per_s": rate["one"],
        "clients_16_tokens_per_s": rate["sixteen"],
        "library_16_tokens_per_s": rate["library"],
        "over_one_by_one": rate["sixteen"] / rate["one"],
        "over_library": rate["sixteen"] / rate["library"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo_model", "demo_denoiser"], help="folders of examples/")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shared", action="store_true", help="as sida serve --shared")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    found = {}
    for name in given.models:
        folder = str(ROOT / "examples" / name)
        kind = json.loads((ROOT / "examples" / name / "config.json").read_text())["architectures"][0]
        measure = classifier if kind.endswith("Classification") else generator
        found[name] = measure(folder, given.requests, given.rounds, given.shared)
        print(name, json.dumps({key: round(value, 3) for key, value in found[name].items()}, indent=1))
    if given.json is not None:
        given.json.write_text(
            json.dumps({"threads": torch.get_num_threads(), "shared": given.shared, "models": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
