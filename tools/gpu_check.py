"""`make gpu-check`: everything that wants a GPU, in one command of eight minutes; no network.

    python tools/gpu_check.py [--dry] [--minutes 8] [--only PART ...]

Builds for the card that is there and runs, in this order: property tests of the kernels, `pytest -m gpu`, the whole
model at several budgets beside transformers and accelerate, one layer beside torch's grouped product, copy rates,
compute-sanitizer over small layers. What fails is said and the rest goes on; what does not fit the time is said too.
At the end one line for each part; the figures are in bench/results/gpu_CARD.json, a table beside the modelled times in
gpu_CARD.md, all output in build/gpu-check/.

--dry proves every step up to the device on a machine without one: the same sources are compiled where there is nvcc
(for one architecture), the device programs are started and must say that there is no device, the tests are collected,
the benchmarks run on the CPU with small shapes. Its figures go to build/gpu-check/ alone.

The environment needs nvcc 12.8, a CUDA build of torch, transformers, pytest, pytest-benchmark, hypothesis, pybind11,
cmake and ninja; accelerate and compute-sanitizer for their parts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-check"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
PROGRAMS = ("cuda_gpu_kernels_test", "cuda_gpu_route_test")
DRY_ARCHITECTURE = "9.0"
NO_DEVICE = 77  # how a device program ends where there is none
NO_CALL = 255  # how compute-sanitizer ends where the program ended before it called the device


class PartError(Exception):
    """Why a part failed, in a line."""


class PartSkippedError(Exception):
    """Why a part has nothing to do here, in a line."""


def last_lines(path: Path, count: int = 1) -> str:
    """What a command said last."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-count:])[:300] or "it printed nothing"


@dataclass
class Check:
    """One run of all parts: how long is left, where output goes, what was found."""

    dry: bool
    deadline: float
    environment: dict[str, str]
    figures: dict[str, Any] = field(default_factory=dict)
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, name: str, *command: str | Path) -> tuple[subprocess.Popen[bytes], Path]:
        """A command of the repository root in a group of its own, all it prints in a file."""
        log = WORK / f"{name}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [str(part) for part in command], cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.background.append(process)
        return process, log

    def finish(self, process: subprocess.Popen[bytes], log: Path, limit: float, accept: tuple[int, ...] = (0,)) -> Path:
        """Waits for a started command; what runs too long is ended with all its children."""
        seconds = max(1.0, min(limit, self.left()))
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            raise PartError(f"ended after {seconds:.0f} s; last: {last_lines(log)}") from None
        if status not in accept:
            raise PartError(f"status {status}: {last_lines(log, 2)} ({log.relative_to(ROOT)})")
        return log

    def run(self, name: str, limit: float, *command: str | Path, accept: tuple[int, ...] = (0,)) -> Path:
        return self.finish(*self.start(name, *command), limit, accept)

    def tests_folder(self) -> Path:
        """Where the device programs are built: the extension's own folder, where its kernels are compiled already. A
        dry run's extension has no CUDA."""
        return WORK / "cuda" if self.dry else (ROOT / "build" / "extension").resolve()


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def checkpoint(check: Check) -> Path:
    return WORK / ("small-switch" if check.dry else "switch-base-128")


def write_checkpoint(check: Check) -> tuple[subprocess.Popen[bytes], Path] | None:
    """Begins to write the whole model's checkpoint; takes a minute, beside the build."""
    folder = checkpoint(check)
    if (folder / "model.safetensors.index.json").exists():
        return None
    experts, layers = (8, 4) if check.dry else (128, 12)
    program = (
        "import sys; from pathlib import Path; from bench.engine.checkpoint import write_checkpoint; "
        f"write_checkpoint({experts}, Path(sys.argv[1]), {layers})"
    )
    return check.start("checkpoint", sys.executable, "-c", program, folder)


def find_nvcc(check: Check) -> str | None:
    return shutil.which("nvcc", path=f"{check.environment['PATH']}{os.pathsep}/usr/local/cuda/bin")


