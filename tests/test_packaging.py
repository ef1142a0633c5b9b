"""What is handed out: a source distribution that builds, a wheel that works in another environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = [
    path.relative_to(ROOT)
    for room in ("sida_ext", "csrc")
    for path in (ROOT / room).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so" and path.name != "_build_info.json"
]

# Run in the new environment, away from the source tree.
PROGRAM = """
import sys
from pathlib import Path
import torch, transformers
import sida_ext
import sida_ext.cli, sida_ext.planning.hit_rates, sida_ext.training.distill, sida_ext.experts.metrics
assert Path(sida_ext.__file__).is_relative_to(sys.prefix), sida_ext.__file__
config = transformers.SwitchTransformersConfig(
    vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2, num_sparse_encoder_layers=1, num_experts=4
)
plain = transformers.SwitchTransformersEncoderModel(config).eval()
batch = {"input_ids": torch.tensor([[3, 4, 5]])}
with torch.no_grad():
    expected = plain(**batch).last_hidden_state
model = sida_ext.swap_experts(plain, expert_memory="50%", expert_dtype="float32")
(output,) = sida_ext.stream(model, [batch])
torch.testing.assert_close(output.last_hidden_state, expected)
model.sida.close()
print(sida_ext.__version__)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    metadata = folder / "egg"
    metadata.mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(metadata), "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_the_source_distribution_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    missing = {path for path in TRACKED if path not in names}
    assert not missing
    assert {Path("CMakeLists.txt"), Path("setup.py"), Path("pyproject.toml"), Path("LICENSE")} <= names
    assert {Path("tests/conftest.py"), Path("tests/cpp/run.sh"), Path("tools/cuda_build.sh")} <= names
    # What was built on this machine is not handed out.
    assert not [name for name in names if name.suffix in (".so", ".pyc") or name.name == "_build_info.json"]


@pytest.mark.slow
def test_the_source_distribution_builds_a_wheel_that_works_elsewhere(sdist, tmp_path):
    """With the torch of this environment, as setup.py wants it, and nothing of this source tree."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("sida_ext-*")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    built = subprocess.run(
        [*pip, "--no-build-isolation", "-w", str(tmp_path / "wheels"), str(source)],
        env=clean | {"PATH": path, "MAX_JOBS": os.environ.get("MAX_JOBS", "2")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    (wheel,) = (tmp_path / "wheels").glob("sida_ext-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    modules = {path for path in TRACKED if path.parts[0] == "sida_ext" and path.suffix in (".py", ".pyi", ".typed")}
    assert modules <= names
    assert Path("sida_ext/_build_info.json") in names
    assert [name for name in names if name.name.startswith("_C.") and name.suffix == ".so"]
    assert {name.parts[0] for name in names if ".dist-info" not in name.parts[0]} == {"sida_ext"}

    place = tmp_path / "environment"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    # torch and transformers of this environment, behind what the new one has of its own.
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-q"]
    # What others.pth shows is taken for installed, an editable sida_ext too.
    options = ["--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run([*install, *options], env=clean, cwd=tmp_path, check=True, timeout=300)
    clean["SIDA_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [str(python), "-c", PROGRAM], env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wheel.name.split("-")[1]
    helped = subprocess.run([str(place / "bin" / "sida"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert "pack" in helped.stdout
