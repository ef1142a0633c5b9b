"""The one command over three models: what it runs, and the table that it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.causal import models
from bench.causal.prompts import never_wanted
from examples import train_demo_language_model
from sida_ext.planning.hit_rates import Routing


def test_the_trained_models_differ_in_family_depth_experts_and_choices(tmp_path):
    shapes = []
    for name in ("few", "domains"):
        (command,) = models.commands("train", name, tmp_path, False)
        assert command[0] == "examples.train_demo_language_model"
        given = train_demo_language_model.parse(command[1:])
        assert (given.work, given.out) == (tmp_path / name, tmp_path / name / "model")
        assert not given.resume
        shapes.append((given.family, given.layers, given.experts, given.top_k, given.information > 0))
    assert shapes == [("qwen3_moe", 4, 16, 3, False), ("olmoe", 5, 64, 2, True)]


def test_an_interrupted_training_goes_on(tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "last.pt").write_bytes(b"")
    (command,) = models.commands("train", "few", tmp_path, False)
    assert train_demo_language_model.parse(command[1:]).resume


def test_the_bundled_model_is_not_trained_but_fitted_and_measured():
    assert list(models.commands("train", "bundled", Path("out"), False)) == []
    (fit,) = models.commands("fit", "bundled", Path("out"), False)
    assert str(train_demo_language_model.DEMO_LANGUAGE_MODEL) in fit
    measured = [command[0] for command in models.commands("measure", "bundled", Path("out"), False)]
    assert measured == ["bench.causal.prompts"] * 2 + ["bench.causal.lookahead", "bench.causal.overlap"]
    engine = list(models.commands("measure", "bundled", Path("out"), True))
    assert all("--engine" in command for command in engine)
    assert ["--delay" in command for command in engine] == [False, True]


def test_the_table_says_how_many_fewer_are_missed():
    row = {"among_k": [0.5, 0.7], "among_2k": [0.8, 0.8], "mean_ece": 0.01}
    better = {"among_k": [0.75, 0.85], "among_2k": [0.9, 0.9], "mean_ece": 0.007}
    said = models.coverage({"held_out": {"token_table": row, "predictor": better}}).splitlines()
    assert said[0] == "| token table | 50.0, 70.0 | 60.0% | 80.0, 80.0 | 80.0% | 0.010 |"
    assert said[2] == "missed among_k: 50% fewer than the token table"
    assert said[3] == "missed among_2k: 50% fewer than the token table"


@pytest.mark.parametrize("wanted", [[1, 4], [0, 1, 2, 3, 4, 5]])
def test_what_is_always_wrong_names_nothing_that_is_wanted(wanted):
    (table,) = never_wanted(Routing(1, 7, [[(0, wanted)]], []))
    ((layer, named),) = table
    assert layer == 0
    assert not set(named) & set(wanted)
    assert len(named) == len(set(named)) == min(len(wanted), 7 - len(wanted))
