"""Load, faults and limits: nothing is lost, nothing mixed up, nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

import sida_ext
from sida_ext import _C
from sida_ext.serving.scheduler import Limits
from tests.support.served import served_here
from tests.support.tiny_models import tiny_causal, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def tiny(folder: Path, **options):
    model = tiny_causal(num_hidden_layers=2)
    return sida_ext.swap_experts(model, store=folder / "experts.sida", **{"expert_memory": "50%"} | options)


def written_alone(server, prompt: list[int], new: int) -> str:
    """What the server writes with nothing beside it."""
    done = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": prompt, "max_tokens": new, "temperature": 0}, timeout=60
    )
    return done.json()["choices"][0]["text"]


class Slow:
    """Holds every step of a model back until it is let go: what is under way is known, without a sleep."""

    def __init__(self, server) -> None:
        self.model = server.service.model
        self.gate, self.arrived = threading.Event(), threading.Semaphore(0)
        self._step = self.model.step
        self.model.step = self._held

    def _held(self, rows, tokens):
        self.arrived.release()
        assert self.gate.wait(30)
        return self._step(rows, tokens)

    def let_go(self) -> None:
        self.model.step = self._step
        self.gate.set()


async def load(server, clients: int, requests: int, seed: int):
    """Many clients at once, each with its own share of mixed requests; the answers by request."""
    draw = random.Random(seed)
    wanted = [
        ([draw.randrange(2, 300) for _ in range(draw.choice([1, 2, 5, 20, 60]))], draw.choice([1, 2, 4, 9, 17]))
        for _ in range(24)
    ]
    asked = [draw.randrange(len(wanted)) for _ in range(requests)]
    streamed = [draw.random() < 0.5 for _ in range(requests)]
    found: list[str | None] = [None] * requests
    todo = iter(range(requests))

    async def one(client: httpx.AsyncClient) -> None:
        for number in todo:
            prompt, new = wanted[asked[number]]
            body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": streamed[number]}
            while True:
                answer = await client.post("/v1/completions", json=body)
                if answer.status_code != 429:
                    break
                assert int(answer.headers["retry-after"]) >= 1
                await asyncio.sleep(0.05)
            assert answer.status_code == 200, answer.text
            if streamed[number]:
                events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
                assert events[-1] == "[DONE]"
                choices = [json.loads(event)["choices"][0] for event in events[:-1]]
                assert choices[-1]["finish_reason"] == "length"
                found[number] = "".join(choice["text"] for choice in choices)
            else:
                found[number] = answer.json()["choices"][0]["text"]

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return wanted, asked, found


@pytest.mark.parametrize(
    ("clients", "requests"), [(8, 64), pytest.param(64, 2000, marks=pytest.mark.slow)], ids=["quick", "whole"]
)
def test_no_request_is_lost_and_none_gets_the_answer_of_another(tmp_path, clients, requests):
    seed = random.randrange(2**32)
    with served_here(tiny(tmp_path), tiny_tokenizer(), limits=Limits(rows=8, queue=32)) as server:
        wanted, asked, found = asyncio.run(load(server, clients, requests, seed))
        expected = [written_alone(server, *pair) for pair in wanted]
        for number, text in enumerate(found):
            assert text == expected[asked[number]], f"seed {seed}, request {number}"
        server.wait_idle()
        assert server.service.model.cache_bytes == 0


def test_a_full_queue_is_429_with_the_time_to_come_back(tmp_path):
    with served_here(tiny(tmp_path), tiny_tokenizer(), limits=Limits(rows=1, queue=2)) as server:
        slow = Slow(server)
        try:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                first = threading.Thread(
                    target=client.post, args=("/v1/completions",), kwargs={"json": {"prompt": "a"}}
                )
                first.start()
                assert slow.arrived.acquire(timeout=30)
                refused = client.post("/v1/completions", json={"prompt": "a", "n": 3})
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert "0 rows wait, 3 more exceed 2" in refused.json()["error"]["message"]
                slow.let_go()
                first.join(30)
                assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        finally:
            slow.let_go()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_within_a_step(tmp_path, stream):
    with served_here(tiny(tmp_path), tiny_tokenizer(), limits=Limits(rows=1)) as server:
        slow = Slow(server)
        try:
            body = {"prompt": "a", "max_tokens": 900, "stream": stream}
            with httpx.Client(base_url=server.url, timeout=60) as client:
                if stream:
                    with client.stream("POST", "/v1/completions", json=body) as answer:
                        next(answer.iter_lines())
                        assert slow.arrived.acquire(timeout=30)
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        client.post("/v1/completions", json=body, timeout=0.5)
                    assert slow.arrived.acquire(timeout=30)
            end = time.monotonic() + 20
            while server.service.driver.running and time.monotonic() < end:
                time.sleep(0.01)
            assert server.service.driver.running == 0  # its step still computes
            steps = server.service.driver.counts.steps
            slow.let_go()
            server.wait_idle()
            assert server.service.driver.counts.steps - steps <= 1
            assert server.service.model.cache_bytes == 0
        finally:
            slow.let_go()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_with_an_error(tmp_path, stream):
    with served_here(tiny(tmp_path), tiny_tokenizer(), limits=Limits(rows=1)) as server:
        body = {"prompt": "a", "max_tokens": 1000, "stream": stream}
        found = httpx.post(
            f"{server.url}/v1/completions", json=body, headers={"x-deadline-seconds": "0.05"}, timeout=60
        )
        if stream:
            events = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
            assert json.loads(events[-2])["error"]["code"] == "deadline"
            assert events[-1] == "[DONE]"
        else:
            assert found.status_code == 504
            assert found.json()["error"]["code"] == "deadline"
        server.wait_idle()


def test_a_disk_error_fails_the_requests_it_concerns_and_no_other(tmp_path):
    """Reads fail now and then: each answer is an error or right, and the server goes on."""
    faults = _C.Faults(seed=3, fail_every=25)
    model = tiny(tmp_path, expert_memory="30%", faults=faults)
    statuses = []
    with served_here(model, tiny_tokenizer(), limits=Limits(rows=4)) as server:
        expected: dict[int, set[str]] = {}

        async def one(client: httpx.AsyncClient, number: int) -> None:
            prompt = [20 + number % 5, 30, 40]
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
            answer = await client.post("/v1/completions", json=body)
            statuses.append(answer.status_code)
            if answer.status_code == 200:
                expected.setdefault(number % 5, set()).add(answer.json()["choices"][0]["text"])
            else:
                error = answer.json()["error"]
                assert answer.status_code == 500
                assert error["code"] == "computation_failed"
                assert str(tmp_path) not in answer.text

        async def every() -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                for start in range(0, 60, 4):
                    await asyncio.gather(*(one(client, start + place) for place in range(4)))

        asyncio.run(every())
        server.wait_idle()
        assert server.service.model.cache_bytes == 0
    assert statuses.count(500) > 0
    assert statuses.count(200) > 0
    assert all(len(texts) == 1 for texts in expected.values())


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_mid_generation_reaches_only_its_own_request(tmp_path, stream):
    with served_here(tiny(tmp_path), tiny_tokenizer(), limits=Limits(rows=4)) as server:
        expected = written_alone(server, [50, 51], 12)
        model = server.service.model
        step = model.step

        def failing(rows, tokens):
            if any(row.own.length >= 8 for row in rows if row in doomed):
                raise OSError(5, "Input/output error", str(tmp_path / "experts.sida"))
            return step(rows, tokens)

        doomed: list[object] = []
        start_all = model.start_all

        def started(prompts, new):  # together or one by one, as they come
            rows = start_all(prompts, new)
            doomed.extend(row for ids, (_, row) in zip(prompts, rows, strict=True) if ids[0] == 66)
            return rows

        model.step, model.start_all = failing, started
        found = {}

        def ask(prompt: int) -> None:
            body = {"prompt": [prompt, 51], "max_tokens": 12, "temperature": 0, "stream": stream and prompt == 66}
            found[prompt] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in (50, 66)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found[50].json()["choices"][0]["text"] == expected
        if stream:
            events = [line.removeprefix("data: ") for line in found[66].text.split("\n\n") if line]
            assert json.loads(events[-2])["error"]["code"] == "computation_failed"
            assert events[-1] == "[DONE]"
        else:
            assert found[66].status_code == 500
        assert str(tmp_path) not in found[66].text
        assert written_alone(server, [50, 51], 12) == expected


def test_openais_client_raises_on_a_stream_that_failed(tmp_path):
    import openai

    with served_here(tiny(tmp_path), tiny_tokenizer()) as server:
        server.service.model.step = lambda rows, tokens: 1 / 0
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="the model could not be computed"):
                list(client.completions.create(model="tiny", prompt="a", max_tokens=5, stream=True))


# The process


def serve(*more: str, folder: str = "demo_denoiser", **environment: str) -> tuple[subprocess.Popen[str], str]:
    """`sida serve` of a bundled model in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sida_ext.cli", "serve", str(ROOT / "examples" / folder), "--port", "0", *more],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400", **environment},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if " at http://" in line:
            url = line.rsplit(" at ", 1)[1].strip()
            while True:
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        return process, url
                except httpx.TransportError:
                    assert process.poll() is None, process.stderr.read()
                    time.sleep(0.02)
    raise AssertionError(f"the server ended with {process.wait()}")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_lets_running_requests_end_and_takes_no_more(sent):
    process, url = serve("--drain", "60", "--context", "512")
    try:
        with (
            httpx.stream(
                "POST",
                f"{url}/v1/completions",
                json={"prompt": "the film was", "max_tokens": 60, "temperature": 1.5, "stream": True, "seed": 5},
                timeout=60,
            ) as answer,
            httpx.stream("GET", f"{url}/events", timeout=60) as watching,
        ):
            lines = answer.iter_lines()
            first = next(lines)
            assert first.startswith("data: {")
            process.send_signal(sent)
            rest = [line for line in lines if line]
            list(watching.iter_lines())  # ends too
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(30) in (0, -sent)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=2)
    finally:
        process.kill()
        process.wait()


