"""Replicas on Ray, on one machine: routing, a death, a new replica's warming up, scaling down. One start of Ray."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sida_ext[ray]'")

import sida_ext
from sida_ext.serving.model import ServedModel
from tests.support.cluster import Application, cluster
from tests.support.tiny_models import tiny_tokenizer
from tests.support.two_domains import save_two_domains, texts_of_two_domains

pytestmark = pytest.mark.check

COMMON = {"expert_memory": "40%", "report_seconds": "0.2", "replicas": "2", "drain": "20"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("two_domains")
    save_two_domains(made)
    return made


@pytest.fixture(scope="module")
def applications(folder):
    """Ours, and the same with Ray's own routing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {**COMMON, "model": str(folder), "predictor": str(folder / "table"), "name": "two"}
    with cluster(port):
        yield Application(port, "ours", **given), Application(port, "default", **given, imbalance="0")


def rise(before, after, name):
    """By replica, what was added."""
    return {replica: value - before[name].get(replica, 0.0) for replica, value in after[name].items()}


def test_two_domains_read_less_and_no_replica_is_overloaded(applications, folder):
    texts = texts_of_two_domains(300, seed=1)
    read, answers = {}, {}
    for application in applications:
        application.load(texts_of_two_domains(60, seed=2), clients=2)  # no memory is empty any more
        before = application.totals()
        statuses, answers[application.name] = application.load(texts, clients=2)
        assert statuses == {200: len(texts)}
        after = application.totals()
        read[application.name] = sum(rise(before, after, "read_bytes").values()) / len(texts)
        tokens = rise(before, after, "prompt_tokens")
        assert sum(tokens.values()) == 6 * len(texts)
        if application.name == "ours":
            assert max(tokens.values()) <= 1.5 * sum(tokens.values()) / len(tokens)
    assert read["ours"] <= 0.75 * read["default"], read
    assert answers["ours"] == answers["default"]
    time.sleep(1.0)  # every replica has reported by now
    assert applications[0].metrics()["read_bytes"] == applications[0].totals()["read_bytes"]

    model = sida_ext.from_pretrained(folder, expert_memory="100%")
    alone = ServedModel(model, tiny_tokenizer(), "two")
    for ids, answer in list(zip(texts, answers["ours"], strict=True))[:40]:
        assert list(answer["data"][0]["logits"].values()) == alone.classify([ids])[0]
    model.sida.close()


def test_a_replica_that_is_killed_loses_no_request_and_comes_back_empty_and_warms_up(applications):
    ours = applications[0]
    ours.wait_replicas(2)
    done = {}
    for attempt in range(8):  # until one dies with a request in its hands
        retries = ours.retries
        texts = [ids * 40 for ids in texts_of_two_domains(400, seed=10 + attempt, tokens=3)]
        busy = threading.Event()
        load = threading.Thread(target=lambda texts=texts, busy=busy: done.update(found=ours.load(texts, 16, busy)))
        load.start()
        assert busy.wait(60)
        dead = ours.kill_one()
        load.join()
        statuses, answers = done["found"]
        assert statuses == {200: len(texts)}
        assert all(answer["data"] for answer in answers)
        if ours.retries > retries:
            break
        ours.wait_replicas(2)
    else:
        raise AssertionError("no request was sent again")

    ours.wait_replicas(2)
    before = ours.totals()
    (new,) = [
        name for name in before["hits"] if name != dead and before["wanted"][name] < max(before["wanted"].values())
    ]
    rates = []
    for part in range(3):
        assert ours.load(texts_of_two_domains(150, seed=20 + part), clients=2)[0] == {200: 150}
        after = ours.totals()
        assert rise(before, after, "wanted")[new] > 0, "the new replica gets no requests"
        rates.append(rise(before, after, "hits")[new] / rise(before, after, "wanted")[new])
        before = after
    assert rates[-1] > rates[0], rates
    assert 0 < before["memory_used"][new] <= before["memory_budget"][new]


def test_scaling_down_loses_no_request(applications):
    """Everything is replaced one by one meanwhile, the ingress too: its counter begins anew."""
    ours = applications[0]
    ours.wait_replicas(2)
    done = {}
    texts = [ids * 20 for ids in texts_of_two_domains(600, seed=30, tokens=3)]
    retries = {ours.retries}
    busy = threading.Event()
    load = threading.Thread(target=lambda: done.update(found=ours.load(texts, 8, busy)))
    load.start()
    assert busy.wait(60)
    scaling = threading.Thread(target=ours.deploy, kwargs={"replicas": "1"})
    scaling.start()
    expected = {*retries, 0.0}
    while scaling.is_alive() or load.is_alive():
        retries.add(ours.retries)
        time.sleep(0.3)
    assert done["found"][0] == {200: len(texts)}
    ours.wait_replicas(1)
    assert retries <= expected  # replicas ended when their requests had; none was cut off


def lines_of_two_domains(count: int, seed: int) -> list[str]:
    """Texts of six signs, each of which is one token, all of one domain."""
    draw = random.Random(seed)
    signs: tuple[list[str], list[str]] = ([], [])
    for sign, number in tiny_tokenizer().get_vocab().items():
        if len(sign) == 1 and (sign.isupper() or sign.isdigit()) and sign.isascii():
            signs[number % 2].append(sign)
    return ["".join(draw.choices(signs[draw.randrange(2)], k=6)) for _ in range(count)]


def test_a_batch_run_keeps_the_order_and_reads_less_when_it_is_grouped(applications, folder, monkeypatch):
    from sida_ext.serving import cluster_batch

    lines = lines_of_two_domains(240, seed=4)
    arguments = cluster_batch.BatchArguments(
        str(folder), {"expert_memory": "40%", "lanes": 1}, str(folder / "table"), max_length=64
    )
    grouped = cluster_batch.run_batch(arguments, lines, replicas=2)
    monkeypatch.setattr(cluster_batch, "by_experts", lambda wanted: list(range(len(wanted))))
    given = cluster_batch.run_batch(arguments, lines, replicas=2)
    assert grouped.rows == given.rows
    assert grouped.tokens == given.tokens == 6 * len(lines)
    assert grouped.read_bytes <= 0.75 * given.read_bytes

    model = sida_ext.from_pretrained(folder, expert_memory="100%")
    alone = ServedModel(model, tiny_tokenizer(), "two")
    for line, row in list(zip(lines, grouped.rows, strict=True))[:40]:
        assert row["logits"] == alone.classify([tiny_tokenizer()(line)["input_ids"]])[0]
    model.sida.close()
