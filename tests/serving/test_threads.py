"""Threads that wait for work of a thread that has none hold up what others compute: they are not kept.

By the number of threads, in a process of its own: a pool of torch's, once it is there, would hide what is counted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="torch's wheels have GNU's OpenMP runtime on Linux alone"
)

START = """
import os, sys, threading, time
import torch
torch.set_num_threads(2)
from sida_ext._load import _C

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(1 << 20).exp_()

def becomes(expected):
    end = time.monotonic() + 20
    while threads() != expected:
        assert time.monotonic() < end, (threads(), expected)
        time.sleep(0.01)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_threads_team_ends_and_begins_again():
    run(
        """
before = threads()
_C.release_threads()  # has none yet
for _ in range(3):
    compute()
    assert threads() == before + 1
    _C.release_threads()
    becomes(before)
child = os.fork()
if child == 0:  # its parent's threads are not there to be waited for
    _C.release_threads()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
compute()
child = os.fork()
if child == 0:
    _C.release_threads()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )


def test_what_is_served_has_the_one_team_and_only_while_it_computes():
    run(
        """
import tempfile
from pathlib import Path
import sida_ext
from sida_ext.serving.driver import Driver, Job, Work
from sida_ext.serving.model import ServedModel
from sida_ext.serving.scheduler import Limits
from tests.support.tiny_models import tiny_causal, tiny_tokenizer

with tempfile.TemporaryDirectory() as folder:
    model = sida_ext.swap_experts(tiny_causal(), store=Path(folder) / "experts.sida")
    served = ServedModel(model, tiny_tokenizer(), "tiny")
    _C.release_threads()
    seen, embed = [], served.embed
    def watched(prompts):
        found = embed(prompts)
        compute()  # so large that torch takes both threads
        seen.append(threads())
        return found
    served.embed = watched
    driver = Driver(served, Limits(), lambda answers: [answer() for answer in answers])
    driver.start()
    told = threading.Event()
    for _ in range(3):
        idle = threads()
        told.clear()
        driver.submit(Job([Work("embed", [5, 6, 7])], time.monotonic() + 60, lambda row, answer: told.set()))
        assert told.wait(60)
        becomes(idle)
        assert seen[-1] == idle + 1, (seen, idle)
    driver.refuse()
    driver.cut()
    driver.join()
"""
    )


def test_a_predictor_that_runs_ahead_keeps_no_team():
    found = run(
        """
import tempfile
from pathlib import Path
import sida_ext
from sida_ext import HashTable
from tests.support.tiny_models import tiny_causal

matrix = torch.ones(700, 700)
seen = []

class Large:
    held_out_top1 = None
    def __init__(self, runtime):
        self.layers = runtime.header.layers
    def predict(self, input_ids, attention_mask=None, top_k=1):
        time.sleep(0.05)  # until the caller's thread has its own number again
        seen.append(threads())
        matrix @ matrix  # by MKL, which counts its threads itself
        seen.append(threads())
        shape = (*input_ids.shape, len(self.layers), top_k)
        return HashTable(torch.zeros(shape, dtype=torch.int16), torch.full(shape, 1 / top_k))

with tempfile.TemporaryDirectory() as folder:
    model = sida_ext.swap_experts(tiny_causal(), store=Path(folder) / "experts.sida")
    compute()
    batches = [{"input_ids": torch.tensor([[5, 6, 7]])}] * 6
    for _ in sida_ext.stream(model, batches, Large(model.sida), waste_cost=0.0):
        pass
before, during = seen[::2], seen[1::2]
print(before, during)
assert len(before) == 6, seen
if during[-1] == before[-1]:
    print("no team")
assert len(set(before)) == 1, seen
"""
    )
    if "no team" in found:
        pytest.skip("this torch's matrix products take one thread where torch itself is told to: it has no MKL")
