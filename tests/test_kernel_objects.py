"""The object files of the CPU kernels: what the linker may pick, which registers the loops use."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETS = {"avx2": "ymm", "avx512": "zmm"}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 machine code")


def read(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} not found; it comes with binutils")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=300).stdout


def kernel_object(name: str) -> str:
    """The newest one that an installation from this source tree has left behind."""
    found = sorted(ROOT.glob(f"build/ext-*/csrc/kernels/cpu/**/{name}.cpp.o"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip(
            f"no {name}.cpp.o under build/; install from the source tree: pip install --no-build-isolation -e ."
        )
    return str(found[-1])


@pytest.mark.parametrize("instructions", SETS)
def test_no_symbol_that_the_linker_could_choose_for_other_code(instructions: str) -> None:
    """An inline function with external linkage, compiled for AVX, could replace the baseline's copy of it."""
    symbols = [line.split() for line in read("nm", "-C", kernel_object(f"kernels_{instructions}")).splitlines()]
    # "address type name..." or "type name...": weak and unique ones are W, w, V, v and u.
    kinds = [
        (fields[0], fields[1:]) if len(fields[0]) == 1 else (fields[1], fields[2:]) for fields in symbols if fields
    ]
    assert [name for kind, name in kinds if kind in "WwVvu"] == []
    assert [name for kind, name in kinds if kind in "TDBR"] == [[f"sida::cpu::{instructions}_kernels()"]]


@pytest.mark.parametrize("name", ["kernels_scalar", "instruction_set", "measure", "moe_ffn", "dispatch_plan"])
def test_baseline_code_uses_baseline_registers(name: str) -> None:
    assert not re.search(r"%[yz]mm", read("objdump", "-d", "--no-show-raw-insn", kernel_object(name)))


def inner_loops(listing: str) -> list[tuple[str, list[str]]]:
    """(function, instructions) of every loop with multiply-adds in a tile that has no loop with some inside it."""
    functions: dict[str, list[tuple[int, str]]] = {}
    body: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = functions.setdefault(head[1], [])
        elif instruction := re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line):
            body.append((int(instruction[1], 16), instruction[2]))
    loops = []
    for function, body in functions.items():
        if "Tile<" not in function:
            continue
        where = {address: i for i, (address, _) in enumerate(body)}
        spans = []
        for end, (_, text) in enumerate(body):
            jump = re.match(r"j\w+\s+([0-9a-f]+)\b", text)
            begin = where.get(int(jump[1], 16)) if jump else None
            if begin is not None and begin <= end and any(t.startswith("vfmadd") for _, t in body[begin : end + 1]):
                spans.append((begin, end))
        for begin, end in spans:
            if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans):
                loops.append((function, [text for _, text in body[begin : end + 1]]))
    return loops


@pytest.mark.parametrize(("instructions", "register"), SETS.items())
def test_inner_loops_are_as_wide_as_the_registers(instructions: str, register: str) -> None:
    listing = read("objdump", "-d", "-C", "-M", "intel", "--no-show-raw-insn", kernel_object(f"kernels_{instructions}"))
    loops = inner_loops(listing)
    # Two loops of two functions for each shape of a tile and dtype of weights.
    assert len(loops) >= 100
    for function, body in loops:
        sums = [text for text in body if text.startswith("vfmadd")]
        assert all(re.match(rf"vfmadd231ps {register}\d+,", text) for text in sums), function
