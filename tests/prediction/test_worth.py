"""When predicting rests because it takes longer than it saves."""

from __future__ import annotations

import time

import pytest
import torch

import sida_ext
from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.worth import ENOUGH, PredictionWorth
from tests.support.families import tiny_model


def judged(worth, now, cost, saved, seconds=1.0, batches=1):
    for _ in range(batches):
        worth.observe(now, cost, saved, seconds)


def test_nothing_is_decided_before_some_time_was_spent():
    worth = PredictionWorth()
    judged(worth, 0.0, 0.4 * ENOUGH, 0.0, 0.1, batches=2)
    assert worth.may(0.0)
    judged(worth, 0.0, 0.4 * ENOUGH, 0.0, 0.1)
    assert worth.resting
    assert not worth.may(9.9)
    assert worth.may(10.0)


def test_what_saves_more_than_it_takes_goes_on_and_so_does_what_takes_next_to_nothing():
    worth = PredictionWorth()
    judged(worth, 0.0, 0.06, 0.07, batches=5)
    judged(worth, 0.0, 0.06, 0.0, seconds=7.0, batches=5)
    assert worth.may(0.0)


def test_a_rest_keeps_attempts_to_their_share_of_the_time_and_doubles():
    worth = PredictionWorth(loss=0.02, rest=10.0, longest_rest=300.0)
    judged(worth, 0.0, 1.0, 0.5)
    assert not worth.may(49.9)  # a second of them is 2 % of fifty
    assert worth.may(50.0)
    judged(worth, 40.0, 1.0, 0.0)  # was under way when the rest began
    assert worth.may(50.0)
    judged(worth, 50.0, 0.06, 0.0)
    assert not worth.may(69.9)
    assert worth.may(70.0)
    judged(worth, 70.0, 0.06, 0.1)
    assert not worth.resting
    judged(worth, 71.0, 0.06, 0.0)
    assert worth.may(81.0), "the first rest again, after an attempt that was worth it"
    judged(worth, 100.0, 100.0, 0.0)
    assert worth.may(400.0), "never longer than the longest"


class Slow:
    """Right, and slower than the model."""

    def __init__(self, experts: int, layers: int, chosen: int) -> None:
        self.shape, self.experts, self.asked = (layers, chosen), experts, 0

    def predict(self, input_ids, attention_mask=None, top_k=1):
        self.asked += 1
        time.sleep(0.04)
        index = torch.arange(self.shape[1]).expand(*input_ids.shape, *self.shape).int()
        return HashTable(index, torch.ones(index.shape), torch.ones(index.shape))


@pytest.fixture
def served():
    _, model = tiny_model("olmoe")
    model = sida_ext.swap_experts(model, expert_memory="50%", expert_dtype="float32")
    yield model
    model.sida.close()


def batches(count):
    return [
        {"input_ids": torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(n))} for n in range(count)
    ]


def test_a_predictor_that_keeps_the_model_waiting_is_left_out_and_the_outputs_are_the_same(served):
    given = batches(12)
    expected = [output.logits for output in sida_ext.stream(served, given)]
    layers = len(served.sida.header.layers)
    slow = Slow(served.sida.header.num_experts, layers, 2)
    found = [output.logits for output in sida_ext.stream(served, given, slow, drift=False)]
    assert all(map(torch.equal, found, expected))
    assert not served.sida.stats().announcing.worth
    assert slow.asked < 12
    again = slow.asked
    found = [output.logits for output in sida_ext.stream(served, given, slow, drift=False)]
    assert all(map(torch.equal, found, expected))
    assert slow.asked == again, "it rests from stream to stream"
    for _ in sida_ext.stream(served, given, slow, drift=False, waste_cost=0):
        pass
    assert slow.asked == again + 12, "not judged"


def test_prompts_of_generate_are_judged_too(served):
    slow = Slow(served.sida.header.num_experts, len(served.sida.header.layers), 2)
    served.sida.predictor = slow
    with torch.no_grad():
        for batch in batches(6):
            served(**batch)
    assert slow.asked == 2
    assert not served.sida.stats().announcing.worth
