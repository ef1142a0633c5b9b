"""moe_ffn and torch's threads: its pool, its settings, forked and spawned workers, several Python threads."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sida_ext import ops
from tests.kernels.test_moe_ffn_invariance import arguments_of, same_bits
from tests.support.native_build import ROOT

CASE = {
    "tokens": 60, "top_k": 2, "d_model": 96, "d_ff": 200, "experts": 6, "extra_slots": 0, "x_dtype": torch.float32,
    "w_dtype": torch.bfloat16, "activation": "gelu", "padding": 0, "seed": 8,
}  # fmt: skip


def result(seed: int) -> Tensor:
    arguments, activation = arguments_of(CASE | {"seed": seed})
    return ops.moe_ffn(**arguments, activation=activation)


class Results(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return result(index)


class StartedThreads(Dataset):
    """How many threads a call of the worker starts; those of the worker's own queues start between two items."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        arguments, activation = arguments_of(CASE | {"seed": index})
        before = len(os.listdir("/proc/self/task"))
        ops.moe_ffn(**arguments, activation=activation)
        return len(os.listdir("/proc/self/task")) - before


POOL = """
import os, sys, torch
from tests.kernels.test_moe_ffn_threads import CASE, arguments_of
from sida_ext import ops
torch.set_num_threads(1)
arguments, activation = arguments_of(CASE)
torch.set_num_threads(int(sys.argv[1]))
before = len(os.listdir("/proc/self/task"))
ops.moe_ffn(**arguments, activation=activation)
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line}
print(len(os.listdir("/proc/self/task")) - before, len(runtimes))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_torchs_pool_is_used_and_no_other(threads: int) -> None:
    """Nothing else in the process has used the pool: its threads appear with the call, and no second OpenMP runtime."""
    ran = subprocess.run(
        [sys.executable, "-c", POOL, str(threads)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    started, runtimes = map(int, ran.stdout.split())
    assert started == threads - 1
    assert runtimes <= 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method: str) -> None:
    expected = [result(seed) for seed in range(4)]  # the parent's pool is running when its worker is forked
    loader = DataLoader(Results(), batch_size=None, num_workers=1, multiprocessing_context=method, timeout=240)
    assert all(same_bits(a, b) for a, b in zip(loader, expected, strict=True))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataloader_worker_starts_no_threads(method: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        result(0)  # the parent's pool runs
        loader = DataLoader(
            StartedThreads(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=240
        )
        assert list(loader) == [0, 0, 0]
    finally:
        torch.set_num_threads(before)


def send_result(queue: multiprocessing.SimpleQueue, arguments: dict, activation: str) -> None:
    torch.set_num_threads(2)
    queue.put(ops.moe_ffn(**arguments, activation=activation).view(torch.int32).tolist())


def test_after_fork_with_the_pool_running() -> None:
    """The arguments are made before the fork: torch's own parallel operators may hang after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        arguments, activation = arguments_of(CASE)
        expected = ops.moe_ffn(**arguments, activation=activation)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=send_result, args=(queue, arguments, activation))
        child.start()
        try:
            found = queue.get(timeout=120)
            child.join(60)
        finally:
            child.kill()
        assert child.exitcode == 0
        assert found == expected.view(torch.int32).tolist()
    finally:
        torch.set_num_threads(before)


def test_inference_mode() -> None:
    expected = result(2)
    with torch.inference_mode():
        found = result(2)
    assert found.is_inference()
    assert same_bits(found.clone(), expected)


def test_several_python_threads_at_once() -> None:
    expected = [result(seed) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait(60)
        found[seed] = [result(seed) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert sorted(found) == [0, 1, 2, 3]
    assert all(same_bits(one, expected[seed]) for seed in found for one in found[seed])
