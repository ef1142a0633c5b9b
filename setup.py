"""Builds the extension with CMake and the headers of the torch of the environment that it is installed into.

What is built keeps to torch's stable ABI and serves every torch from MINIMUM_TORCH on. SIDA_CUDA=auto|on|off chooses
whether the CUDA sources are built; auto builds them when torch is a CUDA build and nvcc is found, on wherever nvcc is
found. MAX_JOBS bounds the compilers that run at once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)  # as in sida_ext/_load.py; its stable ABI is named in csrc/bindings/CMakeLists.txt
MINIMUM_CUDA = (12, 8)

PROBE = """
import json, torch
from torch.utils import cpp_extension
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "include": cpp_extension.include_paths(),
    "library": cpp_extension.library_paths(),
    "cuda_home": cpp_extension.CUDA_HOME,
}))
"""


def find_torch() -> dict:
    """The torch whose headers are taken: the target environment's, which pip's build isolation hides on PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probe = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    if probe.returncode != 0:
        sys.exit(
            f"sida_ext: torch is not importable by {sys.executable}, and the extension is built with its headers."
            f"\nInstall torch first (pip install torch), then run: pip install "
            f"--no-build-isolation .\n(import torch said: {probe.stderr.strip().splitlines()[-1:] or ['nothing']})"
        )
    torch = json.loads(probe.stdout.splitlines()[-1])
    version = tuple(int(part) for part in re.findall(r"\d+", torch["version"])[:2])
    if version < MINIMUM_TORCH:
        sys.exit(f"sida_ext: found torch {torch['version']}, expected {'.'.join(map(str, MINIMUM_TORCH))} or later")
    return torch


def find_nvcc(torch: dict) -> tuple[str | None, str]:
    """Path of a usable nvcc and one phrase on what was found."""
    candidates = [os.environ.get("CUDA_HOME"), torch["cuda_home"], "/usr/local/cuda"]
    paths = [shutil.which("nvcc")] + [str(Path(c) / "bin" / "nvcc") for c in candidates if c]
    nvcc = next((p for p in paths if p and Path(p).is_file()), None)
    if nvcc is None:
        return None, "no nvcc was found"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_CUDA:
        return None, f"{nvcc} is older than CUDA {'.'.join(map(str, MINIMUM_CUDA))}"
    return nvcc, f"nvcc {found[1]}.{found[2]}"


def choose_cuda(torch: dict) -> str | None:
    """The nvcc to build with, or None for the CPU variant; says in one line what was chosen and why."""
    wish = os.environ.get("SIDA_CUDA", "auto")
    if wish not in ("auto", "on", "off"):
        sys.exit(f"sida_ext: SIDA_CUDA is {wish!r}, expected auto, on or off")
    nvcc, phrase = find_nvcc(torch)
    if wish == "off":
        choice, why = None, "SIDA_CUDA=off"
    elif wish == "auto" and torch["cuda"] is None:
        choice, why = None, f"torch {torch['version']} is a CPU build"
    else:
        choice, why = nvcc, phrase
    if wish == "on" and choice is None:
        sys.exit(f"sida_ext: SIDA_CUDA=on, but {why}")
    print(f"sida_ext: building {'CPU and CUDA' if choice else 'the CPU variant'} (SIDA_CUDA={wish}: {why})", flush=True)
    return choice


def cuda_architectures(wish: str) -> str:
    """CMake's form of torch's list: ``"8.0;9.0+PTX"`` -> ``"80-real;90"``."""
    chosen = []
    for part in re.split(r"[;, ]+", wish.strip()):
        found = re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", part)
        if found is None:
            sys.exit(f"sida_ext: TORCH_CUDA_ARCH_LIST holds {part!r}, expected entries such as 8.0 or 9.0+PTX")
        chosen.append(f"{found[1]}{found[2]}" + ("" if found[3] else "-real"))
    return ";".join(chosen)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch = find_torch()
        nvcc = choose_cuda(torch)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        variant = f"torch{torch['version']}{'-cuda' if nvcc else ''}"
        build = ROOT / "build" / f"ext-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{variant}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "SIDA_EXTENSION": "ON",
            "SIDA_CUDA": "ON" if nvcc else "OFF",
            "SIDA_TORCH_INCLUDE": ";".join(torch["include"]),
            "SIDA_TORCH_LIBRARY": ";".join(torch["library"]),
            "SIDA_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "SIDA_PYBIND11_INCLUDE": pybind11.get_include(),
            "SIDA_OUTPUT": str(target),
        }
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
            if os.environ.get("TORCH_CUDA_ARCH_LIST"):
                settings["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures(os.environ["TORCH_CUDA_ARCH_LIST"])
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        cmake = shutil.which("cmake") or sys.exit("sida_ext: cmake was not found; pip install cmake")
        subprocess.run(
            [cmake, "-S", str(ROOT), "-B", str(build), *generator, *(f"-D{k}={v}" for k, v in settings.items())],
            check=True,
        )
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "--target", "sida_extension", "-j", jobs], check=True)
        # Where the tests of kernels and engine find them compiled (tests/cpp/run.sh).
        newest = ROOT / "build" / "extension"
        newest.unlink(missing_ok=True)
        newest.symlink_to(build.name)
        info = {
            "torch": torch["version"],
            "cuda": bool(nvcc),
            "python": platform.python_version(),
            "compiler": os.environ.get("CXX", "c++"),
        }
        (target.parent / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Of an editable install, and of ``build_ext --inplace``: what the build says of itself goes along."""
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib) / "sida_ext" / "_build_info.json", ROOT / "sida_ext")


if __name__ == "__main__":
    setup(ext_modules=[Extension("sida_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
