"""A program that ends with a stream open ends as it would without one: its own exit status, soon, nothing printed."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import sida_ext

# The predictor is many short calls of torch, each of which lets go of the interpreter's lock: where the interpreter
# ends while the hash-building thread is in one of them, CPython ends the thread inside C++ frames, and the program
# aborts.
PROGRAM = """
import sys, threading, time
import transformers
import torch
import sida_ext
from sida_ext import HashTable

class Slow:
    def predict(self, input_ids, attention_mask=None, top_k=1):
        end = time.monotonic() + {seconds}
        weight = torch.rand(500, 500)
        while time.monotonic() < end:
            weight @ weight
        index = torch.zeros((*input_ids.shape, 2, 1), dtype=torch.int32)
        return HashTable(index, torch.full(index.shape, 0.5))

transformers.utils.logging.disable_progress_bar()

def endless():
    while True:
        yield {{"input_ids": torch.full((1, 4), 5)}}

model = sida_ext.from_pretrained(sys.argv[1], store=sys.argv[2], expert_memory="50%")
outputs = sida_ext.stream(model, endless(), Slow(), lookahead=2)

def begun():
    while "sida-hash-builder" not in [thread.name for thread in threading.enumerate()]:
        time.sleep(0.01)

"""

# Seconds within which a program has ended: far from what it takes, on a busy machine too, and far from its predictor's.
LIMIT = 300

# What the program does with its stream, seconds of one prediction, and its exit status.
ENDINGS = {
    "the end of the script, the generator never closed": ("next(outputs)", 0.2, 0),
    "a break": ("for output in outputs: break", 0.2, 0),
    "sys.exit with a status, while the predictor is at work for an hour": (
        """
        thread = threading.Thread(target=next, args=(outputs,), daemon=True)
        thread.start()
        begun()
        sys.exit(7)
        """,
        3600,
        7,
    ),
    "sys.exit in a thread": (
        """
        def work():
            next(outputs)
            sys.exit(5)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """,
        0.2,
        0,
    ),
}


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "experts.sida"
    sida_ext.pack(folder, store, "float32")
    return functools.partial(begin, folder, store)


def begin(folder, store, ending, seconds):
    program = PROGRAM.format(seconds=seconds) + textwrap.dedent(ending)
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("way", ENDINGS)
def test_a_program_ends_with_its_own_status(start, way):
    ending, seconds, status = ENDINGS[way]
    process = start(ending, seconds)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err) == (status, "", "")


def test_an_exception_ends_with_its_own_traceback_alone(start):
    process = start("next(outputs)\nraise KeyError('the program')", 0.2)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "KeyError: 'the program'"
    assert err.count("Error") == 1


def test_ctrl_c_ends_with_its_own_traceback_alone(start):
    # Where the tests run behind another program, that may have had its children ignore Ctrl-C.
    ending = """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print('begun', flush=True)
        for output in outputs: pass
    """
    process = start(ending, 3600)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode in (-signal.SIGINT, 130)
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert out == ""
