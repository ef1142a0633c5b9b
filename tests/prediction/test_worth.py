"""When predicting rests because it takes longer than it saves."""

from __future__ import annotations

import time

import pytest
import torch

import sida_ext
from sida_ext.prediction.announcing import AnnouncingState
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.worth import ENOUGH, LONGEST, TRIED, PredictionWorth
from tests.support.families import tiny_model

BY_TURNS = ("0" * (TRIED // 2) + "1" * (TRIED // 2)) * 2


class Clocked:
    """Batches of 100 tokens, one after the other: predicted ones take ``on`` seconds, the others ``off``."""

    def __init__(self, on: float, off: float, predicting: float = 0.1, **options: float) -> None:
        self.worth, self.now = PredictionWorth(**options), 0.0
        self.on, self.off, self.predicting = on, off, predicting

    def run(self, batches: int) -> str:
        """``1`` for each batch that was predicted, ``0`` for each that was not."""
        done = ""
        for _ in range(batches):
            predicts = self.worth.may(self.now)
            seconds = self.on if predicts else self.off
            self.now += seconds
            self.worth.observe(self.now, seconds, 100, self.predicting if predicts else None)
            done += "1" if predicts else "0"
        return done


def test_what_takes_next_to_nothing_is_never_in_question():
    assert Clocked(on=9.0, off=1.0, predicting=0.05).run(300) == "1" * 300


def test_what_is_slower_rests_and_each_rest_is_longer():
    clocked = Clocked(on=2.0, off=1.0, rest=10.0, loss=0.5)
    assert clocked.run(TRIED) == "1" * TRIED
    assert clocked.run(2 * TRIED) == BY_TURNS  # and without was faster
    assert clocked.worth.state == "resting"
    assert clocked.run(10) == "0" * 10
    assert clocked.run(2 * TRIED) == BY_TURNS  # tries again
    assert clocked.run(20 + 2 * TRIED) == "0" * 20 + BY_TURNS


def test_the_less_they_differ_the_longer_they_are_compared():
    clocked = Clocked(on=1.1, off=1.0)
    assert clocked.run(TRIED * (1 + 2 * LONGEST)) == "1" * TRIED + BY_TURNS * LONGEST
    assert clocked.worth.state == "resting"


@pytest.mark.parametrize(("on", "ends"), [(1.1, "resting"), (0.9, "on")])
def test_a_machine_whose_speed_changes_does_not_decide(on, ends):
    """Its own speed changes by more than the two ways differ, once in the course of the trial."""
    for change in range(1, TRIED * 2 * LONGEST):
        for factor in (1.6, 1 / 1.6):
            clocked = Clocked(on=on, off=1.0)
            clocked.run(TRIED + change)
            clocked.on, clocked.off = clocked.on * factor, clocked.off * factor
            clocked.run(TRIED * 2 * LONGEST - change)
            assert clocked.worth.state == ends, (change, factor)


@pytest.mark.parametrize(("cost", "saved", "ends"), [(0.3, 0.1, "resting"), (0.1, 0.3, "on")])
@pytest.mark.parametrize("ahead", [1, 2, 4, 7])
def test_what_predicting_costs_those_before_is_not_taken_for_theirs(ahead, cost, saved, ends):
    """Batches are predicted ``ahead`` of the one that is computed, which their predictions slow down."""
    worth = PredictionWorth(rest=1e9, longest_rest=1e9)
    worth.ahead = ahead
    now, queue = 0.0, [worth.may(0.0) for _ in range(ahead)]
    for _ in range(40 * (ahead + TRIED)):
        beside = worth.may(now)  # while the first of the queue is computed
        queue.append(beside)
        predicted = queue.pop(0)
        seconds = 1.0 + cost * beside - saved * predicted
        now += seconds
        worth.observe(now, seconds, 100, 0.1 if predicted else None)
    assert worth.state == ends


def test_attempts_take_no_more_than_their_share_of_the_time():
    clocked = Clocked(on=2.0, off=1.0)
    done = clocked.run(3000)
    assert done.count("1") <= 0.03 * 3000
    assert done.count("1") > TRIED


def test_what_is_faster_goes_on_and_is_tried_without_seldom():
    clocked = Clocked(on=1.0, off=1.5)
    done = clocked.run(3000)
    assert done.startswith("1" * TRIED + BY_TURNS + "1" * 150)
    assert done.count("0") <= 0.03 * 3000


def test_what_becomes_worth_it_is_found_out():
    clocked = Clocked(on=2.0, off=1.0)
    clocked.run(100)
    clocked.on = 0.5
    clocked.run(400)
    assert clocked.run(200).count("0") <= TRIED  # of a trial


def test_after_a_rest_in_which_nothing_ran_it_is_compared_anew():
    clocked = Clocked(on=2.0, off=1.0)
    assert clocked.run(3 * TRIED) == "1" * TRIED + BY_TURNS
    clocked.now += 1000.0
    clocked.on = 0.5
    assert clocked.run(2 * TRIED) == BY_TURNS
    assert clocked.run(20) == "1" * 20


def test_nothing_is_tried_before_some_time_was_spent():
    clocked = Clocked(on=0.002, off=0.001, predicting=0.001)
    assert clocked.run(int(ENOUGH / 0.001) - 1).count("0") == 0
    assert clocked.run(10).count("0") > 0


class Slow:
    """Takes longer than the model."""

    def __init__(self, layers: int, chosen: int) -> None:
        self.shape, self.asked = (layers, chosen), 0

    def predict(self, input_ids, attention_mask=None, top_k=1):
        self.asked += 1
        time.sleep(0.3)
        index = torch.arange(self.shape[1]).expand(*input_ids.shape, *self.shape).int()
        return HashTable(index, torch.ones(index.shape), torch.ones(index.shape))


@pytest.fixture
def served():
    _, model = tiny_model("olmoe")
    model = sida_ext.swap_experts(model, expert_memory="50%", expert_dtype="float32")
    yield model
    model.sida.close()


def batches(count):
    random = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 128, (2, 12), generator=random)} for _ in range(count)]


