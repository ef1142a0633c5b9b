"""sida plan: the ranges on the virtual clock, the verdict, the command line and its errors."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer.main

import sida_ext
from sida_ext.cli import app
from sida_ext.planning import layer_time
from sida_ext.planning import rates as rates_module
from sida_ext.planning.capacity import experts_bytes, record_bytes
from sida_ext.planning.counting import ModelFacts, count_experts
from sida_ext.planning.gpu import parse_gpu, with_memory
from sida_ext.planning.headers import read_headers
from sida_ext.planning.rates import Measured, Rates, measured_rates, remember, remembered
from sida_ext.planning.routing import LEAST_LOCAL, MOST_LOCAL, Recorded, prompts, steps
from sida_ext.planning.speed import LEFT_OUT, decode_speed, prompt_speed
from sida_ext.planning.sweep import sweep
from sida_ext.planning.verdict import parse_rate, plan
from tests.planning.tiny import save_tiny
from tests.support.hub import serve_hub

EVEN = Rates(
    disk=(1e9, 1e9),
    store=1e9,
    lanes=1,
    memory=1e10,
    expert=Measured({1: (1e-3, 1e-3), 32: (1e-3, 1e-3)}),
    number=Measured({1: (0.0, 0.0), 32: (0.0, 0.0)}),
    layer=Measured({1: (2e-3, 2e-3), 128: (2e-3, 2e-3)}),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="module")
def facts(tiny) -> ModelFacts:
    return count_experts(read_headers(tiny))


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch):
    """Rates of this machine that take no file of 256 MiB."""
    from sida_ext.experts.read_plan import ReadPlan

    monkeypatch.setattr(rates_module, "disk_plan", lambda *_: ReadPlan(2, 1 << 20, "a test's", 2e9, 2e10))
    monkeypatch.setattr("sida_ext.planning.gpu.disk_plan", lambda *_: ReadPlan(2, 1 << 20, "a test's", 2e9, 2e10))
    monkeypatch.setattr(rates_module, "PROBE_SECONDS", 0.0)


def test_all_in_memory_is_what_a_pencil_counts(facts):
    # Two experts of 1 ms and 2 ms before them in each of the 2 MoE layers, to which the dense third gives 1 ms each.
    found = decode_speed(facts, "bfloat16", experts_bytes(facts, "bfloat16"), EVEN)
    fast = 1 / (2 * (3e-3 + 2e-3))
    assert found.tokens_per_s == pytest.approx((fast / LEFT_OUT, fast))
    assert found.disk_bytes_per_token == (0, 0)
    assert found.hit_rate == (1, 1)
    beside = replace(EVEN, rest=Measured({1: (4e-3, 4e-3), 32: (4e-3, 4e-3)}))
    found = decode_speed(facts, "bfloat16", experts_bytes(facts, "bfloat16"), beside)
    fast = 1 / (2 * (3e-3 + 2e-3) + 4e-3)
    assert found.tokens_per_s == pytest.approx((fast / LEFT_OUT, fast))


def test_one_slot_reads_every_expert(facts):
    record = record_bytes(facts.shape, "bfloat16")
    rates = replace(EVEN, disk=(record / 4e-3, record / 4e-3))  # 4 ms for each expert
    recorded = Recorded([[(layer, [n % 2, 2 + n % 2]) for layer in range(2)] for n in range(8)], 4)
    found = decode_speed(facts, "bfloat16", record, rates, recorded)
    # Nothing is announced: each layer waits for both reads, and the second one begins when the first has been computed.
    assert found.tokens_per_s[1] == pytest.approx(1 / (2 * (3e-3 + 2 * (4e-3 + 1e-3))))
    assert found.disk_bytes_per_token == (4 * record, 4 * record)


def test_prompts_count_all_their_tokens(facts):
    whole = experts_bytes(facts, "bfloat16")
    recorded = Recorded([[(layer, [0, 1, 2, 3]) for layer in range(2)]] * 2, 1)
    found = prompt_speed(facts, "bfloat16", whole, EVEN, 10, recorded)
    assert found.tokens_per_s[1] == pytest.approx(10 / (2 * (3e-3 + 4e-3)))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_local_routing_hits_more_often(facts, share):
    model = replace(facts, layers=tuple(f"layers.{n}" for n in range(8)), experts=64, top_k=4.0, depth=8)
    model = replace(model, shapes={facts.shape: 8 * 64})
    budget = round(share * experts_bytes(model, "bfloat16"))
    found = decode_speed(model, "bfloat16", budget, EVEN)
    assert abs(found.hit_rate[0] - share) < 0.05  # even routing hits as often as there is memory
    assert found.hit_rate[1] > found.hit_rate[0] + 0.1
    assert found.tokens_per_s[0] < found.tokens_per_s[1]


def test_routings_have_the_form_that_the_clock_takes():
    for kind in (LEAST_LOCAL, MOST_LOCAL):
        for batch in steps(kind, 3, 16, 4, 20):
            assert [layer for layer, _ in batch] == [0, 1, 2]
            assert all(len(set(experts)) == 4 and set(experts) <= set(range(16)) for _, experts in batch)
        batches, tokens = prompts(kind, 3, 16, 4, 2, 200)
        sizes = [len(experts) for batch in batches for _, experts in batch]
        assert 4 <= np.mean(sizes) <= 8
        assert sizes == [len(counts) for batch in tokens for counts in batch]
        counts = [count for batch in tokens for layer in batch for count in layer]
        assert set(counts) == {1, 2}
        assert sum(counts) / 600 == pytest.approx(8, rel=0.05)  # two tokens, each with four
        assert steps(kind, 3, 16, 4, 5) == steps(kind, 3, 16, 4, 5)
    repeats = [
        np.mean([len({*a[0][1]} & {*b[0][1]}) for a, b in itertools.pairwise(found)])
        for found in (steps(kind, 1, 64, 4, 400) for kind in (LEAST_LOCAL, MOST_LOCAL))
    ]
    assert repeats[1] > 3 * repeats[0]
    assert 1.2 < np.mean([len(e) for batch in steps(LEAST_LOCAL, 5, 16, 1.5, 100) for _, e in batch]) < 1.8
    with pytest.raises(ValueError, match="kind is 'odd', expected 'least local' or 'most local'"):
        steps("odd", 1, 2, 1, 1)


def test_a_plan_has_the_fields_that_are_promised(tiny):
    found = plan(tiny, memory="1GiB", disk="2GB/s")
    assert sida_ext.plan is plan
    assert isinstance(found, sida_ext.Plan)
    known = json.loads(json.dumps(found.to_dict()))
    for name in (
        "fits",
        "smallest_budget",
        "experts_bytes",
        "other_bytes",
        "kv_bytes",
        "decode_tokens_per_s",
        "prompt_tokens_per_s",
        "disk_bytes_per_token",
        "command",
    ):
        assert known[name] is not None, name
    for name in ("decode_tokens_per_s", "prompt_tokens_per_s", "disk_bytes_per_token"):
        low, high = known[name]
        assert 0 <= low <= high
    assert (known["experts_bytes"], known["smallest_budget"]) == (8 * 4096, 4096)
    assert [row["dtype"] for row in known["by_dtype"]] == ["float32", "bfloat16", "float16", "int8", "int4", "mxfp4"]


@pytest.mark.parametrize("dense_dtype", [None, "int4"])
def test_the_command_is_one(tiny, tmp_path, dense_dtype):
    words = plan(tiny, memory="1GiB", dtype="int8", dense_dtype=dense_dtype).command.split()
    assert ("--dense-dtype" in words) == (dense_dtype is not None)
    group = typer.main.get_command(app)
    if words[1] not in group.commands:
        pytest.skip(f"this tree has no sida {words[1]}")
    group.commands[words[1]].make_context(words[1], words[2:])


def test_low_bit_copies_take_their_bytes(tiny):
    waits, copies = (plan(tiny, memory="1GiB", dtype="float32", on_miss=way) for way in ("wait", "low_bit"))
    assert waits.low_bit_bytes == 0
    assert copies.low_bit_bytes == plan(tiny, memory="1GiB", dtype="int4").experts_bytes == 8 * 4096
    assert copies.memory_needed == waits.memory_needed + copies.low_bit_bytes
    assert (copies.process_bytes, copies.kv_bytes) == (waits.process_bytes, waits.kv_bytes)
    assert "--on-miss low_bit" in copies.command
    assert "--on-miss" not in waits.command
    words = copies.command.split()
    typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:])
    tight = waits.memory_needed + copies.low_bit_bytes - waits.expert_memory + waits.smallest_budget - 1
    assert plan(tiny, memory=tight, dtype="float32").fits
    assert not plan(tiny, memory=tight, dtype="float32", on_miss="low_bit").fits


def test_what_does_not_fit_is_said_with_the_number_that_would_do(tiny):
    found = plan(tiny, memory="100MiB")
    assert not found.fits
    assert (found.command, found.decode_tokens_per_s, found.expert_memory) == ("", None, 0)
    assert "does not fit" in found.verdict
    assert plan(tiny, memory=found.memory_needed, expert_memory=found.smallest_budget).fits
    assert not plan(tiny, memory=found.memory_needed - 1).fits


def test_a_faster_disk_and_a_faster_memory_are_faster(tiny):
    given = {"memory": "1GiB", "expert_memory": 4096}
    slow, fast = (plan(tiny, disk=rate, **given).decode_tokens_per_s for rate in ("1MB/s", "100MB/s"))
    assert slow is not None
    assert fast is not None
    assert slow[1] < fast[1]
    here, double = (plan(tiny, memory="1GiB", bandwidth=rate).decode_tokens_per_s for rate in (2e10, 4e12))
    assert here is not None
    assert double is not None
    assert here[1] < double[1]


def test_gpu_times_are_marked(tiny):
    found = plan(tiny, gpu="2GiB", memory="8GiB", disk="2GB/s")
    assert found.modelled
    assert found.memory == 2 << 30
    assert all("modelled" in text for text in found.rates.values())
    assert "--device cuda" in found.command
    slow, fast = (plan(tiny, gpu=f"{card}:2GiB", memory="8GiB").decode_tokens_per_s for card in ("L4", "H100"))
    assert slow is not None
    assert fast is not None
    assert slow[1] < fast[1]


def test_cards_are_named():
    assert parse_gpu("RTX 4090").memory == 24 << 30
    assert parse_gpu("l4:8GiB").memory == 8 << 30
    assert parse_gpu("8GiB").fast.name.startswith("H100")
    assert parse_gpu(with_memory("L4", 5)).memory == parse_gpu(with_memory("3GiB", 5)).memory == 5
    for wrong in ("GTX 5", "GTX:8GiB", "L4:much"):
        with pytest.raises(ValueError, match=r"gpu is|L4"):
            parse_gpu(wrong)


def test_rates_are_parsed():
    assert parse_rate("2GB/s", "disk") == 2e9
    assert parse_rate("500 MB/s", "disk") == 5e8
    assert parse_rate(None, "disk") is None
    for wrong in ("2GB", "fast", "0GB/s", 0, float("nan")):
        with pytest.raises(ValueError, match=r"disk is .*, expected bytes a second above 0"):
            parse_rate(wrong, "disk")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int3"}, "dtype is 'int3', expected one of"),
        ({"dense_dtype": "fp5"}, "dense_dtype is 'fp5'"),
        ({"dense_dtype": "int8", "gpu": "8GiB"}, "dense_dtype is 'int8', expected None with gpu='8GiB'"),
        ({"memory": "much"}, "memory is 'much'"),
        ({"context": -1}, "context is -1"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"on_miss": "drop"}, "on_miss is 'drop', expected one of wait, low_bit"),
        ({"on_miss": "low_bit", "dtype": "int4"}, "on_miss is 'low_bit', expected 'wait' with dtype='int4'"),
        ({"on_miss": "low_bit", "gpu": "8GiB"}, "and gpu='8GiB'"),
        ({"expert_memory": 5}, "smallest that works is one expert, 4096 bytes"),
        ({"gpu": "none"}, "gpu is 'none'"),
    ],
)
def test_arguments_are_checked(tiny, options, says):
    with pytest.raises(ValueError, match=says):
        plan(tiny, **options)


def test_rates_are_measured_once(facts, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDA_CACHE", str(tmp_path))
    first = measured_rates(facts, "int8", tmp_path)
    assert 0 < first.expert.seconds(1, 0) <= first.expert.seconds(1, 1)
    assert set(first.expert.streamed) == set(first.number.streamed) == set(rates_module.PROBE_TOKENS)
    assert "measured now" in first.said["experts"]
    assert "assumed" in first.said["layers"]
    again = measured_rates(facts, "int8", tmp_path)
    assert again.expert == first.expert
    assert "remembered" in again.said["experts"]
    layer = {"streamed": {1: (1e-3, 2e-3), 128: (3e-3, 4e-3)}, "cached": {}}
    remember(rates_module.layer_key(facts), layer)  # as an earlier version left it: not known
    assert "assumed" in measured_rates(facts, "int8", tmp_path).said["layers"]
    remember(rates_module.layer_key(facts), {"layer": layer, "rest": layer})
    measured = measured_rates(facts, "int8", tmp_path)
    assert measured.layer_seconds(0, 1, 1) == measured.rest.seconds(1, 1) == 2e-3
    other = measured_rates(replace(facts, dtype="float32"), "int8", tmp_path)  # of other tokens, so another measurement
    assert "measured now" in other.said["experts"]
    sida_ext.set_precision("fast")
    try:
        assert "measured now" in measured_rates(facts, "int8", tmp_path).said["experts"]
    finally:
        sida_ext.set_precision("exact")
    assert "remembered" in measured_rates(facts, "int8", tmp_path, dense_dtype="int8").said["experts"]
    (tmp_path / "plan_rates.json").write_text("[")
    assert remembered("anything") is None
    assert "measured now" in measured_rates(facts, "int8", tmp_path).said["experts"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4", "mxfp4"])
@pytest.mark.parametrize("activation", ["relu", "gated-silu"])
def test_the_probe_computes_every_type(dtype, activation):
    from sida_ext._load import _C

    for x_dtype in ("float32", "bfloat16"):
        times = _C.measure_moe_ffn(64, 96, activation, dtype, 3, [2, 1], 0.0, x_dtype, 1 << 20)
        assert [len(calls) for calls in times] == [3, 3]
        assert min(map(min, times)) > 0
    with pytest.raises(ValueError, match="tokens is 0, expected at least 1"):
        _C.measure_moe_ffn(64, 96, activation, dtype, 3, [1, 0], 0.0, "bfloat16", 1)
    with pytest.raises(ValueError, match="activation is 'odd'"):
        _C.measure_moe_ffn(64, 96, "odd", dtype, 3, [1], 0.0, "bfloat16", 1)
    with pytest.raises(ValueError, match="x_dtype is 'int8', expected float32, bfloat16"):
        _C.measure_moe_ffn(64, 96, activation, dtype, 3, [1], 0.0, "int8", 1)
    with pytest.raises(ValueError, match="walked is 0, expected at least 1"):
        _C.measure_moe_ffn(64, 96, activation, dtype, 3, [1], 0.0, "bfloat16", 0)
    with pytest.raises(ValueError, match="dtype is 'int3', expected float32, bfloat16"):
        _C.measure_linear(8, 8, "int3", [1], 0.0, "bfloat16", 1)
    for kind in ("torch", dtype):
        assert [len(calls) for calls in _C.measure_linear(40, 72, kind, [1, 5], 0.0, "bfloat16", 1 << 14)] == [3, 3]


def test_a_layer_and_the_rest_of_a_forward_are_measured_apart(tiny, facts, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDA_CACHE", str(tmp_path))
    monkeypatch.setattr(layer_time, "SECONDS", 0.0)
    # 3 ms a layer and 2 ms beside, in slower calls 4 ms and 5 ms; half of it with weights in the cache.
    few, many = [0.008, 0.013, 0.013], [0.020, 0.029, 0.029]

    def times(model, tokens, decodes, walk=None):
        found = few if len(model.model.layers) == layer_time.FEW else many
        return found if walk is not None else [seconds / 2 for seconds in found]

    monkeypatch.setattr(layer_time, "_times", times)
    layer, rest = layer_time.measure_layer(read_headers(tiny).config, facts)
    for tokens in layer_time.TOKENS:
        assert layer.streamed[tokens] == pytest.approx((3e-3, 4e-3))
        assert rest.streamed[tokens] == pytest.approx((2e-3, 5e-3))
    assert layer.cached == {1: pytest.approx((1.5e-3, 2e-3))}
    assert rates_module.layer_rates(facts)[:2] == (layer, rest)


def test_a_layer_of_the_model_itself_is_measured(tiny, facts, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDA_CACHE", str(tmp_path))
    monkeypatch.setattr(layer_time, "SECONDS", 0.0)
    layer, rest = layer_time.measure_layer(read_headers(tiny).config, facts)
    assert set(layer.streamed) == set(rest.streamed) == set(layer_time.TOKENS)
    assert all(0 < fast <= slow for fast, slow in layer.streamed.values())
    assert all(low >= 0 and high >= 0 for low, high in rest.streamed.values())


def test_of_two_measurements_the_fastest_call_and_the_slower_median_count():
    first = Measured({1: (1.0, 2.0), 4: (3.0, 4.0)}, {1: (0.5, 0.6)})
    second = Measured({1: (0.9, 1.5), 4: (3.5, 5.0)}, {})
    assert first.joined(second) == Measured({1: (0.9, 2.0), 4: (3.0, 5.0)}, {})
    joined = EVEN.joined(replace(EVEN, expert=Measured({1: (5e-4, 5e-4), 32: (2e-3, 2e-3)})))
    assert joined.expert.streamed == {1: (5e-4, 1e-3), 32: (1e-3, 2e-3)}
    assert joined.number == EVEN.number


def test_a_time_is_read_off_the_nearest_points():
    found = Measured({1: (1.0, 2.0), 4: (4.0, 4.0), 16: (16.0, 10.0)}, {1: (0.5, 5.0)})
    assert [found.seconds(tokens, 0) for tokens in (1, 2, 4, 10, 16, 28)] == pytest.approx([1, 2, 4, 10, 16, 28])
    assert found.seconds(28, 1) == pytest.approx(16)
    assert found.seconds(0.5, 0) == 1.0
    assert found.seconds(1, 0, held=0.5) == pytest.approx(0.75)
    assert found.seconds(1, 1, held=1.0) == 2.0  # a cache makes nothing slower
    assert found.seconds(4, 0, held=1.0) == 4.0
    assert found.per(2).seconds(1, 0, held=1.0) == 0.25
    assert Measured({1: (2.0, 2.0), 2: (1.0, 1.0)}).seconds(9, 0) == 2.0  # more tokens take no less time


def test_a_cache_holds_what_it_can():
    rates = replace(EVEN, cache=300)
    assert [rates.held(touched, 0) for touched in (100, 300, 600)] == pytest.approx([1, 1, 0.5])
    assert [rates.held(touched, 1) for touched in (100, 150, 151, 600)] == [1, 1, 0, 0]
    assert replace(EVEN, cache=0).held(1, 0) == 0


def test_weights_in_the_cache_are_faster(facts):
    whole = experts_bytes(facts, "bfloat16")
    cached = Measured({1: (1e-3, 1e-3), 32: (1e-3, 1e-3)}, {1: (0.2e-3, 0.2e-3)})
    rates = replace(EVEN, expert=cached, cache=1 << 40)
    found = decode_speed(facts, "bfloat16", whole, rates)
    assert found.tokens_per_s[1] == pytest.approx(1 / (2 * (3e-3 + 0.4e-3)))
    assert decode_speed(facts, "bfloat16", whole, replace(rates, cache=1)).tokens_per_s[1] == pytest.approx(
        100, rel=1e-3
    )


def test_experts_with_many_tokens_take_their_time(facts):
    """Half of the experts have one token, the others 31: not what 16 of each would take."""
    whole = experts_bytes(facts, "bfloat16")
    bent = Measured({1: (1e-3, 1e-3), 16: (1e-3, 1e-3), 31: (5e-3, 5e-3)})
    batches = [[(layer, [0, 1]) for layer in range(2)]] * 2
    seen = Recorded(batches, 1, [[[1, 31]] * 2] * 2)
    found = prompt_speed(facts, "bfloat16", whole, replace(EVEN, expert=bent), 16, seen)
    assert found.tokens_per_s[1] == pytest.approx(16 / (2 * (3e-3 + 6e-3)))
    even = prompt_speed(facts, "bfloat16", whole, replace(EVEN, expert=bent), 16, replace(seen, tokens=None))
    assert even.tokens_per_s[1] == pytest.approx(16 / (2 * (3e-3 + 2e-3)))


def test_a_lane_alone_has_more_than_its_share(facts):
    """Two lanes, a disk that one of them nearly fills: one read takes 5 ms, two together 8."""
    record = record_bytes(facts.shape, "bfloat16")
    rates = replace(EVEN, disk=(record / 4e-3, record / 4e-3), lanes=2, alone=record / 5e-3)
    for wanted, seconds in ((1, 5e-3), (2, 8e-3)):
        batches = [[(layer, list(range(2 * (n % 2), 2 * (n % 2) + wanted))) for layer in range(2)] for n in range(6)]
        found = decode_speed(facts, "bfloat16", 2 * record, rates, Recorded(batches, 2))
        # Computing ends the layer: one expert after its read, of two that end together both.
        assert found.tokens_per_s[1] == pytest.approx(1 / (2 * (3e-3 + seconds + wanted * 1e-3)))


def test_the_default_is_that_of_the_run(facts, monkeypatch):
    """A CPU without instructions for bfloat16 serves such a model from its own kernels, as from_pretrained does."""
    large = replace(facts, dense=((1 << 12, 1 << 12),))
    assert rates_module.as_served(large, None)[1:] == (None, None) or not {"amx", "avx512"} & set(
        sida_ext._C.instruction_sets()
    )

    class Narrow:
        instruction_sets = staticmethod(lambda: ["avx2", "scalar"])

    monkeypatch.setattr(rates_module, "engine", lambda: Narrow)
    monkeypatch.setattr(rates_module.platform, "machine", lambda: "x86_64")
    served, dense, said = rates_module.as_served(large, None)
    assert (served.dtype, dense) == ("float32", "bfloat16")
    assert "no instructions for bfloat16" in str(said)
    assert rates_module.as_served(large, "int8")[1:] == ("int8", None)
    assert rates_module.as_served(facts, None) == (facts, None, None)  # too small to matter
    from sida_ext.models import dense as served_dense

    assert rates_module.WORTH == served_dense.WORTH


def test_a_sweep_finds_its_knee(tiny, tmp_path):
    found = sweep(tiny, disks=(1e6, 1e8))
    assert len(found.cells) == len(found.memories)
    assert found.cells[-1][0] == pytest.approx(found.cells[-1][1])  # all in memory: no disk is read
    columns = [[cell[1] for cell in row if cell] for row in zip(*found.cells, strict=True)]
    for speeds in columns:
        assert all(b >= 0.9 * a for a, b in itertools.pairwise(speeds))
    assert found.knee_at is not None
    assert found.knee_at[0] in found.memories
    with pytest.raises(ValueError, match="memory is given, but a sweep varies it"):
        sweep(tiny, memory="1GiB")


def sida(*arguments: object, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sida_ext.cli", "plan", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"SIDA_CACHE": str(cache)} | environment,
    )


def test_the_command_line(tiny, tmp_path):
    run = sida(tiny, "--memory", "1GiB", "--disk", "2GB/s", cache=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].endswith("experts in memory (32.0 KiB of the machine)")
    assert re.search(r"decode +\d", run.stdout)
    assert f"sida serve {tiny}" in run.stdout
    as_json = sida(tiny, "--memory", "1GiB", "--disk", "2GB/s", "--json", cache=tmp_path)
    assert json.loads(as_json.stdout)["fits"] is True
    shared = sida(tiny, "--memory", "1GiB", "--disk", "2GB/s", "--expert-memory", "25%", "--json", cache=tmp_path)
    found = json.loads(shared.stdout)
    assert found["expert_memory"] == round(found["experts_bytes"] / 4)
    assert found["resident_share"] == pytest.approx(0.25)
    wrong = sida(tiny, "--disk", "fast", cache=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "error: disk is 'fast'" in wrong.stderr


def test_the_exit_status_tells_whether_it_fits(tiny, tmp_path):
    for form in ([], ["--json"]):
        run = sida(tiny, "--memory", "64KiB", "--disk", "2GB/s", *form, cache=tmp_path)
        assert run.returncode == 1
        assert "does not fit" in run.stdout
        assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("given", "share"), [("auto", None), ("50%", 0.5), ("100%", 1.0)])
def test_a_budget_is_given_as_to_from_pretrained(tiny, given, share):
    free = plan(tiny, memory="1GiB", disk="2GB/s")
    found = plan(tiny, memory="1GiB", disk="2GB/s", expert_memory=given)
    assert found.expert_memory == (free.expert_memory if share is None else round(share * found.experts_bytes))
    with pytest.raises(ValueError, match="expert_memory is '0%', expected a share above 0%"):
        plan(tiny, memory="1GiB", disk="2GB/s", expert_memory="0%")


def test_a_picture_of_the_sweep(tiny, tmp_path):
    run = sida(tiny, "--sweep", "--png", tmp_path / "s.png", cache=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "knee: " in run.stdout
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_hub_id_is_answered_without_torch(tmp_path):
    """Through huggingface_hub, with every rate measured for the first time: what a stranger's first call takes."""
    folder = tmp_path / "checkpoint"
    save_tiny("qwen3_moe", folder, hidden_size=512, moe_intermediate_size=1024, num_experts=16, head_dim=64)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with serve_hub(folder) as hub:
        run = subprocess.run(
            [sys.executable, "-m", "sida_ext.cli", "plan", "org/model", "--json"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ
            | {
                "SIDA_CACHE": str(tmp_path / "cache"),
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "PYTHONPROFILEIMPORTTIME": "1",
            },
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["download_bytes"] == found["checkpoint_bytes"] > 0
    assert hub.sent < found["checkpoint_bytes"]
    imported = {line.rsplit("|", 1)[1].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert not {"torch", "transformers", "matplotlib", "pandas", "scipy"} & imported
    # CPU time, not time: the machine may be busy. Printed; what it is on an idle machine is in docs/planning.md.
    print(f"CPU seconds: {after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.2f}")
