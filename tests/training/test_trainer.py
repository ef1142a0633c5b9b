"""A training run says what it will take, and leaves a predictor that serves before it ends."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch

from sida_ext.prediction.hash_predictor import HashPredictor
from sida_ext.progress import progress_bar
from sida_ext.training import trainer as trainer_module
from sida_ext.training.distill import train_predictor
from sida_ext.training.split import TRAIN, VALIDATION, SplitPart
from sida_ext.training.traces import TraceStore, collect_traces
from sida_ext.training.trainer import Trainer
from tests.training.test_distill import QUICK, small_model, some_texts, tokenized_batches, tokenizer


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def trainer(model, tmp_path):
    def made(options):
        store = TraceStore(tmp_path / "traces", {})
        if not store.complete:
            list(store.extend(collect_traces(model, tokenized_batches(tokenizer, some_texts(300)))))
        parts = (SplitPart(store, options, part) for part in (TRAIN, VALIDATION))
        return Trainer(HashPredictor.for_model(model), *parts, options, tmp_path / "checkpoint")

    return made


def test_what_a_run_will_take_is_said_after_its_first_steps(model, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sida_ext"):
        train_predictor(model, tokenizer, some_texts(300), tmp_path, QUICK, progress=False)
    said = [record.getMessage() for record in caplog.records if "a step" in record.getMessage()]
    assert len(said) == 1
    ends = [record.getMessage() for record in caplog.records if "ended with" in record.getMessage()]
    assert ends == ["training: ended with pass 3 of at most 3: all passes are done"]
    assert re.search(
        r"\d+ steps in a pass, at most 3 passes; \d+\.\d\d s a step: the end is at .*\(in \d+ s\)", said[0]
    )


def test_a_limit_of_time_says_how_many_steps_fit(trainer):
    run = trainer(replace(QUICK, seconds=60.0))
    steps = run.steps_per_epoch * QUICK.epochs
    assert f"{60 // 4} of {steps} steps fit in the time given" in run.plan(4.0)
    assert "fit" not in run.plan(0.01)
    run.step = 5  # steps are counted from the run's first, as the progress bar counts them
    assert f"{5 + 60 // 4} of {steps} steps fit in the time given" in run.plan(4.0)
    run.step = 0
    assert "(in 2 min)" in trainer(QUICK).plan(100 / steps)
    assert re.search(r"\(in 2\.0 h\)", trainer(QUICK).plan(7200 / steps))


def test_why_a_run_ended_is_said(trainer):
    run = trainer(replace(QUICK, seconds=60.0, patience=2))
    assert run._ended() is None
    run.seconds = 60.5
    assert run._ended() == "the time given, 60 s, is over"
    run.step = 1  # within a pass
    assert run._ended() is None
    run.step, run.seconds = 0, 1.0
    run.history = [{"validation_loss": loss} for loss in (2.0, 1.0, 1.1, 1.2)]
    assert run._ended() == "held-out text has not improved for 2 passes"


def test_a_bar_that_ends_early_is_full():
    with progress_bar("training", 60) as bar:
        bar.advance(5)
        bar.finish()
        (task,) = bar._progress.tasks
        assert (task.completed, task.total) == (5, 5)


def test_a_run_of_few_steps_does_not_spend_them_all_on_warming_up(trainer, monkeypatch):
    """100 steps to warm up are those of a long run; where 30 fit in the time, 3."""
    run = trainer(replace(QUICK, seconds=30.0, warmup=100))
    for second in range(11):
        run._say_plan(float(second))
    assert run._warmup == 3
    long = trainer(replace(QUICK, seconds=3000.0, warmup=100))
    for second in range(11):
        long._say_plan(float(second))
    assert long._warmup == 100


def test_the_best_so_far_can_be_served_with_before_the_end(model, tmp_path, monkeypatch):
    """After a pass; what ``out`` itself holds stays until the new one is complete."""
    learn, steps = Trainer._learn, []

    def interrupted(self, trace):
        steps.append(None)
        if self.epoch == 1 and self.step == 1:
            raise RuntimeError("the machine was needed")
        return learn(self, trace)

    monkeypatch.setattr(Trainer, "_learn", interrupted)
    with pytest.raises(RuntimeError, match="the machine was needed"):
        train_predictor(model, tokenizer, some_texts(300), tmp_path, QUICK, progress=False)
    assert not (tmp_path / "predictor.safetensors").exists()
    early = HashPredictor.from_pretrained(tmp_path / "training" / "early", model)
    assert early.predict(torch.tensor([[3, 4]])).expert_index.shape == (1, 2, 2, 1)


def test_a_long_first_pass_leaves_a_predictor_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "EARLY_SECONDS", 0.0)
    learn = Trainer._learn

    def interrupted(self, trace):
        if self.step == 3:
            raise RuntimeError("the machine was needed")
        return learn(self, trace)

    monkeypatch.setattr(Trainer, "_learn", interrupted)
    with pytest.raises(RuntimeError, match="the machine was needed"):
        train_predictor(model, tokenizer, some_texts(300), tmp_path, QUICK, progress=False)
    HashPredictor.from_pretrained(tmp_path / "training" / "early", model)
