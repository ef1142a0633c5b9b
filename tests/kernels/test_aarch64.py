"""The kernels cross-compiled for AArch64: all their C++ tests under qemu's user mode, and NEON's inner loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.machine_code import functions, innermost_loops, read, stack_accesses

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR, DISASSEMBLER = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
# What is run with which SIDA_CPU. The bfloat16 tests emulate instructions of x86-64: plain code, for any CPU.
RUNS = [
    ("test_kernels_plan", None),
    ("test_kernels_choice", None),
    ("test_kernels_math", "neon"),
    ("test_kernels_math", "scalar"),
    ("test_kernels_moe_ffn", "neon"),
    ("test_kernels_moe_ffn", "scalar"),
    ("test_kernels_moe_ffn", "neon fast"),
    ("test_kernels_bf16", None),
    ("test_bytes_mutants", None),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in (COMPILER, EMULATOR, "cmake") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user cmake")
    folder = tmp_path_factory.mktemp("aarch64")
    for command in (
        [
            "cmake", "-S", str(ROOT), "-B", str(folder), "-DSIDA_CPP_TESTS=ON", "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
        ],
        ["cmake", "--build", str(folder), "-j2", "--target", *sorted({test for test, _ in RUNS})],
    ):  # fmt: skip
        made = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.mark.parametrize(("test", "instructions"), RUNS)
def test_kernels_under_qemu(build: Path, test: str, instructions: str | None) -> None:
    (program,) = build.rglob(test)
    environment = [] if instructions is None else ["-E", f"SIDA_CPU={instructions.split()[0]}"]
    if instructions is not None and instructions.endswith("fast"):
        environment += ["-E", "SIDA_TEST_PRECISION=fast"]
    ran = subprocess.run([EMULATOR, *environment, str(program)], capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.fullmatch(r"(\d+) passed, 0 failed", ran.stdout.splitlines()[-1])
    assert passed is not None, ran.stdout
    assert int(passed[1]) > 0
    if instructions is not None:
        assert f"instruction set: {instructions.split()[0]}" in ran.stdout


def test_a_set_of_x86_is_refused(build: Path) -> None:
    (program,) = build.rglob("test_kernels_moe_ffn")
    ran = subprocess.run([EMULATOR, "-E", "SIDA_CPU=amx", str(program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 77
    assert "SIDA_CPU is 'amx', which this build for AArch64 does not have; available here: neon, scalar" in ran.stdout


def test_inner_loops_of_neon(build: Path) -> None:
    """Multiply-adds of four lanes, and nothing of a loop over columns on the stack."""
    (unit,) = build.rglob("kernels_neon.cpp.o")
    listing = read(DISASSEMBLER, "-d", "-C", "--no-show-raw-insn", str(unit))
    loops = [
        loop
        for name, body in functions(listing).items()
        if "Tile<" in name
        for loop in innermost_loops(name, body, r"fmla")
    ]
    assert len(loops) >= 100
    for loop in loops:
        sums = [re.sub(r"\s+", " ", text) for text in loop.instructions if text.startswith("fmla")]
        assert all(re.match(r"fmla v\d+\.4s, v\d+\.4s, v\d+\.(4s|s\[\d\])$", text) for text in sums), loop.function
    assert {loop.function: found for loop in loops if (found := stack_accesses(loop))} == {}
