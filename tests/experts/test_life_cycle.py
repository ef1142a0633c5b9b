"""Faults and ends: failing reads, dying lanes, deadlines, Ctrl-C, fork, exit. Each ends in bounded time, and the next
batch is served."""

from __future__ import annotations

import copy
import gc
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from transformers import SwitchTransformersEncoderModel

import sida_ext
from sida_ext import _C, StoreError
from tests.support.predictors import ByToken
from tests.support.reference import build, small_config

BATCH = {"input_ids": torch.arange(2, 34).reshape(2, 16)}


def load(folder, **changes):
    return sida_ext.from_pretrained(folder, **{"expert_dtype": "float32", "expert_memory": "25%", **changes})


def compute(model):
    with torch.no_grad():
        return model(**BATCH).last_hidden_state


@pytest.fixture(scope="module")
def expected(folder):
    model = load(folder)
    out = compute(model)
    model.sida.close()
    return out


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ({"fail_every": 29}, OSError, r"\.sida"),
        ({"flip_every": 29}, StoreError, r"checksum.*pack|pack.*checksum|checksum"),
    ],
)
def test_a_failing_read_is_raised_and_the_next_batch_served(folder, expected, faults, error, message):
    model = load(folder, faults=_C.Faults(**faults))
    messages: list[str] = []
    successes = 0
    for _ in range(12):
        try:
            assert torch.equal(compute(model), expected)
            successes += 1
        except error as raised:
            messages.append(str(raised))
    failures = len(messages)
    assert failures
    for text in messages:
        assert re.search(message, text)
    assert successes
    assert model.sida.stats().failed_loads >= failures
    model.sida.close()


def test_short_reads_interrupts_and_a_slow_disk_change_nothing(folder, expected):
    faults = _C.Faults(seed=4, short_every=2, interrupt_every=3, delay_us_min=1000, delay_us_max=5000)
    model = load(folder, faults=faults)
    for _ in range(3):
        assert torch.equal(compute(model), expected)
    model.sida.close()


def test_a_dying_lane_is_an_error_not_a_hang(folder):
    model = load(folder, faults=_C.Faults(die_every=3), lanes=1, wait_deadline=20)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="lane"):
        [compute(model) for _ in range(10)]
    assert time.monotonic() - begin < 15
    model.sida.close()


def test_a_wait_has_a_deadline_and_says_what_it_waited_for(folder):
    model = load(folder, faults=_C.Faults(delay_us_min=3_000_000, delay_us_max=3_000_001), wait_deadline=1.0)
    with pytest.raises(TimeoutError, match=r"encoder\.block\.1\.layer\.1\.mlp"):
        compute(model)
    model.sida.close()


def test_truncated_while_open(folder, tmp_path):
    sida_ext.pack(folder, tmp_path / "experts.sida", "float32")
    model = load(folder, store=tmp_path / "experts.sida")
    compute(model)
    os.truncate(tmp_path / "experts.sida", 8192)
    with pytest.raises((StoreError, OSError), match=r"experts\.sida"):
        compute(model)
    model.sida.close()


@pytest.fixture
def no_cycle_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("made", ["loaded", "loaded with predicted routing", "swapped", "copied", "streamed half way"])
def test_a_dropped_model_closes_its_runtime_at_once(folder, no_cycle_collector, made):
    if made == "swapped":
        model = sida_ext.swap_experts(build(SwitchTransformersEncoderModel, small_config()), expert_memory="50%")
    elif made == "loaded with predicted routing":
        model = load(folder, routing="predicted", predictor=ByToken(1))
    else:
        model = load(folder, predictor=ByToken(1))
    compute(model)
    runtime = weakref.ref(model.sida)
    finalizer = model.sida._finalizer
    if made == "copied":
        twin = copy.deepcopy(model)
        del model
        assert finalizer.alive  # the copy shares the experts
        compute(twin)
        del twin
    elif made == "streamed half way":
        outputs = sida_ext.stream(model, [BATCH] * 5)
        next(outputs)
        del model, outputs
    else:
        del model
    assert runtime() is None
    assert not finalizer.alive


def test_a_method_that_outlives_its_model_says_so(folder):
    model = load(folder)
    train, copied = model.train, copy.deepcopy(model)
    model.sida.close()
    del model
    with pytest.raises(ReferenceError, match="model that is gone"):
        train(False)
    assert copied.train(False) is copied  # a copy's methods are its own


SCRIPT = """
import sys, threading, time, os, signal
import torch, sida_ext
from sida_ext import _C
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
batch = {"input_ids": torch.arange(2, 34).reshape(2, 16)}
def load(**changes):
    return sida_ext.from_pretrained(sys.argv[1], expert_dtype="float32", expert_memory="25%", **changes)
"""


def script(folder, body, **run):
    code = SCRIPT + body
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300, **run)


def test_ctrl_c_in_mid_batch(folder):
    done = script(
        folder,
        """
model = load(faults=_C.Faults(delay_us_min=20_000_000, delay_us_max=20_000_001))
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    model(**batch)
except KeyboardInterrupt:
    print("interrupted after", round(time.monotonic() - begin, 1))
model.sida.close()
print("closed after", round(time.monotonic() - begin, 1))
""",
    )
    assert done.returncode == 0, done.stderr
    assert "interrupted after" in done.stdout
    assert float(done.stdout.split("interrupted after")[1].split()[0]) < 5
    assert float(done.stdout.split("closed after")[1].split()[0]) < 10


