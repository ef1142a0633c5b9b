"""The object files of the CPU kernels as the extension was built: what the linker may pick, which instructions and
registers the inner loops use, and that nothing in them lives on the stack."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from tests.support.machine_code import Loop, functions, innermost_loops, read, stack_accesses

ROOT = Path(__file__).resolve().parents[2]

# For each translation unit: its public functions, the multiply-adds of its inner loops, how they must look (Intel's
# syntax), in which functions, and how many loops there are at least.
UNITS = {
    # SSE2 has too few registers to widen other weights beside eight sums: only the fp32 tiles are held to this.
    "scalar": (["scalar_kernels"], r"mulps", r"mulps xmm\d+,", "Simd, (sida::DType)0", 12),
    "avx2": (["avx2_kernels"], r"vfmadd", r"vfmadd231ps ymm\d+,ymm\d+,ymm\d+$", "Tile<", 150),
    "avx512": (["avx512_kernels"], r"vfmadd", r"vfmadd231ps zmm\d+,zmm\d+,zmm\d+$", "Tile<", 100),
    # Unfolded weights only: where they unfold in the loop, AVX-512 has all registers full.
    "avx512_vnni": (["avx512_vnni_kernels"], r"vpdpbusd", r"vpdpbusd zmm\d+,zmm\d+,DWORD BCST", ", true>", 20),
    "avx512_bf16": (["avx512_bf16_kernels"], r"vdpbf16ps", r"vdpbf16ps zmm\d+,zmm\d+,zmm\d+$", "Tile<", 25),
    "amx": (["amx_kernels", "amx_fast_kernels"], r"tdpbf16ps", r"tdpbf16ps tmm[0-3],tmm[45],tmm[67]$", "multiply<", 16),
}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 machine code")


def kernel_object(name: str) -> str:
    """The newest one that an installation from this source tree has left behind."""
    found = sorted(ROOT.glob(f"build/ext-*/csrc/kernels/cpu/**/{name}.cpp.o"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip(
            f"no {name}.cpp.o under build/; install from the source tree: pip install --no-build-isolation -e ."
        )
    return str(found[-1])


def listing(name: str) -> str:
    return read("objdump", "-d", "-C", "-M", "intel", "--no-show-raw-insn", kernel_object(name))


def hot_loops(unit: str) -> list[Loop]:
    _, wanted, _, where, _ = UNITS[unit]
    found = functions(listing(f"kernels_{unit}"))
    return [loop for name, body in found.items() if where in name for loop in innermost_loops(name, body, wanted)]


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit != "scalar"])
def test_no_symbol_that_the_linker_could_choose_for_other_code(unit: str) -> None:
    """An inline function with external linkage, compiled for AVX, could replace the baseline's copy of it."""
    symbols = [line.split() for line in read("nm", "-C", kernel_object(f"kernels_{unit}")).splitlines()]
    # "address type name..." or "type name...": weak and unique ones are W, w, V, v and u.
    kinds = [
        (fields[0], fields[1:]) if len(fields[0]) == 1 else (fields[1], fields[2:]) for fields in symbols if fields
    ]
    assert [name for kind, name in kinds if kind in "WwVvu"] == []
    public = [f"sida::cpu::{name}()" for name in UNITS[unit][0]]
    assert sorted(" ".join(name) for kind, name in kinds if kind in "TDBR") == sorted(public)


@pytest.mark.parametrize(
    "name", ["kernels_scalar", "cpu_features", "instruction_set", "measure", "moe_ffn", "dispatch_plan"]
)
def test_baseline_code_uses_baseline_registers(name: str) -> None:
    assert not re.search(r"%([yz]|t)mm", read("objdump", "-d", "--no-show-raw-insn", kernel_object(name)))


@pytest.mark.parametrize("unit", UNITS)
def test_inner_loops_multiply_as_wide_as_the_set_can(unit: str) -> None:
    _, wanted, expected, _, count = UNITS[unit]
    loops = hot_loops(unit)
    assert len(loops) >= count
    for loop in loops:
        multiplies = [re.sub(r"\s+", " ", text) for text in loop.instructions if re.match(wanted, text)]
        assert [text for text in multiplies if not re.match(expected, text)] == [], loop.function


@pytest.mark.parametrize("unit", UNITS)
def test_inner_loops_keep_everything_in_registers(unit: str) -> None:
    """No sum, operand or address of a loop over columns is stored to the stack or loaded from it."""
    spilled = {loop.function: found for loop in hot_loops(unit) if (found := stack_accesses(loop))}
    assert spilled == {}


def test_tiles_are_given_back_wherever_they_are_configured() -> None:
    """Registers that still hold tiles would be saved at every switch of threads."""
    for name, body in functions(listing("kernels_amx")).items():
        texts = [text for _, text in body]
        if any(text.startswith("ldtilecfg") for text in texts):
            assert "project(" in name
            assert any(text.startswith("tilerelease") for text in texts), name
    for name in ("kernels_avx512", "kernels_avx512_bf16", "kernels_avx2"):
        assert not re.search(r"\btmm\d", listing(name))


LOOP_WITH_A_SPILL = """
0000000000000000 <Tile<f32>::run(float const*)>:
   0:\ttest   rdi,rdi
   3:\tje     30 <Tile<f32>::run(float const*)+0x30>
   8:\tvmovups ymm1,YMMWORD PTR [rdi]
   c:\tvfmadd231ps ymm0,ymm1,YMMWORD PTR [rsp+0x20]
  12:\tsub    rsi,0x1
  16:\tjne    8 <Tile<f32>::run(float const*)+0x8>
  18:\tvmovups YMMWORD PTR [rsp],ymm0
  1e:\tjmp    40 <Tile<f32>::run(float const*)+0x40>
  30:\tvfmadd231ps ymm0,ymm1,ymm2
  40:\tret
"""


def test_the_reader_finds_a_loop_and_its_spill() -> None:
    """The checks above are only worth what this finds: the loop without what is before, after and beside it."""
    ((name, body),) = functions(LOOP_WITH_A_SPILL).items()
    (loop,) = innermost_loops(name, body, r"vfmadd")
    assert [text.split()[0] for text in loop.instructions] == ["vmovups", "vfmadd231ps", "sub", "jne"]
    assert stack_accesses(loop) == ["vfmadd231ps ymm0,ymm1,YMMWORD PTR [rsp+0x20]"]
