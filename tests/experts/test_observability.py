"""What is seen from outside: statistics, the Prometheus exporter, the trace, the profiler's ranges."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

import sida_ext
from sida_ext._load import _C
from sida_ext.experts.stats import Counters, Stats, _quantile
from sida_ext.experts.timeline import Event, draw, write_chrome_trace
from tests.support.predictors import ByToken

LAYERS = ("encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp")


@pytest.fixture
def model(folder):
    model = sida_ext.from_pretrained(folder, expert_dtype="float32", expert_memory="25%", predictor=ByToken())
    yield model
    model.sida.close()


def batches(count=6):
    random = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(2, 97, (2, 9), generator=random)} for _ in range(count)]


def run(model, count=6):
    return list(sida_ext.stream(model, batches(count)))


def test_statistics_add_up_by_layer_and_are_reset(model):
    run(model)
    stats = model.sida.stats()
    assert [layer.name for layer in stats.layers] == list(LAYERS)
    for name in Counters.__dataclass_fields__:
        assert getattr(stats, name) == sum(getattr(layer, name) for layer in stats.layers), name
    for layer in stats.layers:
        assert layer.requested == 6
        assert layer.unique == layer.hits + layer.late + layer.misses > 0
        assert layer.bytes_read == layer.loads * model.sida.header.record_bytes > 0
        assert 0 <= layer.stall_p50 <= layer.stall_p95 <= layer.stall_p99
        assert layer.useful_prefetches + layer.wasted_prefetches <= layer.loads
    assert 0 < stats.committed_slots <= stats.peak_slots <= model.sida.slots
    assert 0 < stats.hit_rate < 1
    assert stats.lane_restarts == 0 < stats.verify_seconds < stats.read_seconds
    model.sida.reset_stats()
    cleared = model.sida.stats()
    assert cleared.verify_seconds == cleared.read_seconds == 0
    assert all(getattr(layer, name) == 0 for layer in cleared.layers for name in Counters.__dataclass_fields__)
    assert all(layer.stall_p99 == 0 for layer in cleared.layers)
    assert cleared.hit_rate == 1


def test_the_counters_are_those_that_the_engine_lists():
    assert tuple(Counters.__dataclass_fields__) == tuple(name for name, _ in _C.layer_counters)
    of_python = {"direct", "layers", "lookahead", "announcing"}
    own = set(Stats.__dataclass_fields__) - set(Counters.__dataclass_fields__) - of_python
    assert own == {name for name, _ in _C.engine_counters}


def test_a_counter_that_python_does_not_know_is_an_error(model, monkeypatch):
    monkeypatch.setattr(_C, "layer_counters", (*_C.layer_counters, ("unheard_of", "nothing")))
    with pytest.raises(KeyError, match="unheard_of"):
        model.sida.stats()


def test_a_lane_that_died_is_seen(folder):
    dying = _C.Faults(die_every=5)
    model = sida_ext.from_pretrained(folder, expert_memory="25%", lanes=1, faults=dying)
    with pytest.raises(RuntimeError, match="lane 0 died"):
        run(model)
    assert model.sida.stats().lane_restarts == 1
    model.sida.close()


def test_statistics_go_into_json(model):
    run(model)
    stats = model.sida.stats()
    found = json.loads(json.dumps(stats.as_dict()))
    assert found["hit_rate"] == stats.hit_rate
    assert found["lane_restarts"] == 0
    assert [layer["name"] for layer in found["layers"]] == list(LAYERS)
    assert sum(layer["bytes_read"] for layer in found["layers"]) == found["bytes_read"] == stats.bytes_read
    assert found["layers"][0]["hit_rate"] == stats.layers[0].hit_rate


def test_quantiles():
    samples = [float(i) for i in range(100)]
    assert [_quantile(samples, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert _quantile([], 0.5) == 0
    assert _quantile([3.0], 0.99) == 3


def test_prometheus_shows_the_statistics(folder):
    prometheus = pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    from sida_ext.experts import metrics

    registry = prometheus.CollectorRegistry()
    models = {name: sida_ext.from_pretrained(folder, expert_memory="25%", predictor=ByToken()) for name in ("a", "b")}
    for name, model in models.items():
        metrics.register(model, name, registry)
    run(models["a"])
    run(models["b"], count=2)

    def samples():
        text = prometheus.generate_latest(registry).decode()
        return {
            (sample.name, *(sample.labels.get(key) for key in ("model", "layer", "quantile"))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def at_rest(runtimes):
        """The statistics of each, and samples that no read which was still under way fell between."""
        for _ in range(1000):
            before, found = {name: runtime.stats() for name, runtime in runtimes.items()}, samples()
            if before == {name: runtime.stats() for name, runtime in runtimes.items()}:
                return before, found
        raise AssertionError("the statistics never came to rest")

    all_stats, found = at_rest({name: model.sida for name, model in models.items()})
    for name, model in models.items():
        stats = all_stats[name]
        for layer in stats.layers:
            for metric, field, _ in metrics.LAYER_COUNTERS:
                assert found[f"sida_{metric}_total", name, layer.name, None] == pytest.approx(getattr(layer, field))
            for share, field in metrics.QUANTILES:
                wait = found["sida_stall_quantile_seconds", name, layer.name, str(share)]
                assert wait == pytest.approx(getattr(layer, field))
        record = model.sida.header.record_bytes
        assert found["sida_expert_memory_budget_bytes", name, None, None] == model.sida.expert_memory
        assert found["sida_expert_memory_used_bytes", name, None, None] == stats.committed_slots * record
        assert found["sida_expert_memory_peak_bytes", name, None, None] == stats.peak_slots * record
        assert found["sida_experts_bytes", name, None, None] == model.sida.header.experts_bytes
        assert {field for _, field, _ in metrics.ENGINE_COUNTERS} == {"read_seconds", "verify_seconds", "lane_restarts"}
        for metric, field, _ in metrics.ENGINE_COUNTERS:
            assert found[f"sida_{metric}_total", name, None, None] == pytest.approx(getattr(stats, field))
    assert found["sida_layers_computed_total", "a", LAYERS[0], None] == 6
    models["a"].sida.close()
    assert {key[1] for key in samples()} == {"b"}
    del model, models
    assert not samples()  # the collector keeps no model alive
    with pytest.raises(ValueError, match="no expert runtime"):
        metrics.register(object())


def test_metrics_without_prometheus_client_say_what_to_install(monkeypatch):
    for name in ("prometheus_client", "prometheus_client.core", "prometheus_client.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sida_ext.experts.metrics", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'sida_ext\[metrics\]'"):
        importlib.import_module("sida_ext.experts.metrics")


def check_format(path):
    """The trace-event format: what every event must have, names of threads, events of a thread apart or nested.
    Returns the complete events by the name of their thread."""
    entries = json.loads(path.read_text())["traceEvents"]
    names, events = {}, {}
    for entry in entries:
        assert entry["ph"] in ("M", "X")
        assert isinstance(entry["name"], str)
        assert isinstance(entry["pid"], int)
        assert isinstance(entry["tid"], int)
        assert isinstance(entry["ts"], (int, float))
        assert entry["ts"] >= 0
        if entry["ph"] == "M" and entry["name"] == "thread_name":
            assert entry["tid"] not in names
            names[entry["tid"]] = entry["args"]["name"]
        if entry["ph"] == "X":
            assert entry["dur"] >= 0
            events.setdefault(entry["tid"], []).append(entry)
    assert set(events) <= set(names)
    assert len(set(names.values())) == len(names)
    for track in events.values():
        ends = []
        for event in track:  # in order of begin, the longer first
            end = event["ts"] + event["dur"]
            while ends and ends[-1] <= event["ts"] + 1e-6:
                ends.pop()
            assert not ends or end <= ends[-1] + 1e-6, "neither apart nor nested"
            ends.append(end)
    return {names[tid]: track for tid, track in events.items()}


def test_a_trace_has_lanes_predictor_layers_and_stalls(model, tmp_path):
    model.sida.start_trace()
    run(model)
    events = model.sida.take_trace()
    write_chrome_trace(events, tmp_path / "trace.json")
    tracks = check_format(tmp_path / "trace.json")
    assert next(iter(tracks)) == "predictor"
    assert len(tracks["predictor"]) == 6
    assert any(name.startswith("lane ") for name in tracks)
    kinds = {event["cat"] for event in tracks["compute"]}
    assert "compute" in kinds <= {"compute", "stall"}
    computed = [event for event in tracks["compute"] if event["cat"] == "compute"]
    assert {event["name"].split(",")[0] for event in computed} == set(LAYERS)
    copies = [event for name, track in tracks.items() if name.startswith("lane") for event in track]
    assert len(copies) == sum(event.kind == "copy" for event in events) > 0
    assert sum(map(len, tracks.values())) == len(events)
    assert len({event["args"]["batch"] for event in computed}) == 6
    draw([("a run", events)], tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.json", "trace.png"]


def test_events_of_two_threads_in_one_row_go_to_two_tracks(tmp_path):
    events = [
        Event("compute", "compute", "a", 0, 100),
        Event("compute", "compute", "inside a", 10, 90),
        Event("compute", "compute", "across", 50, 150),
        Event("compute", "compute", "after a", 100, 120),
        Event("stall", "compute", "in across", 60, 70),
        Event("copy", "lane 0", "c", 5, 5),
    ]
    write_chrome_trace(events, tmp_path / "trace.json")
    tracks = {name: [event["name"] for event in track] for name, track in check_format(tmp_path / "trace.json").items()}
    assert tracks == {
        "compute": ["a", "inside a", "in across", "after a"],
        "compute 2": ["across"],
        "lane 0": ["c"],
    }
    write_chrome_trace([], tmp_path / "empty.json")
    assert check_format(tmp_path / "empty.json") == {}


def ranges(profile):
    return {event.key: event.count for event in profile.key_averages()}


def test_the_profiler_shows_demands_kernels_and_predictions(folder, model):
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad():
        with torch.profiler.profile(activities=kinds) as profile:
            model(**batches(1)[0])
        found = ranges(profile)
        assert found["sida::moe_layer"] == 2
        assert found["sida::moe_ffn"] >= 2  # a wave each at least
        assert found["sida::demand"] >= 4  # each wave, and the answer that there is none left
        assert "sida::predict" not in found
        predicted = sida_ext.from_pretrained(folder, expert_memory="25%", routing="predicted", predictor=ByToken())
        with torch.profiler.profile(activities=kinds) as profile:
            predicted(**batches(1)[0])
        assert ranges(profile)["sida::predict"] == 1
        predicted.sida.close()


def test_the_profiler_shows_the_predictions_of_the_hash_building_thread(model):
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def given():  # taken by the hash-building thread, which alone is profiled
        with profile:
            yield from batches(3)

    assert len(list(sida_ext.stream(model, given()))) == 3
    assert ranges(profile)["sida::predict"] == 3
    assert "sida::moe_ffn" not in ranges(profile)
