"""Builds C++ and CUDA targets for tests that run programs; skips, with the reason, where a tool is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def find(tool: str) -> str:
    path = shutil.which(tool, path=TOOLS)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


def tests_folder() -> str:
    """The folder in build/ that C++ tests are built in: the extension's own, where kernels and engine are compiled
    already, or ``cpp`` where the extension was not built from this source tree."""
    extension = ROOT / "build" / "extension"
    return extension.resolve().name if extension.exists() else "cpp"


def build(folder: str, targets: list[str], *options: str, extra_path: str = "") -> Path:
    """Configures and builds `targets` in build/`folder`; only what changed is compiled again."""
    cmake = find("cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=TOOLS) else []
    target = ROOT / "build" / folder
    target.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": extra_path + os.pathsep + TOOLS if extra_path else TOOLS}
    jobs = os.environ.get("MAX_JOBS", "2")
    with FileLock(target / "tests.lock"):  # of several workers of pytest one builds
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(target), *generator, *options],
            [cmake, "--build", str(target), "-j", jobs, "--target", *targets],
        ):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return target
