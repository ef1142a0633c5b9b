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

from sida_ext import _C
from tests.support.native_build import ROOT, TOOLS, build, tests_folder
from tools import sass_report

TESTS = [
    "cuda_kernels_test",
    "cuda_route_test",
    "cuda_plan_test",
    "cuda_planted_test",
    "cuda_harness_test",
    "cuda_heuristics_test",
    "cuda_slots_test",
    "cuda_serving_test",
    "cuda_stream_mutants_test",
]


@pytest.fixture(scope="session")
def harness_build() -> Path:
    return build(tests_folder(), [*TESTS, "cuda_record_counts"], "-DSIDA_CPP_TESTS=ON") / "tests" / "cuda"


@pytest.mark.check
@pytest.mark.parametrize("name", TESTS)
def test_on_the_cpu(harness_build: Path, name: str) -> None:
    done = subprocess.run([str(harness_build / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed", done.stdout.strip().splitlines()[-1])


@pytest.mark.check
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


def need_tools() -> str:
    """nvcc; skips where it or cuobjdump is missing."""
    compiler = nvcc()
    try:
        sass_report.find_cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return compiler


def read_machine_code(folder: Path) -> list[sass_report.Kernel]:
    room = folder / "csrc/kernels/cuda"
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
    *(
        f"expert_gemm {tile} {phase} {tokens} x {weights}"
        for tile in ("decode", "medium")
        for phase in ("hidden", "output")
        for tokens in ("bf16", "f16")
        for weights in ("int4", "mxfp4")
    ),
    *(f"expert_gemm_f32 {tokens} {phase} f32 x any" for tokens in (16, 64) for phase in ("hidden", "output")),
}


@pytest.mark.check
def test_machine_code() -> None:
    """Of every architecture where `make cuda-build` has compiled these sources; else of the oldest one and the one with
    the most shared memory, which takes two cores about a minute."""
    compiler = need_tools()
    current = subprocess.run([shutil.which("bash") or "bash", str(ROOT / "tools/cuda_build.sh"), "--is-current"])
    if current.returncode == 0:
        check_machine_code(read_machine_code(ROOT / "build/cuda"), set(sass_report.ARCHITECTURES))
    else:
        targets, options = ["sida_cuda_kernels", "sida_cuda_shapes"], "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real"
        folder = build("cuda-two", targets, "-DSIDA_CUDA=ON", options, extra_path=str(Path(compiler).parent))
        check_machine_code(read_machine_code(folder), {"sm_80", "sm_90"})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda_gpu_kernels_test", "cuda_gpu_route_test"])
def test_on_a_device(name: str) -> None:
    """The same property tests, on a GPU."""
    # Where the extension has CUDA its folder has these kernels compiled, for the device that is there.
    folder = build(
        tests_folder() if _C.cuda_built else "cuda",
        [name],
        "-DSIDA_CUDA=ON",
        "-DSIDA_CPP_TESTS=ON",
        extra_path=str(Path(nvcc()).parent),
    )
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
        ({"shared": 90000}, "blocks of 64 registers fit, 2 are stated"),
        ({"registers": 255, "threads": 256}, "1 blocks of 255 registers fit, 2 are stated"),
        ({"tile": "f32", "shared": 9000}, "expected FFMA"),
    ],
)
def test_problems_are_found(changes: dict, reason: str) -> None:
    found = sass_report.problems([good_kernel(**changes)])
    assert any(reason in line for line in found), found


FOUR_BITS = [text for _, text in good_kernel().instructions[:-2]]


@pytest.mark.parametrize(
    ("weights", "loads", "reason"),
    [
        ("int4", ["LDG.E.U16.CONSTANT R0"], None),
        ("mxfp4", ["LDG.E.U8 R0"], None),
        ("int4", [], "0 loads of factors"),
        ("int4", ["LDG.E.U16 R0", "LDG.E.U16 R0"], "2 loads of factors"),
        ("mxfp4", ["LDG.E.U8 R0", "LDG.E R0"], "below 16 bytes"),
        ("int8", ["LDG.E.U16 R0"], "below 16 bytes"),
    ],
)
def test_factors_are_the_only_narrow_loads(weights: str, loads: list[str], reason: str | None) -> None:
    found = sass_report.problems([good_kernel(weights=weights, instructions=loop_of(*FOUR_BITS, *loads))])
    assert (found == []) if reason is None else any(reason in line for line in found), found


