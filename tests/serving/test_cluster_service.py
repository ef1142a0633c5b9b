"""An ingress without Ray's processes: what it does when replicas die under a request, differ, or do not come."""

from __future__ import annotations

import asyncio
import threading

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sida_ext[ray]'")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from sida_ext.serving.driver import Work
from sida_ext.serving.generation import Delta, Sampling
from sida_ext.serving.model import ModelFacts
from sida_ext.serving.protocol import RequestError
from sida_ext.serving.replica import ReplicaArguments
from sida_ext.serving.settings import ServerSettings

STEPS = [
    [(0, Delta("a", 1)), (1, Delta("x", 1))],
    [(0, Delta("b", 1)), (1, Delta("y", 1, finish="stop"))],
    [(0, Delta("c", 1, finish="length"))],
]


class Call:
    """A replica's stream of answers: after ``steps`` of them what ``end`` is raised, if any."""

    def __init__(self, steps, end=None, hangs=False):
        self.steps, self.end, self.hangs, self.cancelled = list(steps), end, hangs, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if self.steps:
            return self.steps.pop(0)
        if self.hangs:
            await asyncio.sleep(3600)
        if self.end is not None:
            raise self.end
        raise StopAsyncIteration

    def cancel(self):
        self.cancelled = True


class Handle:
    """Gives one call after the other, and keeps what it was asked."""

    def __init__(self, *calls):
        self.calls, self.asked = list(calls), []
        self.compute = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, *asked):
        self.asked.append(asked)
        call = self.calls[len(self.asked) - 1]
        if isinstance(call, Exception):
            raise call
        return call


class Client:
    """A request whose client stays."""

    async def receive(self):
        await asyncio.sleep(3600)


class Predictor:
    """Names experts 1 and 2, and in which thread it was asked."""

    def __init__(self):
        self.asked = []

    def predict(self, ids):
        import torch

        from sida_ext import HashTable

        self.asked.append((ids.tolist(), threading.current_thread().name))
        index = torch.tensor([[[[1], [2]]] * ids.shape[1]])
        return HashTable(index, torch.ones(index.shape))


def answered(handle, work=None, deadline=30.0, predictor=None):
    """(row, text or error) in the order in which they came, and the service."""
    from sida_ext.serving.cluster_service import ClusterService

    async def all_of_it():
        service = ClusterService(
            ReplicaArguments("model", "model"), ServerSettings(), "app", lambda: handle, attempts=3
        )
        service._handle, service._predictor = handle, predictor
        service._facts = ModelFacts(
            name="model", created=0, context=64, vocabulary=100, generates=True, classifies=False, seq2seq=False,
            labels=[], layers=2, experts=4,
        )  # fmt: skip
        rows = work or [Work("generate", [5, 6], Sampling(3)), Work("generate", [5, 6], Sampling(3))]
        found = []
        try:
            async with service.run(Client(), rows, deadline) as answers:
                async for row, answer in answers.each():
                    found.append((row, answer.text))
        except RequestError as problem:
            found.append(problem)
        return found, service

    return asyncio.run(all_of_it())


WHOLE = [(0, "a"), (1, "x"), (0, "b"), (1, "y"), (0, "c")]


@pytest.mark.parametrize("told", range(len(STEPS)))
def test_a_request_goes_on_where_it_broke_off_when_its_replica_dies(told):
    handle = Handle(Call(STEPS[:told], ActorDiedError()), Call(STEPS))
    found, service = answered(handle)
    assert found == WHOLE
    assert service.metrics.retries._value.get() == 1
    assert all(call.cancelled for call in handle.calls)


def test_a_second_replica_that_answers_otherwise_is_an_error_and_no_mixture():
    other = [[(0, Delta("z", 1)), (1, Delta("x", 1))], *STEPS[1:]]
    found, _ = answered(Handle(Call(STEPS[:2], ActorDiedError()), Call(other)))
    assert found[:-1] == WHOLE[:4]
    assert (found[-1].status, found[-1].code) == (500, "replicas_differ")


def test_after_some_replicas_the_request_ends_with_an_error():
    found, service = answered(Handle(*(Call([], ActorDiedError()) for _ in range(3))))
    assert [(error.status, error.code) for error in found] == [(503, "replicas_died")]
    assert "3 replicas died" in found[0].message
    assert service.metrics.retries._value.get() == 3


def test_a_deadline_ends_what_no_replica_answers():
    call = Call(STEPS[:1], hangs=True)
    found, _ = answered(Handle(call), deadline=0.2)
    assert found[:2] == WHOLE[:2]
    assert (found[2].status, found[2].code) == (504, "deadline")
    assert call.cancelled


def test_a_full_queue_is_429():
    found, _ = answered(Handle(BackPressureError(num_queued_requests=1, max_queued_requests=1)))
    assert (found[0].status, found[0].retry_after) == (429, 1)


def test_an_error_of_the_replicas_own_reaches_the_client_as_it_was():
    problem = RequestError(400, "too long", "prompt", "too_long")
    found, _ = answered(Handle(Call([[(0, problem)]])))
    assert found == [problem]


def test_experts_are_predicted_once_for_each_prompt_and_travel_along():
    predictor = Predictor()
    handle = Handle(Call(STEPS[:1], ActorDiedError()), Call(STEPS))
    answered(handle, predictor=predictor)
    assert [ids for ids, _ in predictor.asked] == [[[5, 6]]]
    assert predictor.asked[0][1] != threading.main_thread().name  # not in the event loop
    for routed, work, seconds, _ in handle.asked:
        assert routed.wanted == (1 << 1) | (1 << (4 + 2))
        assert routed.weight == 2 * (2 + 3)
        assert [row.experts for row in work] == [frozenset({(0, 1), (1, 2)})] * 2
        assert 0 < seconds <= 30


def test_a_request_error_survives_the_way_between_processes():
    import pickle

    problem = RequestError(429, "full", "n", "queue_full", retry_after=7)
    again = pickle.loads(pickle.dumps(problem))
    assert again.body() == problem.body()
    assert (again.status, again.retry_after) == (429, 7)