def test_a_predictor_that_keeps_the_model_waiting_is_left_out_and_the_outputs_are_the_same(served):
    given = batches(24)
    expected = [output.logits for output in sida_ext.stream(served, given)]
    slow = Slow(len(served.sida.header.layers), 2)
    found = [output.logits for output in sida_ext.stream(served, given, slow, drift=False)]
    assert all(map(torch.equal, found, expected))
    assert served.sida.stats().announcing.worth == "resting"
    assert slow.asked < 20
    again = slow.asked
    found = [output.logits for output in sida_ext.stream(served, given, slow, drift=False)]
    assert all(map(torch.equal, found, expected))
    assert slow.asked == again, "it rests from stream to stream"
    for _ in sida_ext.stream(served, given, slow, drift=False, waste_cost=0):
        pass
    assert slow.asked == again + 24, "not judged"


def test_prompts_that_nothing_is_announced_of_for_another_reason_are_compared_with_nothing(served, monkeypatch):
    served.sida.predictor = Slow(len(served.sida.header.layers), 2)
    done = []
    monkeypatch.setattr(AnnouncingState, "done", lambda self, seconds, tokens, predicting: done.append(predicting))
    monkeypatch.setattr(AnnouncingState, "room", lambda self, most: 0)  # the guards rest
    with torch.no_grad():
        served(**batches(1)[0])
        assert done == []
        monkeypatch.setattr(AnnouncingState, "may_predict", lambda self: False)
        served(**batches(1)[0])
    assert done == [None]


def test_prompts_of_generate_are_judged_too(served):
    served.sida.predictor = slow = Slow(len(served.sida.header.layers), 2)
    with torch.no_grad():
        for batch in batches(12):
            served(**batch)
    assert slow.asked == 2 * TRIED
    assert served.sida.stats().announcing.worth == "resting"
