"""The page in a headless Chromium: its numbers are those of /metrics, on any width, by keyboard, light and dark."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import sida_ext
from tests.support.chromium import Browser, find_chromium
from tests.support.served import served_here
from tests.support.tiny_models import tiny_causal, tiny_tokenizer

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")

METRICS = {
    "tokens": "sida_server_generated_tokens_total",
    "hits": "sida_hits_total",
    "stall_seconds": "sida_stall_seconds_total",
    "read_bytes": "sida_read_bytes_total",
    "queue": "sida_server_queue",
    "memory_used": "sida_expert_memory_used_bytes",
    "cache_bytes": "sida_server_cache_bytes",
}


@pytest.fixture
def server(tmp_path):
    model = tiny_causal(num_experts=32, num_hidden_layers=6)
    model = sida_ext.swap_experts(model, expert_memory="50%", store=tmp_path / "experts.sida")
    with served_here(model, tiny_tokenizer(), name="tiny-moe", events=0.2, keys=()) as served:
        yield served


def ask(url: str, count: int) -> None:
    draw = random.Random(1)
    for _ in range(count):
        prompt = [draw.randrange(2, 300) for _ in range(6)]
        httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 24}, timeout=120).raise_for_status()


def totals(url: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def shown(browser: Browser) -> dict[str, float]:
    tiles = "[...document.querySelectorAll('.tile')].map((tile) => [tile.dataset.metric, Number(tile.dataset.total)])"
    return dict(browser.run(tiles))


def test_the_pages_numbers_are_those_of_metrics(server, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(server.url)
        browser.until("document.getElementById('state')?.textContent === 'live'")
        ask(server.url, 3)
        server.wait_idle()
        expected = totals(server.url)
        tokens = int(expected[METRICS["tokens"]])
        assert tokens == 72
        browser.until(f"document.querySelector('[data-metric=tokens]')?.dataset.total === '{tokens}'")
        browser.run("new Promise((go) => setTimeout(go, 500))")  # a snapshot that is younger than the last step
        assert shown(browser) == pytest.approx({tile: expected[name] for tile, name in METRICS.items()})
        assert f"{tokens} in all" in browser.run("document.querySelector('[data-metric=tokens] small').textContent")
        assert browser.run("document.getElementById('model').textContent") == "tiny-moe"

        # Every expert in memory is a coloured cell, by keyboard too.
        runtime = server.service.model.runtime
        browser.run("document.getElementById('map').focus()")
        browser.press("ArrowDown", 40)
        browser.press("End", 35)
        cell = browser.run("document.getElementById('cell').textContent")
        place, demands = runtime.standings()[1].places[31], runtime.standings()[1].demands[31]
        words = ["on disk", "arriving", "in memory", "computed from now"]
        assert cell == f"{runtime.header.layers[1]}, expert 31: {words[place]}, wanted {demands} times"

        for width, dark in ((360, False), (360, True), (1100, False)):
            browser.size(width, 900, dark)
            assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), width
            background = browser.run("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(20, 23, 26)" if dark else "rgb(247, 247, 244)")
        loaded = browser.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert all(name.startswith(server.url) for name in loaded), loaded

        target = os.environ.get("SIDA_SCREENSHOT")  # for the docs, while requests run
        if target is not None:
            browser.size(1100, 760)
            busy = [threading.Thread(target=ask, args=(server.url, 4)) for _ in range(4)]
            for thread in busy:
                thread.start()
            browser.run("new Promise((go) => setTimeout(go, 4000))")
            browser.screenshot(Path(target))
            for thread in busy:
                thread.join()


def test_a_key_is_asked_for_and_kept_for_the_session(tmp_path):
    model = sida_ext.swap_experts(tiny_causal(), store=tmp_path / "experts.sida")
    with served_here(model, tiny_tokenizer(), events=0.2, keys=(b"secret",)) as server:
        with Browser(tmp_path / "profile") as browser:
            browser.open(server.url)
            browser.until("document.getElementById('state')?.textContent === 'a key is needed'")
            send = "document.getElementById('key').value = '{}'; document.querySelector('#ask button').click()"
            browser.run(send.format("wrong"))
            browser.until("document.getElementById('state')?.textContent === 'this key is not known'")
            browser.run(send.format("secret"))
            browser.until("document.getElementById('state')?.textContent === 'live'")
            assert not browser.run("location.href").endswith("secret")