def test_the_main_loop_is_a_stage_that_may_hold_a_loop() -> None:
    inner = [(16 * i, text) for i, text in enumerate(["LDGSTS.E.128 [R0]", "HMMA R0", "LDSM R0", "BRA 0x10"])]
    stage = [*inner, (64, "BAR.SYNC"), (80, "BRA 0x0"), (96, "EXIT")]
    assert good_kernel(instructions=stage).counts() == {"LDGSTS": 1, "HMMA": 1, "LDSM": 1, "BRA": 2, "BAR": 1}
    assert good_kernel(instructions=inner).counts()["LDGSTS"] == 0


def test_an_empty_library_is_a_problem() -> None:
    assert sass_report.problems([]) == ["no layer kernel in the library"]


# What the assembler says of two kernels, as nvcc passes it on; the second kernel was compiled again later.
PTXAS_LOG = """\
ptxas info    : Compiling entry function '{layer}' for 'sm_80'
ptxas info    : Function properties for {layer}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 93 registers, used 1 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '{plan}' for 'sm_80'
ptxas info    : Function properties for {plan}
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '{plan}' for 'sm_80'
ptxas info    : Function properties for {plan}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 368 bytes cmem[0]
"""
MANGLED = {
    "layer": "_ZN4sida4cuda15expert_gemm_f32ILi16ELNS0_5PhaseE0EEEvNS0_11LayerParamsE",
    "plan": "_ZN4sida4cuda20dispatch_plan_kernelENS0_10PlanParamsE",
}


def shapes_program(folder: Path) -> Path:
    program = folder / "shapes"
    program.write_text("#!/bin/sh\necho f32 any 64 16 128 11920\n")
    program.chmod(0o755)
    return program


def test_the_assemblers_report_is_read(tmp_path: Path) -> None:
    layer, plan = sass_report.read_ptxas(PTXAS_LOG.format(**MANGLED), shapes_program(tmp_path))
    assert (layer.label, layer.arch, layer.registers, layer.stack) == (
        "expert_gemm_f32 16 hidden f32 x any",
        "sm_80",
        93,
        0,
    )
    assert (layer.threads, layer.shared, layer.blocks) == (128, 11920, 5)
    assert (plan.label, plan.registers, plan.stack) == ("dispatch_plan_kernel", 31, 0)
    assert sass_report.resource_problems([layer, plan]) == []


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("0 bytes stack frame", "8 bytes stack frame", "8 bytes of stack"),
        ("0 bytes spill stores", "24 bytes spill stores", "24 bytes of stack"),
        ("93 registers", "200 registers", "2 blocks of 200 registers fit, 4 are stated"),
        ("Used 93 registers", "", "0 registers fit"),
        ("'{layer}' for 'sm_80'", "'{layer}' for 'sm_90'", "dispatch_plan_kernel was not compiled for sm_90"),
    ],
)
def test_the_assemblers_report_is_checked(tmp_path: Path, before: str, after: str, reason: str) -> None:
    log = PTXAS_LOG.replace(before, after, 1).format(**MANGLED)
    found = sass_report.resource_problems(sass_report.read_ptxas(log, shapes_program(tmp_path)))
    assert any(reason in line for line in found), found


def test_a_report_that_lacks_an_architecture_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "ptxas.log"
    log.write_text(PTXAS_LOG.format(**MANGLED))
    assert sass_report.check_ptxas(log, shapes_program(tmp_path)) == 1
    assert "no kernel was compiled for sm_120" in capsys.readouterr().out


def test_the_table_in_a_document_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n| kernel | arch | old |\n|---|---|---|\n| x | y | z |\n\nafter\n")
    sass_report.write_docs(page, [good_kernel(name="a", tokens="bf16"), good_kernel(name="b", tokens="f16")])
    text = page.read_text()
    assert text.startswith("before\n\n| kernel | arch | registers |")
    assert text.endswith("|\n\nafter\n")
    assert "| a bf16" in text
    assert "old" not in text
    assert "| b f16" not in text


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("cuda_build.sh", "cuda-build: skipped, no nvcc on PATH or in /nowhere"),
        ("cuda_extension.sh", "cuda-extension: skipped, "),
    ],
)
def test_without_a_compiler_the_builds_say_so_and_end_well(script: str, said: str) -> None:
    path = os.pathsep.join(p for p in TOOLS.split(os.pathsep) if not (Path(p) / "nvcc").exists())
    environment = {**os.environ, "PATH": path, "CUDA_HOME": "/nowhere", "PYTHON": sys.executable}
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(ROOT / "tools" / script)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said)
    assert len(done.stdout.strip().splitlines()) == 1