def test_what_has_not_ended_when_the_time_is_up_is_told_so():
    process, url = serve("--drain", "0", "--context", "4096")
    try:
        body = {"prompt": "the film was", "max_tokens": 4000, "temperature": 2, "stream": True, "seed": 1}
        body["n"] = 16  # some of them go on for long
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["error"]["code"] == "shutting_down"
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_said_at_once():
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "sida_ext.cli",
                "serve",
                str(ROOT / "examples" / "demo_denoiser"),
                "--port",
                str(port),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "400"},
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port" in done.stderr


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_requests(tmp_path):
    with served_here(tiny(tmp_path), tiny_tokenizer(), limits=Limits(rows=16)) as server:
        sizes = []
        for part in range(5):
            asyncio.run(load(server, 16, 2000, part))
            server.wait_idle()
            sizes.append(resident())
        assert sizes[-1] - sizes[0] < 24 << 20, [size >> 20 for size in sizes]
        assert server.service.model.cache_bytes == 0
        assert not server.service.driver._rows


def test_tensors_do_not_pile_up(tmp_path):
    """The quick form: after a hundred requests no more tensors live than after ten."""
    import gc

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    with served_here(tiny(tmp_path), tiny_tokenizer(), limits=Limits(rows=4)) as server:
        asyncio.run(load(server, 4, 10, 0))
        server.wait_idle()
        before = tensors()
        asyncio.run(load(server, 4, 100, 1))
        server.wait_idle()
        assert tensors() - before < 20
