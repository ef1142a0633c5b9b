"""The kernels cross-compiled for AArch64, their C++ tests run under qemu's user mode."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

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
        ["cmake", "--build", str(folder), "-j2", "--target", "test_kernels_math", "test_kernels_moe_ffn"],
    ):  # fmt: skip
        made = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.mark.parametrize("instructions", ["neon", "scalar"])
@pytest.mark.parametrize("test", ["test_kernels_math", "test_kernels_moe_ffn"])
def test_kernels_under_qemu(build: Path, test: str, instructions: str) -> None:
    (program,) = build.rglob(test)
    ran = subprocess.run(
        [EMULATOR, "-E", f"SIDA_CPU={instructions}", str(program)], capture_output=True, text=True, timeout=1800
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1].endswith(" passed, 0 failed")
