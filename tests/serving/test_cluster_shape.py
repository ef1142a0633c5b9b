"""What a cluster is asked for, before anything starts."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sida_ext[ray]'")

from sida_ext.serving import cluster
from sida_ext.serving.cluster import Shape
from sida_ext.serving.replica import ReplicaArguments


@pytest.mark.parametrize(("text", "found"), [("2", (2, 2)), (3, (3, 3)), ("1-4", (1, 4))])
def test_a_number_of_replicas_or_a_range(text, found):
    assert Shape(replicas=text).range == found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": "0"}, "replicas is '0', expected a number of at least 1, or two such as '1-4'"),
        ({"replicas": "4-1"}, "replicas is '4-1'"),
        ({"replicas": "1-2-3"}, "replicas is '1-2-3'"),
        ({"replicas": "many"}, "replicas is 'many'"),
        ({"cpus": 0.0}, "cpus is 0.0, expected more than 0"),
        ({"imbalance": 0.5}, "imbalance is 0.5, expected at least 1, or 0 for Ray's own routing"),
        ({"report_seconds": 0.0}, "report_seconds is 0.0"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Shape(**wrong)


def test_a_cluster_that_is_too_small_is_an_error_and_no_wait():
    with pytest.raises(ValueError, match="4 replicas of 2 CPU need 8; the Ray cluster has 6"):
        cluster._check_room(Shape(replicas="4-8", cpus=2.0), {"CPU": 6.0})
    cluster._check_room(Shape(replicas=3, cpus=2.0), {"CPU": 6.0})


def test_arguments_of_serve_run_reach_their_places(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "application", lambda *made: made)
    arguments, shape, settings = cluster.app(
        {
            "model": str(tmp_path),
            "replicas": "1-3",
            "cpus": "2.5",
            "rows": "4",
            "drain": "5",
            "context": "128",
            "expert_memory": "1GiB",
            "expert_dtype": "int8",
            "lanes": "3",
            "confidence": "0.5",
            "populate": "false",
        }
    )
    assert (shape.range, shape.cpus, settings.drain) == ((1, 3), 2.5, 5.0)
    assert (arguments.limits.rows, arguments.drain, arguments.context) == (4, 5.0, 128)
    assert arguments.options == {
        "expert_memory": "1GiB",
        "expert_dtype": "int8",
        "lanes": 3,
        "confidence": 0.5,
        "populate": False,
    }
    assert arguments.name == tmp_path.name  # no path of the machine


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "there is no model"),
        ({"model": "x", "replica": "2"}, "replica: not known here, expected some of"),
        ({"model": "x", "rows": "few"}, "rows is 'few', expected a number"),
        ({"model": "m", "lanes": "many"}, "lanes is 'many', expected a number"),
        ({"model": "m", "populate": "perhaps"}, "populate is 'perhaps', expected true or false"),
    ],
)
def test_wrong_arguments_of_serve_run_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        cluster.app(given)


def test_files_are_named_by_their_whole_path_and_hub_ids_are_left(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    made = ReplicaArguments("model", "m", predictor="model", options={"store": "model", "expert_memory": "25%"})
    assert made.model == made.predictor == made.options["store"] == os.path.join(tmp_path.resolve(), "model")
    assert ReplicaArguments("Qwen/Qwen3-30B-A3B", "m").model == "Qwen/Qwen3-30B-A3B"


def test_options_that_mean_nothing_on_a_cluster_are_refused(tmp_path):
    from sida_ext.cli import app

    texts = tmp_path / "texts.txt"
    texts.write_text("a\n")
    for option, value in (("--batch-size", "4"), ("--order", "overlap"), ("--lookahead", "2")):
        with pytest.raises(ValueError, match=f"{option} is {value} with --ray"):
            app(["run", str(tmp_path), str(texts), "--ray", option, value], standalone_mode=False)
