"""Reads the machine code of the compiled CUDA kernels and prints what it needs and what its main loops do.

    python tools/sass_report.py [--library LIB] [--shapes PROGRAM] [--check] [--docs docs/cuda.md]
    python tools/sass_report.py --ptxas BUILD_LOG [--shapes PROGRAM]

The table has a line for each kernel and architecture: registers, shared memory of a block, blocks and warps that fit a
multiprocessor, local memory (spills), and the instructions of the main loop. ``--check`` fails if a hot kernel spills,
lacks tensor-core or asynchronous-copy instructions, loads less than 16 bytes at a time (but for the factors of 4-bit
weights), or fits less often than stated.

``cuobjdump`` comes with the CUDA toolkit; where it was left out, the packages ``nvidia-cuda-cuobjdump`` (with
``nvidia-cuda-nvdisasm``) and ``triton`` carry one. Without any, ``--ptxas`` reads what the assembler said while it
compiled (``-Xptxas -v``) and checks registers, spills and occupancy.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build/cuda/csrc/kernels/cuda/libsida_cuda_kernels.a"
SHAPES = ROOT / "build/cuda/csrc/kernels/cuda/sida_cuda_shapes"


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, table of compute capabilities)."""

    threads: int
    blocks: int
    shared_kib: int
    registers: int = 65536


ARCHITECTURES = {
    "sm_80": Multiprocessor(2048, 32, 164),
    "sm_86": Multiprocessor(1536, 16, 100),
    "sm_89": Multiprocessor(1536, 24, 100),
    "sm_90": Multiprocessor(2048, 32, 228),
    "sm_100": Multiprocessor(2048, 32, 228),
    "sm_120": Multiprocessor(1536, 24, 100),
}
# The runtime takes this much of every block's share for itself.
SHARED_RESERVED = 1024

# Blocks of each tile that must fit a multiprocessor, whatever the architecture.
STATED_BLOCKS = {"decode": 2, "medium": 1, "large": 1, "f32": 4}


@dataclass
class Kernel:
    """One instance in one architecture's machine code."""

    arch: str
    name: str
    tile: str = ""  # decode, medium, large, f32; empty for the small kernels
    tokens: str = ""
    weights: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    instructions: list[tuple[int, str]] = field(default_factory=list)
    _loop: list[str] | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.tokens} x {self.weights}" if self.tile else self.name

    @property
    def blocks(self) -> int:
        """Blocks that fit one multiprocessor; 0 where it depends on the launch, or is not known."""
        if not self.threads or not self.registers:
            return 0
        limit = ARCHITECTURES[self.arch]
        # Registers are given out to warps in units of 256.
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            limit.blocks,
            limit.threads // self.threads,
            limit.registers // (per_warp * self.threads // 32),
            limit.shared_kib * 1024 // (self.shared + SHARED_RESERVED),
        )

    @property
    def spills(self) -> int:
        return sum(text.startswith(("STL", "LDL")) for _, text in self.instructions)

    def main_loop(self) -> list[str]:
        """The loop that multiplies: the one with the most HMMA, else the one made of FFMA more than any other. Where it
        is inside of a loop that starts copies, that one: a stage."""
        if self._loop is not None:
            return self._loop
        best: list[str] = []
        worth = (0, False, 0.0)
        for address, text in self.instructions:
            jump = re.match(r"BRA(?:\.\w+)*\s+(?:[!U]*P\w*,\s*)?`?\(?(?:0x)?([0-9a-f]+)", text)
            if not jump or int(jump.group(1), 16) >= address:
                continue
            body = [t for a, t in self.instructions if int(jump.group(1), 16) <= a <= address]
            # Among loops with the same multiplications the inner one is denser.
            tensor = sum(t.startswith("HMMA") for t in body)
            stage = tensor > 0 and any(t.startswith("LDGSTS") for t in body)
            own = (tensor, stage, (tensor or sum(t.startswith("FFMA") for t in body)) / len(body))
            if own > worth:
                best, worth = body, own
        self._loop = best
        return best

    def counts(self) -> Counter[str]:
        return Counter(text.split()[0].split(".")[0] for text in self.main_loop())


