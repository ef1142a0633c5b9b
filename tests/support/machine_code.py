"""Loops of disassembled functions: basic blocks, dominators, natural loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

__all__ = ["Loop", "functions", "innermost_loops", "read", "stack_accesses"]

X86_JUMP = re.compile(r"(?:bnd )?(j\w+)\s+([0-9a-f]+)\b")
ARM_JUMP = re.compile(r"(b(?:\.\w+)?|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+)\s+<")
ENDS = re.compile(r"(?:bnd )?(ret|jmp|ud2|hlt)\b|(b|br|ret)\b(?!\.)")


@dataclass(frozen=True)
class Loop:
    function: str
    blocks: tuple[tuple[str, ...], ...]  # instructions of each basic block
    has_frame: bool  # rbp holds the frame

    @property
    def instructions(self) -> list[str]:
        return [text for block in self.blocks for text in block]


def read(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} not found; it comes with binutils")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=300).stdout


def functions(listing: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of every function of `objdump -d --no-show-raw-insn`."""
    found: dict[str, list[tuple[int, str]]] = {}
    body: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = found.setdefault(head[1], [])
        elif instruction := re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line):
            body.append((int(instruction[1], 16), instruction[2]))
    return found


def basic_blocks(body: list[tuple[int, str]]) -> tuple[list[tuple[str, ...]], list[list[int]]]:
    """The blocks of a function, and for each the blocks that may follow it. A jump out of the function ends it."""
    where = {address: i for i, (address, _) in enumerate(body)}
    targets: dict[int, int] = {}
    for i, (_, text) in enumerate(body):
        jump = X86_JUMP.match(text) or ARM_JUMP.match(text)
        if jump is not None and int(jump[2], 16) in where:
            targets[i] = where[int(jump[2], 16)]
    is_end = [i in targets or ENDS.match(text) is not None for i, (_, text) in enumerate(body)]
    starts = sorted({0, *targets.values(), *(i + 1 for i, end in enumerate(is_end) if end and i + 1 < len(body))})
    number = {start: n for n, start in enumerate(starts)}
    blocks, followers = [], []
    for n, start in enumerate(starts):
        stop = starts[n + 1] if n + 1 < len(starts) else len(body)
        blocks.append(tuple(text for _, text in body[start:stop]))
        after = [number[targets[stop - 1]]] if stop - 1 in targets else []
        if stop < len(body) and ENDS.match(body[stop - 1][1]) is None:
            after.append(number[stop])
        followers.append(after)
    return blocks, followers


def dominators(followers: list[list[int]]) -> list[set[int]]:
    """For each block the blocks that every way to it passes; empty for one that nothing leads to."""
    order: list[int] = []
    seen: set[int] = set()
    stack = [(0, iter(followers[0]))]
    seen.add(0)
    while stack:
        block, rest = stack[-1]
        after = next((b for b in rest if b not in seen), None)
        if after is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(followers[after])))
    before: list[list[int]] = [[] for _ in followers]
    for block in seen:
        for after in followers[block]:
            before[after].append(block)
    found: list[set[int]] = [set(seen) if b in seen else set() for b in range(len(followers))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            if block == 0:
                continue
            new = set.intersection(*(found[b] for b in before[block])) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


def innermost_loops(function: str, body: list[tuple[int, str]], wanted: str) -> list[Loop]:
    """The natural loops with an instruction that matches `wanted` and no other such loop inside them."""
    blocks, followers = basic_blocks(body)
    dominating = dominators(followers)
    before: list[list[int]] = [[] for _ in blocks]
    for block, after in enumerate(followers):
        for b in after:
            before[b].append(block)
    loops: dict[int, set[int]] = {}
    for block, after in enumerate(followers):
        for head in after:
            if head not in dominating[block]:
                continue
            members, work = {head}, [block]
            while work:
                b = work.pop()
                if b not in members:
                    members.add(b)
                    work.extend(before[b])
            loops.setdefault(head, set()).update(members)
    hot = [m for m in loops.values() if any(re.match(wanted, text) for b in m for text in blocks[b])]
    has_frame = any(re.match(r"mov\s+rbp,rsp", text) for _, text in body)
    return [
        Loop(function, tuple(blocks[b] for b in sorted(members)), has_frame)
        for members in hot
        if not any(other < members for other in hot)
    ]


def stack_accesses(loop: Loop) -> list[str]:
    """The instructions of a loop that load from the stack or store to it. A frame pointer counts where the function
    has a frame."""
    stack = r"\[(?:rsp|sp|x29)\b" + (r"|\[rbp\b" if loop.has_frame else "")
    return [text for text in loop.instructions if re.search(stack, text) and not text.startswith("lea")]