STREAM = """
class Guess:
    def __init__(self):
        self.slow = 0.0
    def predict(self, input_ids, attention_mask=None, top_k=1):
        time.sleep(self.slow)
        index = (input_ids % 8)[:, :, None, None].repeat(1, 1, 2, 1)
        return sida_ext.HashTable(index, torch.full(index.shape, 0.5))
guess = Guess()
def builders():
    return [thread for thread in threading.enumerate() if thread.name == "sida-hash-builder"]
"""


def test_ctrl_c_in_a_stream_ends_it_and_the_next_one_is_right(folder):
    done = script(
        folder,
        STREAM
        + """
model = load()
with torch.no_grad():
    plain = model(**batch).last_hidden_state
guess.slow = 0.3  # the inference thread waits for tables
timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
begin = time.monotonic()
try:
    timer.start()
    for output in sida_ext.stream(model, [batch] * 200, guess):
        pass
except KeyboardInterrupt:
    print("interrupted after", round(time.monotonic() - begin, 1))
while builders() and time.monotonic() - begin < 30:
    time.sleep(0.01)
guess.slow = 0.0
right = [torch.equal(output.last_hidden_state, plain) for output in sida_ext.stream(model, [batch] * 5, guess)]
print("then:", len(right), all(right), len(builders()))
""",
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("interrupted after")[1].split()[0]) < 30  # of 60 that the stream would take
    assert "then: 5 True 0" in done.stdout


def test_exit_in_mid_stream(folder):
    done = script(
        folder,
        STREAM
        + """
guess.slow = 0.05
model = load(faults=_C.Faults(delay_us_min=50_000, delay_us_max=50_001))
outputs = sida_ext.stream(model, [batch] * 100, guess)
next(outputs)
print("left:", len(builders()))
""",
    )
    assert done.returncode == 0, done.stderr
    assert "left: 1" in done.stdout
    assert not done.stderr.strip() or "Loading" in done.stderr


def test_exit_without_close_in_mid_copy(folder):
    begin = time.monotonic()
    done = script(
        folder,
        """
model = load(faults=_C.Faults(delay_us_min=200_000, delay_us_max=200_001))
model.sida.announce({name: range(8) for name in model.sida.header.layers})
time.sleep(0.05)
""",
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip() or "Loading" in done.stderr
    assert time.monotonic() - begin < 50


def test_a_fork_is_told_that_the_engine_is_not_there(folder):
    done = script(
        folder,
        """
torch.set_num_threads(1)
model = load()
model(**batch)
child = os.fork()
if child == 0:
    try:
        model(**batch)
    except RuntimeError as error:
        print("child:", "fork" in str(error), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent:", model(**batch).last_hidden_state.shape[0])
""",
    )
    assert done.returncode == 0, done.stderr
    assert "child: True" in done.stdout
    assert "parent: 2" in done.stdout


def test_close_during_a_wait_ends_it(folder):
    done = script(
        folder,
        """
model = load(faults=_C.Faults(delay_us_min=30_000_000, delay_us_max=30_000_001))
threading.Timer(0.5, model.sida.close).start()
begin = time.monotonic()
try:
    model(**batch)
except RuntimeError as error:
    print("raised:", "closed" in str(error), time.monotonic() - begin < 10)
""",
    )
    assert "raised: True True" in done.stdout, done.stdout + done.stderr


def test_the_budget_is_seen_in_the_memory_of_the_process(folder, tmp_path):
    config = small_config(d_model=256, d_ff=1024, num_experts=32)  # experts of 1 MiB in bf16, 64 in all
    build(SwitchTransformersEncoderModel, config).save_pretrained(tmp_path)
    done = script(
        tmp_path,
        """
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
model = load(store_cache=sys.argv[1])
model.sida.set_budget("100%")
ids = torch.randint(2, 97, (4, 64))
model(input_ids=ids)
full = anonymous()
model.sida.set_budget("10%")
for _ in range(3):
    model(input_ids=torch.randint(2, 97, (4, 64)))
small = anonymous()
print(full, small, model.sida.header.experts_bytes / 2**20)
""",
    )
    assert done.returncode == 0, done.stderr
    full, small, experts = map(float, done.stdout.split())
    assert full - small > 0.6 * experts, (full, small, experts)


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no signals")
def test_the_store_is_complete_after_an_interrupted_pack(folder, tmp_path):
    done = script(
        folder,
        f"""
from sida_ext.models.packing import pack
def stop(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
try:
    pack(sys.argv[1], {str(tmp_path / "x.sida")!r}, progress=stop)
except KeyboardInterrupt:
    print("left:", os.listdir({str(tmp_path)!r}))
""",
    )
    assert "left: []" in done.stdout, done.stdout + done.stderr


def test_what_a_killed_pack_left_goes_with_the_next_one(folder, tmp_path):
    body = f"""
from sida_ext.models.packing import pack
def stop(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
pack(sys.argv[1], {str(tmp_path / "x.sida")!r}, progress=stop)
"""
    assert script(folder, body).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".x.sida.*.partial"))) == 1
    other = tmp_path / ".y.sida.0.partial"
    other.write_bytes(b"another store's")

    def interfere(done, total):
        if done == 3:  # a second packer of the same store leaves the file of a living one alone
            before = set(tmp_path.iterdir())
            sida_ext.pack(folder, tmp_path / "x.sida")
            assert set(tmp_path.iterdir()) == before | {tmp_path / "x.sida"}

    sida_ext.pack(folder, tmp_path / "x.sida", progress=interfere)
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "x.sida"]
    sida_ext.experts.store.open_store(tmp_path / "x.sida")