def find_cuobjdump() -> str:
    """Path of cuobjdump: $CUOBJDUMP, PATH, the toolkit, or a package's copy. Raises FileNotFoundError."""
    candidates = [os.environ.get("CUOBJDUMP"), shutil.which("cuobjdump")]
    candidates += [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")]
    for package, inside in (("nvidia", "cu*/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            candidates += sorted(map(str, Path(folder).glob(inside)))
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise FileNotFoundError(
        "cuobjdump was not found in $CUOBJDUMP, PATH, $CUDA_HOME/bin or the packages nvidia and triton; "
        "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def run(command: list[str]) -> str:
    # cuobjdump looks for nvdisasm on PATH; both lie in one folder.
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


TYPES = {"bf16": "bf16", "f16": "f16", "signed char": "int8", "int4_pair": "int4", "mxfp4_pair": "mxfp4"}
# Bytes of a factor of 4-bit weights, as the code that loads it says.
FACTORS = {"int4": "LDG.E.U16", "mxfp4": "LDG.E.U8"}
TILES = {16: "decode", 64: "medium", 128: "large"}


def describe(kernel: Kernel, demangled: str, shapes: dict[tuple[str, str, int], tuple[int, int]]) -> None:
    """Fills in what the kernel's name and the table of shapes tell."""
    kernel.name = re.sub(r"\(.*$", "", demangled.replace("(sida::cuda::Phase)", "phase ")).split("::")[-1]
    plain = demangled.replace("sida::cuda::", "")
    gemm = re.search(r"expert_gemm<(\w+), ([\w ]+), GemmShape<\d+, (\d+),.*>, \(Phase\)(\d)>", plain)
    f32 = re.search(r"expert_gemm_f32<(\d+), \(Phase\)(\d)>", plain)
    if gemm:
        kernel.tokens, kernel.weights = TYPES[gemm[1]], TYPES[gemm[2]]
        block_t, phase = int(gemm[3]), "output" if gemm[4] == "1" else "hidden"
        kernel.tile, kernel.name = TILES[block_t], f"expert_gemm {TILES[block_t]} {phase}"
    elif f32:
        kernel.tokens, kernel.weights, block_t = "f32", "any", int(f32[1])
        kernel.tile, kernel.name = "f32", f"expert_gemm_f32 {block_t} {'output' if f32[2] == '1' else 'hidden'}"
    else:
        return
    kernel.threads, kernel.shared = shapes[kernel.tokens, kernel.weights, block_t]


def named(kernels: dict[tuple[str, str], Kernel], shapes_program: Path) -> list[Kernel]:
    """The kernels, by (architecture, mangled name), with names and shapes filled in, in the order of the table."""
    shapes = {}
    for line in run([str(shapes_program)]).splitlines():
        tokens, weights, _, block_t, threads, shared = line.split()
        shapes[tokens, weights, int(block_t)] = (int(threads), int(shared))
    mangled = sorted({name for _, name in kernels})
    demangled = dict(zip(mangled, run(["c++filt", *mangled]).splitlines(), strict=True)) if mangled else {}
    for (_, name), kernel in kernels.items():
        describe(kernel, demangled[name], shapes)
    order = {arch: i for i, arch in enumerate(ARCHITECTURES)}
    return sorted(kernels.values(), key=lambda k: (not k.tile, k.label, order.get(k.arch, 99)))


def read_ptxas(log: str, shapes_program: Path) -> list[Kernel]:
    """All kernels that the assembler reported, without their code; of several reports of one kernel the last counts."""
    kernels: dict[tuple[str, str], Kernel] = {}
    current: Kernel | None = None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(sm_\d+)'", line):
            current = kernels[found[2], found[1]] = Kernel(found[2], found[1])
        elif current is not None and (found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", line)):
            current.stack = max(int(found[1]), int(found[2]))
        elif current is not None and (found := re.search(r"Used (\d+) registers", line)):
            current.registers = int(found[1])
    return named(kernels, shapes_program)


def read(library: Path, shapes_program: Path) -> list[Kernel]:
    """All kernels of a library, for every architecture in it."""
    cuobjdump = find_cuobjdump()
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = ""
    current: Kernel | None = None
    for line in run([cuobjdump, "-res-usage", str(library)]).splitlines():
        if found := re.match(r"\s*arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            current = kernels[arch, found[1]] = Kernel(arch, found[1])
        elif current is not None and (found := re.search(r"REG:(\d+) STACK:(\d+)", line)):
            current.registers, current.stack = int(found[1]), int(found[2])
    current = None
    for line in run([cuobjdump, "-sass", str(library)]).splitlines():
        if found := re.match(r"\s*arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            current = kernels[arch, found[1]]
        elif current is not None and (found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*);", line)):
            current.instructions.append((int(found[1], 16), found[2].strip()))
    return named(kernels, shapes_program)


def resource_problems(kernels: list[Kernel]) -> list[str]:
    """What is wrong with registers, local memory, occupancy, or the set of kernels; empty if all is as stated."""
    found = []
    if not any(kernel.tile for kernel in kernels):
        found.append("no layer kernel in the library")
    labels = {kernel.label for kernel in kernels}
    for arch in sorted({kernel.arch for kernel in kernels}):
        for label in sorted(labels - {kernel.label for kernel in kernels if kernel.arch == arch}):
            found.append(f"{label} was not compiled for {arch}")
    for kernel in kernels:
        where = f"{kernel.label} on {kernel.arch}"
        if kernel.stack or kernel.spills:
            found.append(f"{where}: {kernel.stack} bytes of stack and {kernel.spills} local accesses, expected none")
        if not kernel.tile:
            continue  # once a layer, over a few integers: not hot, and the launch chooses its threads
        if not kernel.registers or kernel.blocks < STATED_BLOCKS[kernel.tile]:
            found.append(
                f"{where}: {kernel.blocks} blocks of {kernel.registers} registers fit, {STATED_BLOCKS[kernel.tile]} "
                "are stated"
            )
    return found


def problems(kernels: list[Kernel]) -> list[str]:
    """What is wrong with the machine code; empty if all is as stated."""
    found = resource_problems(kernels)
    for kernel in kernels:
        if not kernel.tile:
            continue
        where = f"{kernel.label} on {kernel.arch}"
        counts = kernel.counts()
        loop = kernel.main_loop()
        if kernel.tile == "f32":
            if not counts["FFMA"] or not any(t.startswith("LDG.E.128") for _, t in kernel.instructions):
                found.append(f"{where}: expected FFMA in the main loop and 16-byte global loads")
            continue
        missing = [name for name in ("HMMA", "LDSM", "LDGSTS") if not counts[name]]
        if missing:
            found.append(f"{where}: no {', '.join(missing)} in the main loop")
        narrow = [t for t in loop if t.startswith(("LDG.", "LDGSTS.")) and ".128" not in t]
        if kernel.weights in FACTORS:
            # A thread brings one factor a step; everything else comes as for the other types.
            factors = [t for t in narrow if t.startswith(FACTORS[kernel.weights])]
            if len(factors) != 1:
                found.append(f"{where}: {len(factors)} loads of factors in the main loop, expected 1")
            narrow = [t for t in narrow if t not in factors]
        if narrow:
            found.append(f"{where}: global loads below 16 bytes in the main loop: {narrow[0]}")
    return found


SHOWN = ("HMMA", "FFMA", "LDSM", "LDS", "LDGSTS", "LDG", "BAR")


def table(kernels: list[Kernel]) -> str:
    """The report as a Markdown table."""
    head = ["kernel", "arch", "registers", "shared B", "blocks/SM", "warps/SM", "local", "loop", *SHOWN]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kernel in kernels:
        counts = kernel.counts()
        fits = [str(kernel.blocks), str(kernel.blocks * kernel.threads // 32)] if kernel.threads else ["", ""]
        loop = [str(len(kernel.main_loop())), *(str(counts[name]) for name in SHOWN)] if kernel.tile else [""] * 8
        shared = str(kernel.shared) if kernel.tile else ""
        row = [kernel.label, kernel.arch, str(kernel.registers), shared, *fits, str(kernel.spills), *loop]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def write_docs(path: Path, kernels: list[Kernel]) -> None:
    """Puts the table in the place of the one in `path`; fp16 is left out, it is like bf16."""
    text = path.read_text()
    shown = table([kernel for kernel in kernels if kernel.tokens != "f16"])
    old = re.search(r"^\| kernel \| arch \|.*\n(?:\|.*\n)*", text, re.MULTILINE)
    if old is None:
        raise ValueError(f"{path} has no table that begins with '| kernel | arch |'")
    path.write_text(text[: old.start()] + shown + "\n" + text[old.end() :])


def check_ptxas(log: Path, shapes: Path) -> int:
    kernels = read_ptxas(log.read_text(), shapes)
    archs = {kernel.arch for kernel in kernels}
    found = [f"no kernel was compiled for {arch}" for arch in ARCHITECTURES if arch not in archs]
    found += resource_problems(kernels)
    hot = [kernel for kernel in kernels if kernel.tile]
    print(
        "\n".join(found)
        if found
        else f"ptxas: {len(kernels)} kernels for {len(archs)} architectures; the {len(hot)} of a layer use at most "
        f"{max(kernel.registers for kernel in hot)} registers, no local memory, and fit as often as stated"
    )
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--shapes", type=Path, default=SHAPES)
    parser.add_argument("--arch", help="only this one, such as sm_90")
    parser.add_argument("--check", action="store_true", help="exit with 1 and the reasons if the code is not as stated")
    parser.add_argument("--docs", type=Path, help="put the table into this file, in the place of the one there")
    parser.add_argument("--ptxas", type=Path, help="check what the assembler said in this log of a build, and no more")
    options = parser.parse_args()
    for path in (options.ptxas or options.library, options.shapes):
        if not path.exists():
            print(f"{path} does not exist; build the targets sida_cuda_kernels and sida_cuda_shapes", file=sys.stderr)
            return 2
    if options.ptxas is not None:
        return check_ptxas(options.ptxas, options.shapes)
    kernels = read(options.library, options.shapes)
    print(table([kernel for kernel in kernels if options.arch in (None, kernel.arch)]))
    if options.docs is not None:
        write_docs(options.docs, kernels)
    if not options.check:
        return 0
    found = problems(kernels)
    print("\n".join(found) if found else "the machine code is as stated", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
