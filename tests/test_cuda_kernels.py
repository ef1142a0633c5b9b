"""Drives the C++ tests that execute the CUDA kernels on the CPU, and checks the compiled machine code.

The first needs a C++ compiler and CMake alone. The second needs nvcc and cuobjdump and skips, with a reason, without.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import sass_report  # noqa: E402

TESTS = [
    "cuda_kernels_test",
    "cuda_route_test",
    "cuda_plan_test",
    "cuda_planted_test",
    "cuda_harness_test",
    "cuda_heuristics_test",
    "cuda_slots_test",
    "cuda_serving_test",
]
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def find(tool: str) -> str:
    path = shutil.which(tool, path=TOOLS)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


def build(folder: str, targets: list[str], *options: str, extra_path: str = "") -> Path:
    """Configures and builds `targets` in build/`folder`; only what changed is compiled again."""
    cmake = find("cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=TOOLS) else []
    target = ROOT / "build" / folder
    environment = {**os.environ, "PATH": extra_path + os.pathsep + TOOLS if extra_path else TOOLS}
    jobs = os.environ.get("MAX_JOBS", "2")
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(target), *generator, *options],
        [cmake, "--build", str(target), "-j", jobs, "--target", *targets],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return target


@pytest.fixture(scope="session")
def harness_build() -> Path:
    return build("cpp", [*TESTS, "cuda_record_counts"], "-DSIDA_CPP_TESTS=ON") / "tests" / "cuda"


@pytest.mark.parametrize("name", TESTS)
def test_on_the_cpu(harness_build: Path, name: str) -> None:
    done = subprocess.run([str(harness_build / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed", done.stdout.strip().splitlines()[-1])


def test_counts_of_a_small_model(harness_build: Path) -> None:
    """What the modelled times are made from: four launches, every weight of the chosen experts read once, and copies
    that fall as the budget rises."""
    done = subprocess.run(
        [str(harness_build / "cuda_record_counts"), "small"], capture_output=True, text=True, check=True
    )
    counts = json.loads(done.stdout)
    (model,) = counts["models"]
    launches = model["layer"]["launches"]
    assert [launch["kernel"] for launch in launches] == ["route_top1", "dispatch_plan", *["expert_gemm<decode>"] * 2]
    weights = model["layer"]["distinct_experts"] * model["record_bytes"] // 2
    for launch in launches[2:]:
        assert weights <= launch["bytes_read"] <= 1.1 * weights
        assert launch["bytes_written"] > 0
        # d_model 64 and d_ff 128 in tiles of 16 x 16 x 8, two of them for the 16 tokens of a tile.
        assert launch["mma_m16n8k16"] == model["layer"]["distinct_experts"] * (64 // 16) * (128 // 16) * 2
    copies = [budget["copies"]["next_use"] for budget in model["budgets"]]
    assert copies == sorted(copies, reverse=True)
    calls = counts["transfer"]["calls"]
    assert calls["copy_to_device"] == counts["transfer"]["copies"]
    assert calls["event_synchronize"] == 0
    assert sum(calls.values()) <= 5 * counts["transfer"]["copies"]  # four for a copy, one for a layer


def nvcc() -> str:
    path = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin{os.pathsep}{TOOLS}")
    if path is None:
        pytest.skip("nvcc is not installed")
    return path


def machine_code(folder: str, *options: str) -> list[sass_report.Kernel]:
    """Compiles the kernels, warnings as errors, and reads what came out; skips where a tool is missing."""
    compiler = nvcc()
    try:
        sass_report.find_cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    targets = ["sida_cuda_kernels", "sida_cuda_shapes"]
    room = (
        build(folder, targets, "-DSIDA_CUDA=ON", *options, extra_path=str(Path(compiler).parent)) / "csrc/kernels/cuda"
    )
    return sass_report.read(room / "libsida_cuda_kernels.a", room / "sida_cuda_shapes")


def check_machine_code(kernels: list[sass_report.Kernel], archs: set[str]) -> None:
    """No spills, tensor cores, 16-byte copies, occupancy; and the instances that the harness has launched, no other."""
    assert {kernel.arch for kernel in kernels} == archs
    for arch in archs:
        layer = {kernel.label for kernel in kernels if kernel.arch == arch and kernel.tile}
        other = {kernel.name for kernel in kernels if kernel.arch == arch and not kernel.tile}
        assert layer == SHIPPED
        assert other == {"dispatch_plan_kernel", "route_top1_kernel"}
    assert sass_report.problems(kernels) == []


# The same list is in tests/cuda/kernels_test.cpp, which compares it with what the harness has launched.
SHIPPED = {
    *(
        f"expert_gemm {tile} {phase} {types}"
        for tile in ("decode", "medium", "large")
        for phase in ("hidden", "output")
        for types in ("bf16 x bf16", "bf16 x int8", "f16 x f16", "f16 x int8")
    ),
    *(f"expert_gemm_f32 {tokens} {phase} f32 x any" for tokens in (16, 64) for phase in ("hidden", "output")),
}


def test_machine_code_of_two_architectures() -> None:
    """The oldest one and the one with the most shared memory: about a minute of two cores."""
    kernels = machine_code("cuda-two", "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real")
    check_machine_code(kernels, {"sm_80", "sm_90"})


@pytest.mark.slow
def test_machine_code() -> None:
    check_machine_code(machine_code("cuda"), set(sass_report.ARCHITECTURES))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda_gpu_kernels_test", "cuda_gpu_route_test"])
def test_on_a_device(name: str) -> None:
    """The same property tests, on a GPU."""
    folder = build("cuda", [name], "-DSIDA_CUDA=ON", "-DSIDA_CPP_TESTS=ON", extra_path=str(Path(nvcc()).parent))
    done = subprocess.run([str(folder / "tests/cuda" / name)], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def loop_of(*body: str, before: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    code = [*before, *body, f"BRA 0x{16 * len(before):x}", "EXIT"]
    return [(16 * i, text) for i, text in enumerate(code)]


def good_kernel(**changes: object) -> sass_report.Kernel:
    fields: dict = {
        "arch": "sm_80",
        "name": "k",
        "tile": "decode",
        "registers": 64,
        "shared": 40000,
        "threads": 128,
        "instructions": loop_of("HMMA.16816.F32.BF16 R0", "LDSM.16.M88.4 R0", "LDGSTS.E.BYPASS.128 [R0]", "BAR.SYNC"),
    }
    return sass_report.Kernel(**{**fields, **changes})


def test_a_good_kernel_has_no_problems() -> None:
    assert sass_report.problems([good_kernel()]) == []
    assert good_kernel().counts()["HMMA"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"instructions": [*good_kernel().instructions, (400, "STL [R1], R2")]}, "1 local accesses"),
        ({"instructions": loop_of("LDSM.16 R0", "LDGSTS.E.128 [R0]", "FFMA R0")}, "no HMMA in the main loop"),
        ({"instructions": loop_of("HMMA R0", "LDS R0", "LDGSTS.E.128 [R0]")}, "no LDSM in the main loop"),
        (
            {"instructions": loop_of("HMMA R0", "LDSM R0", before=("LDGSTS.E.BYPASS.128 [R0]",))},
            "no LDGSTS in the main loop",
        ),
        ({"instructions": loop_of("HMMA R0", "LDSM R0", "LDGSTS.E.64 [R0]")}, "below 16 bytes"),
        ({"shared": 90000}, "1 blocks fit, 2 are stated"),
        ({"registers": 255, "threads": 256}, "1 blocks fit, 2 are stated"),
        ({"tile": "f32", "shared": 9000}, "expected FFMA"),
    ],
)
def test_problems_are_found(changes: dict, reason: str) -> None:
    found = sass_report.problems([good_kernel(**changes)])
    assert any(reason in line for line in found), found


def test_an_empty_library_is_a_problem() -> None:
    assert sass_report.problems([]) == ["no layer kernel in the library"]
