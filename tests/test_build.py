"""The build: which torch it serves, what SIDA_CUDA chooses, and what an import beside the wrong torch says."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import sida_ext
from sida_ext import _C
from sida_ext._load import check_build, installed_torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_module():
    spec = importlib.util.spec_from_file_location("sida_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_said_of_the_build_is_true():
    assert check_build()["cuda"] == _C.cuda_built
    assert installed_torch() == torch.__version__


def test_a_torch_that_is_too_old_is_named_before_anything_is_loaded(tmp_path):
    for good in ("2.10.0", "2.10.0+cu128", "2.13.0+cpu", "2.100.1", "3.0.0a0"):
        assert check_build(found=good) == check_build()
    for old in ("2.9.1", "2.9.1+cpu", "1.13.1"):
        with pytest.raises(ImportError, match=rf"torch {re.escape(old)} is installed, expected 2\.10 or later"):
            check_build(found=old)
    with pytest.raises(ImportError, match="extension was not built"):
        check_build(tmp_path / "missing.json")


# What the extension may ask of the libraries of torch: C functions of its stable ABI, as they were in torch 2.10.
STABLE = re.compile(r"(aoti_torch|aoti_record_function|torch)_\w+")


def test_of_torch_the_extension_needs_the_stable_abi_alone():
    """No C++ symbol of torch, which is of one release, and no library of torch but the one for the CPU."""
    undefined = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1].split("@")[0] for line in undefined.splitlines()]
    ours = {name for name in names if re.search(r"torch|c10|aten|caffe|_ZN?K?2at", name)}
    assert {"torch_call_dispatcher", "torch_library_impl", "aoti_torch_get_dtype"} <= ours
    assert not {name for name in ours if not STABLE.fullmatch(name)}
    # There only from 2.13 on: asked for, not needed.
    weak = {line.split()[-1] for line in undefined.splitlines() if line.split()[0] == "w"}
    assert {name for name in weak if "torch" in name} == {"torch_exception_get_what_without_backtrace"}
    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"Shared library: \[(.*)\]", needed)
    assert [name for name in libraries if "torch" in name or "c10" in name] == ["libtorch_cpu.so"]


def test_importing_starts_no_thread_and_touches_no_device():
    code = (
        "import threading, os, sys; before = len(os.listdir('/proc/self/task'));"
        "import torch, transformers; torch_threads = len(os.listdir('/proc/self/task'));"
        "import sida_ext; after = len(os.listdir('/proc/self/task'));"
        "assert threading.active_count() == 1, threading.enumerate();"
        "assert after == torch_threads, (before, torch_threads, after);"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert threading.active_count() >= 1


def test_torch_is_found_from_inside_build_isolation(setup_module, monkeypatch, tmp_path):
    # pip isolates a build with a sitecustomize on PYTHONPATH that hides the environment's packages.
    hide = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    (tmp_path / "sitecustomize.py").write_text(hide)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hidden = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in hidden.stderr
    assert setup_module.find_torch()["version"] == torch.__version__


def test_no_torch_or_an_old_one_is_refused(setup_module, monkeypatch):
    def answer(code, text=""):
        done = subprocess.CompletedProcess([], code, stdout=text, stderr="ModuleNotFoundError: No module named 'torch'")
        monkeypatch.setattr(setup_module.subprocess, "run", lambda *args, **kwargs: done)

    answer(1)
    with pytest.raises(SystemExit, match="Install torch first"):
        setup_module.find_torch()
    answer(0, json.dumps({"version": "2.9.1"}))
    with pytest.raises(SystemExit, match=r"found torch 2\.9\.1, expected 2\.10 or later"):
        setup_module.find_torch()


CPU = {"version": "2.13.0+cpu", "cuda": None, "cuda_home": None}


def test_the_variant_is_chosen_and_said(setup_module, monkeypatch, capsys):
    monkeypatch.delenv("SIDA_CUDA", raising=False)
    assert setup_module.choose_cuda(CPU) is None
    assert "building the CPU variant (SIDA_CUDA=auto: torch 2.13.0+cpu is a CPU build)" in capsys.readouterr().out
    monkeypatch.setenv("SIDA_CUDA", "on")
    monkeypatch.setattr(setup_module, "find_nvcc", lambda torch: (None, "no nvcc was found"))
    with pytest.raises(SystemExit, match="SIDA_CUDA=on, but no nvcc was found"):
        setup_module.choose_cuda(CPU)
    monkeypatch.setattr(setup_module, "find_nvcc", lambda torch: ("/opt/nvcc", "nvcc 13.0"))
    assert setup_module.choose_cuda(CPU) == "/opt/nvcc"
    assert "building CPU and CUDA (SIDA_CUDA=on: nvcc 13.0)" in capsys.readouterr().out
    monkeypatch.setenv("SIDA_CUDA", "maybe")
    with pytest.raises(SystemExit, match="SIDA_CUDA is 'maybe', expected auto, on or off"):
        setup_module.choose_cuda(CPU)


def test_architectures_are_read_as_torch_writes_them(setup_module):
    assert setup_module.cuda_architectures("8.0;9.0+PTX") == "80-real;90"
    assert setup_module.cuda_architectures("8.6 12.0") == "86-real;120-real"
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST holds 'Hopper'"):
        setup_module.cuda_architectures("Hopper")


def run(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("name", _C.instruction_sets())
def test_the_instruction_set_can_be_chosen(name):
    done = run("-c", "from sida_ext import _C; print(_C.instruction_set())", SIDA_CPU=name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [("sse9", "which no build has (scalar, avx2, avx512, amx, neon)")]
    + [(name, "") for name in ("scalar", "avx2", "avx512", "amx", "neon") if name not in _C.instruction_sets()],
)
def test_an_instruction_set_that_is_not_to_be_had_is_an_error(name, reason):
    """Never an illegal instruction: what is missing and what there is are named, and nothing is computed."""
    code = "import torch, sida_ext; from sida_ext import _C; print(_C.instruction_set())"
    done = run("-c", code, SIDA_CPU=name)
    assert done.returncode == 1  # an exception, no signal
    assert f"ValueError: SIDA_CPU is '{name}', {reason}" in done.stderr
    assert f"available here: {', '.join(_C.instruction_sets())}" in done.stderr
    if name != "sse9":
        assert re.search(r"this machine lacks \w|which this build for [\w-]+ does not have", done.stderr)


def test_the_best_instruction_set_of_this_cpu_is_taken():
    done = run("-c", "from sida_ext import _C; print(_C.instruction_set())", SIDA_CPU="")
    assert done.stdout.strip() == _C.instruction_sets()[0]


def test_info_prints_what_it_measured(tmp_path):
    done = run("-m", "sida_ext.cli", "info", "--path", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    installed = sida_ext.__version__ != "0+unknown"
    assert found["versions"]["sida_ext"] == (
        sida_ext.__version__ if installed else "a source tree that was never installed"
    )
    assert found["cpu"]["instruction set in force"] == _C.instruction_set()
    assert found["cpu"]["instruction sets of this CPU"].startswith(", ".join(_C.instruction_sets()))
    assert found["cpu"]["precision"] == f"exact; this set has: {', '.join(_C.precisions())}"
    assert found["measured"]["memory bandwidth, GB/s"] > 0.5
    assert not list(tmp_path.iterdir())
