"""What the HTTP server costs and gains: latency beside a direct call, throughput at 16 clients beside one by one and
beside transformers' own batch of 16. ``python -m bench.serving.front
[MODEL ...] [--requests N] [--shared] [--json FILE]``.

All rows of one model are measured by turns. Clients run in a process of their own (:mod:`bench.serving.client`), so
that what they cost is not counted as the server's; direct calls and the library's batches in another
(:mod:`bench.serving.direct`), as threads that have computed in the server's process would slow the server's down, and
the other way round (docs/serving.md). What is measured computes alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.serving.direct import NEW_TOKENS, Direct
from sida_ext.serving.command import load
from sida_ext.serving.scheduler import Limits
from tests.support.served import serving

ROOT = Path(__file__).parents[2]


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


def _over_library(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How much faster than the library's batches, of rounds of (seconds of ours, of the library's) by turns."""
    ratios = sorted(library / ours for ours, library in pairs)
    return {"over_library": statistics.median(ratios), "over_library_from": ratios[0], "over_library_to": ratios[-1]}


class Inside:
    """Seconds that a served model itself computes, for each row that it begins; of one client that asks at a time."""

    def __init__(self, served: Any) -> None:
        self.rows: list[float] = []
        for name in ("classify", "start_all", "step"):
            setattr(served, name, self._timed(getattr(served, name), begins=name != "step"))

    def _timed(self, function: Callable[..., Any], begins: bool) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*given)
            finally:
                seconds = time.perf_counter() - begin
                if begins:
                    self.rows.append(seconds)
                else:
                    self.rows[-1] += seconds

        return timed


@contextmanager
def _served(folder: str, shared: bool) -> Iterator[tuple[int, Inside]]:
    """The port behind which a model is served, as ``sida serve`` does it."""
    served = load(folder, name="bench", context=None, rows=16, predictor=None, shared=shared, expert_memory="auto")
    if served.generates:
        served.ends = frozenset()  # every row writes as many tokens
    inside = Inside(served)
    with serving(served, Limits(queue=1024, shared=shared)) as server:
        yield int(server.url.rsplit(":", 1)[1]), inside


def classifier(folder: str, requests: int, rounds: int, shared: bool) -> dict[str, Any]:
    """Classification: the front's cost at the median, and texts a second."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for text in corpus(4 * requests) if len(tokenizer(text)["input_ids"]) <= 64][:requests]
    bodies = [{"input": text} for text in texts]
    direct: list[float] = []
    latencies: list[float] = []
    fronts: list[float] = []
    pairs: list[tuple[float, float]] = []
    alone = direct_cpu = http_cpu = 0.0
    with Direct(folder, shared) as elsewhere, _served(folder, shared) as (port, inside):
        drive(port, "/classify", bodies[:32], 4)
        for _ in range(rounds):  # by turns, so that what else the machine does meets all
            seconds, cpu = elsewhere.ask("classify", texts)
            direct += seconds
            direct_cpu += cpu
            cpu = time.process_time()
            inside.rows.clear()
            whole, found, _ = drive(port, "/classify", bodies, 1)
            fronts += [latency - own for latency, own in zip(found, inside.rows, strict=True)]
            http_cpu += time.process_time() - cpu
            alone += whole / rounds
            latencies += found
            together = drive(port, "/classify", bodies, 16)[0]
            pairs.append((together, elsewhere.ask("library_classify", texts)))
    ours, library = (statistics.median(part) for part in zip(*pairs, strict=True))
    return {
        "direct_ms": 1e3 * statistics.median(direct),
        "http_ms": 1e3 * statistics.median(latencies),
        "front_ms": 1e3 * statistics.median(fronts),  # of a request, without what the model computes for it
        "http_over_direct_ms": 1e3 * (statistics.median(latencies) - statistics.median(direct)),
        "front_cpu_ms": 1e3 * (http_cpu - direct_cpu) / len(latencies),  # mean, of the server's process alone
        "one_by_one_per_s": len(texts) / alone,
        "clients_16_per_s": len(texts) / ours,
        "library_16_per_s": len(texts) / library,
        "over_one_by_one": alone / ours,
        **_over_library(pairs),
    }


def generator(folder: str, requests: int, rounds: int, shared: bool) -> dict[str, Any]:
    """Generation: tokens a second, and what the server adds to a step of the model's own."""
    texts = [" ".join(text.split()[:12]) for text in corpus(requests)]
    bodies = [{"prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0} for text in texts]
    few = max(requests // 4, 4)
    direct: list[float] = []
    latencies: list[float] = []
    fronts: list[float] = []
    pairs: list[tuple[float, float]] = []
    alone, direct_cpu, http_cpu, tokens = 0.0, 0.0, 0.0, len(texts) * NEW_TOKENS
    with Direct(folder, shared) as elsewhere, _served(folder, shared) as (port, inside):
        drive(port, "/v1/completions", bodies[:16], 16)
        for _ in range(rounds):
            seconds, cpu = elsewhere.ask("generate", texts[:few])
            direct += seconds
            direct_cpu += cpu
            cpu = time.process_time()
            inside.rows.clear()
            whole, found, written = drive(port, "/v1/completions", bodies[:few], 1)
            fronts += [latency / own - 1 for latency, own in zip(found, inside.rows, strict=True)]
            http_cpu += time.process_time() - cpu
            alone += whole
            latencies += found
            together, _, all_written = drive(port, "/v1/completions", bodies, 16)
            if (written, all_written) != (few * NEW_TOKENS, tokens):
                raise RuntimeError(f"{written} and {all_written} tokens, expected {few * NEW_TOKENS} and {tokens}")
            pairs.append((together, elsewhere.ask("library_generate", texts)))
    ours, library = (statistics.median(part) for part in zip(*pairs, strict=True))
    one = rounds * few * NEW_TOKENS / alone
    step, over_http = (1e3 * statistics.median(part) / NEW_TOKENS for part in (direct, latencies))
    return {
        "direct_step_ms": step,
        "http_step_ms": over_http,
        "front_share_of_a_step": statistics.median(fronts),  # of an answer, over what the model computes for it
        "http_over_direct_step": over_http / step - 1,
        "front_cpu_share_of_a_step": http_cpu / direct_cpu - 1,
        "one_by_one_tokens_per_s": one,
        "clients_16_tokens_per_s": tokens / ours,
        "library_16_tokens_per_s": tokens / library,
        "over_one_by_one": tokens / ours / one,
        **_over_library(pairs),
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