def build(check: Check) -> str:
    begin = time.monotonic()
    nvcc = find_nvcc(check)
    if nvcc is None and not check.dry:
        raise PartError("nvcc was not found on PATH or in /usr/local/cuda/bin")
    check.run("build-extension", 240, sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    said = f"extension in {time.monotonic() - begin:.0f} s"
    if nvcc is None:
        return said + "; device programs not compiled, no nvcc here"
    begin = time.monotonic()
    architecture = check.environment["TORCH_CUDA_ARCH_LIST"].replace(".", "")
    options = ["-DSIDA_CPP_TESTS=ON", "-DSIDA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real")
    folder = check.tests_folder()
    check.run("configure", 60, "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    jobs = check.environment["MAX_JOBS"]
    check.run(
        "build-programs", 3600 if check.dry else 180, "cmake", "--build", folder, "-j", jobs, "--target", *PROGRAMS
    )
    return f"{said}, device programs for {architecture} in {time.monotonic() - begin:.0f} s"


def properties(check: Check) -> str:
    """The kernels' property tests, on the device."""
    said = []
    for name in PROGRAMS:
        program = check.tests_folder() / "tests" / "cuda" / name
        if not program.exists():
            raise (PartSkippedError if check.dry else PartError)(f"{name} was not built")
        if check.dry:
            log = check.run(name, 60, program, accept=(NO_DEVICE,))
            said.append(f"{name} reached the device: {last_lines(log)}")
        else:
            log = check.run(name, 90, "env", "SIDA_HARNESS_EFFORT=5", program)  # five times as many cases
            said.append(f"{name}: {last_lines(log)}")
    return "; ".join(said)


def pytest_gpu(check: Check) -> str:
    # Files with such tests alone: others want packages that this machine may lack.
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    if check.dry:
        log = check.run("pytest", 600, *command, "--collect-only")
        return f"collected: {last_lines(log)}"
    log = check.run("pytest", 120, *command, "-x" if check.left() < 60 else "--maxfail=20")
    found = last_lines(log)
    if not re.search(r"[1-9]\d* passed", found):
        raise PartError(f"no test passed: {found}")
    return found


def sanitize(check: Check) -> str:
    """compute-sanitizer over the property tests with the least effort: their layers are small. All tools at once."""
    tool = shutil.which("compute-sanitizer", path=f"{check.environment['PATH']}{os.pathsep}/usr/local/cuda/bin")
    programs = [check.tests_folder() / "tests" / "cuda" / name for name in PROGRAMS]
    missing = [path.name for path in programs if not path.exists()]
    if tool is None or missing:
        reason = "compute-sanitizer was not found" if tool is None else f"{', '.join(missing)} was not built"
        raise (PartSkippedError if check.dry else PartError)(reason)
    started = []
    for sanitizer in SANITIZERS:
        for program in programs:
            command = [tool, "--tool", sanitizer, "--error-exitcode", "9", program]
            started.append((f"{sanitizer} {program.name}", *check.start(f"{sanitizer}-{program.name}", *command)))
    problems, said = [], []
    for name, process, log in started:
        try:
            check.finish(process, log, 90, (NO_DEVICE, NO_CALL) if check.dry else (0,))
            said.append(f"{name}: {last_lines(log).strip('= ')}")
        except PartError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise PartError("; ".join(problems))
    return "; ".join(said)


def whole_model(check: Check, writing: tuple[subprocess.Popen[bytes], Path] | None) -> str:
    if writing is not None:
        check.finish(*writing, 120)
    out = WORK / "whole_model.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu.whole_model", "--checkpoint", checkpoint(check), "--json", out]
    command += (
        ["--device", "cpu", "--sentences", "6"] if check.dry else ["--seconds", f"{min(check.left() - 90, 150):.0f}"]
    )
    try:
        log = check.run("whole-model", 600 if check.dry else 180, *command)
    finally:
        if out.exists():
            check.figures["whole_model"] = json.loads(out.read_text())
    rows = check.figures["whole_model"]
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    lacking = {name for name, error in failed.items() if "No module named 'accelerate'" in error}
    if set(failed) - lacking or not rows:
        raise PartError(f"{len(failed)} of {len(rows)} rows: {failed} ({log.relative_to(ROOT)})")
    said = f"{len(rows) - len(failed)} rows of tokens/s"
    return said + "".join(f"; not measured: {name} ({failed[name]})" for name in sorted(lacking))


def layer(check: Check) -> str:
    """bench_gpu: decode and prefill, beside torch's own grouped product and the floor measured there."""
    out = WORK / "bench_gpu.json"
    command = [sys.executable, "-m", "pytest", "bench/gpu/bench_gpu.py", "-q", "-s", "-p", "no:cacheprovider"]
    if check.dry:
        log = check.run("bench-gpu", 600, *command, "--collect-only")
        return f"collected: {last_lines(log)}"
    out.unlink(missing_ok=True)
    log = check.run("bench-gpu", 100, *command, "-m", "gpu", "--benchmark-enable", f"--benchmark-json={out}")
    rows = [one["extra_info"] for one in json.loads(out.read_text())["benchmarks"]]
    check.figures["layer"] = rows
    return f"{len(rows)} shapes, at the most {max(row['x_floor'] for row in rows):.1f} x floor; {last_lines(log)}"


def copies(check: Check) -> str:
    out = WORK / "copy_rates.json"
    command = [sys.executable, "-m", "bench.gpu.copy_rates", "--json", out]
    command += ["--device", "cpu", "--buffer", str(64 << 20), "--rounds", "3"] if check.dry else []
    log = check.run("copy-rates", 300 if check.dry else 40, *command)
    check.figures["copy_rates"] = json.loads(out.read_text())
    return last_lines(log, 2)


def card(dry: bool) -> tuple[str, str]:
    """Name and compute capability of the device, asked of torch in a process of its own."""
    if dry:
        return "dry", DRY_ARCHITECTURE
    program = "import torch; print(torch.cuda.get_device_name()); print(*torch.cuda.get_device_capability(), sep='.')"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if asked.returncode != 0:
        why = (asked.stderr.strip().splitlines() or ["torch said nothing"])[-1]
        sys.exit(f"gpu-check: no GPU that torch can use ({why}); make gpu-check DRY=1 goes as far as the device")
    name, capability = asked.stdout.splitlines()[-2:]
    return name, capability


def report(check: Check, name: str, lines: list[str]) -> Path:
    """Writes figures and table; returns the table's place."""
    folder = WORK if check.dry else ROOT / "bench" / "results"
    stem = folder / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}"
    stem.with_suffix(".json").write_text(json.dumps({"card": name, "parts": lines, **check.figures}, indent=1) + "\n")
    sys.path.insert(0, str(ROOT))
    from bench.gpu.report import document

    modelled = json.loads((ROOT / "bench/results/cuda_modelled.json").read_text())
    stem.with_suffix(".md").write_text(document(name, lines, check.figures, modelled))
    return stem.with_suffix(".md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="up to the device, on a machine without one")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts; a dry run has an hour")
    parser.add_argument("--only", nargs="+", help="these parts alone")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    name, capability = card(arguments.dry)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "SIDA_CACHE": str(WORK / "store-cache"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2)),
        "TORCH_CUDA_ARCH_LIST": capability,
        "CUDAARCHS": capability.replace(".", "") + "-real",
        "SIDA_CUDA": "auto" if arguments.dry else "on",
    }
    check = Check(arguments.dry, begin + (3600 if arguments.dry else 60 * arguments.minutes), environment)
    print(f"gpu-check: {name}, compute capability {capability}; output in {WORK.relative_to(ROOT)}/", flush=True)
    parts: dict[str, Callable[[], str]] = {
        "build": lambda: build(check),
        "properties": lambda: properties(check),
        "pytest": lambda: pytest_gpu(check),
        "whole-model": lambda: whole_model(check, writing),
        "layer": lambda: layer(check),
        "copies": lambda: copies(check),
        "sanitizers": lambda: sanitize(check),
    }
    unknown = set(arguments.only or ()) - set(parts)
    if unknown:
        parser.error(f"--only names {', '.join(sorted(unknown))}; expected some of {', '.join(parts)}")
    chosen = arguments.only or list(parts)
    lines, failed = [], 0
    try:
        writing = write_checkpoint(check) if "whole-model" in chosen else None
        for part in chosen:
            start = time.monotonic()
            if check.left() < 5:
                state, said = "NOT RUN", "no time was left"
            else:
                print(f"== {part}", flush=True)
                try:
                    state, said = "ok", parts[part]()
                except PartSkippedError as reason:
                    state, said = "skipped", str(reason)
                except Exception as error:  # the other parts go on
                    state, said = "FAILED", str(error) if isinstance(error, PartError) else repr(error)
            failed += state in ("FAILED", "NOT RUN")
            lines.append(f"{part}: {state}, {time.monotonic() - start:.0f} s: {said}")
            print(lines[-1], flush=True)
    finally:
        for process in check.background:
            end(process)
    place = report(check, name, lines)
    print(f"\ngpu-check in {time.monotonic() - begin:.0f} s; table: {place.relative_to(ROOT)}")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
