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


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.glob("sida_ext-*")
    return source


def environment() -> dict[str, str]:
    """Of a build that knows nothing of this source tree."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    return clean | {"PATH": path, "MAX_JOBS": os.environ.get("MAX_JOBS", "2")}


def build_wheel(source: Path, folder: Path) -> Path:
    """With the torch of this environment, as setup.py wants it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    built = subprocess.run(
        [*pip, "--no-build-isolation", "-w", str(folder), str(source)],
        env=environment(),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    (wheel,) = folder.glob("sida_ext-*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    modules = {path for path in TRACKED if path.parts[0] == "sida_ext" and path.suffix in (".py", ".pyi", ".typed")}
    assert modules <= names
    assert Path("sida_ext/_build_info.json") in names
    assert [name for name in names if name.name.startswith("_C.") and name.suffix == ".so"]
    assert {name.parts[0] for name in names if ".dist-info" not in name.parts[0]} == {"sida_ext"}


def check_use(wheel: Path, folder: Path) -> None:
    """Install it in a new environment in ``folder`` and serve a model from there."""
    clean = environment() | {"SIDA_CACHE": str(folder / "cache")}
    place = folder / "environment"
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
    subprocess.run([*install, *options], env=clean, cwd=folder, check=True, timeout=300)
    done = subprocess.run(
        [str(python), "-c", PROGRAM], env=clean, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wheel.name.split("-")[1]
    helped = subprocess.run([str(place / "bin" / "sida"), "--help"], cwd=folder, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert "pack" in helped.stdout


@pytest.mark.check
def test_a_wheel_of_this_tree_works_elsewhere(tmp_path):
    """What is compiled already, in build/, is not compiled again."""
    wheel = build_wheel(ROOT, tmp_path / "wheels")
    check_contents(wheel)
    check_use(wheel, tmp_path)


@pytest.mark.check
def test_the_source_distribution_names_every_source_that_it_compiles(sdist, tmp_path):
    """CMake is configured from it, and ninja asked what it would do: a source that is missing is an error of both."""
    source = unpacked(sdist, tmp_path)
    settings = ["-DSIDA_CPP_TESTS=ON", "-G", "Ninja"]
    for command in (
        ["cmake", "-S", source, "-B", tmp_path / "build", *settings],
        ["cmake", "--build", tmp_path / "build", "--", "-n"],
    ):
        done = subprocess.run(
            list(map(str, command)), env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
def test_the_source_distribution_builds_a_wheel_that_works_elsewhere(sdist, tmp_path):
    """Compiles everything: minutes."""
    wheel = build_wheel(unpacked(sdist, tmp_path), tmp_path / "wheels")
    check_contents(wheel)
    check_use(wheel, tmp_path)
