"""Memory budgets: ``"2GiB"``, ``"25%"``, ``"auto"`` or a number of bytes."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["available_memory", "cgroup_room", "format_bytes", "parse_bytes", "parse_memory"]

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
# "auto" leaves this much of the free memory to activations, the page tables and everybody else.
AUTO_RESERVE_BYTES, AUTO_RESERVE_SHARE = 512 << 20, 0.10


def format_bytes(count: float) -> str:
    """``1.50 GiB``, ``131.0 KiB``: bytes with the unit that reads best."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def parse_bytes(text: str | int, name: str = "size") -> int:
    """A number of bytes from ``2147483648``, ``"2GiB"``, ``"1.5 GB"``.

    Raises:
        ValueError: names the argument and the value.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"{name} is {text!r}, expected bytes as an int or a string such as '2GiB'")
    if isinstance(text, int):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(f"{name} is {text!r}, expected bytes or a size such as '2GiB', '500MB'")
        value = float(match[1]) * UNITS[match[2].lower()]
    if value < 0:
        raise ValueError(f"{name} is {text!r}, expected 0 or more")
    return int(value)


def cgroup_room(root: Path = Path("/")) -> int | None:
    """Bytes left under the memory limits of this process's control groups, v2 or v1; None without a limit.

    File pages that were not used lately count as free: the kernel drops them before it refuses memory.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    room: int | None = None
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A limit of any group on the way up binds; inside a container the path may not be visible.
        folder = mount / group.lstrip("/")
        for parent in (folder, *folder.parents):
            if not parent.is_relative_to(mount):
                break
            left = _room_of_group(parent, *files)
            if left is not None:
                room = left if room is None else min(room, left)
    return room


def _room_of_group(folder: Path, limit_name: str, usage_name: str, idle_name: str) -> int | None:
    try:
        limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
    except OSError:
        return None
    if limit == "max" or int(limit) >= 2**60:
        return None
    try:
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        counts = {}
    return max(0, int(limit) - usage + min(usage, int(counts.get(idle_name, 0))))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated now: the kernel's estimate, or what the control groups leave, if that is less.

    Args:
        root: where ``proc`` and ``sys`` are.

    Raises:
        RuntimeError: the kernel gives no estimate.
    """
    available = None
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if available is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable; give expert_memory in bytes instead of 'auto'")
    room = cgroup_room(root)
    return available if room is None else min(available, room)


def parse_memory(
    budget: str | int, experts_bytes: int, name: str = "expert_memory", *, reserved: int = 0, free: int | None = None
) -> int:
    """Bytes of a memory budget.

    Args:
        budget: bytes, ``"2GiB"``, ``"25%"`` (of the bytes of all experts) or ``"auto"`` (the memory that is free now,
            control groups respected, less a reserve of 512 MiB and 10 %; at most all experts).
        experts_bytes: bytes of all experts.
        reserved: bytes that are about to be allocated for something else; ``"auto"`` leaves them free. Negative: bytes
            that the expert memory holds already, and may keep.
        free: bytes that are free now where the budget is taken; None: of this machine's memory.
    """
    if isinstance(budget, str) and budget.strip() == "auto":
        free = (available_memory() if free is None else free) - reserved
        return min(experts_bytes, max(0, int(free - AUTO_RESERVE_BYTES - AUTO_RESERVE_SHARE * free)))
    if isinstance(budget, str) and budget.strip().endswith("%"):
        try:
            share = float(budget.strip()[:-1])
        except ValueError:
            share = -1.0
        if not 0 < share <= 100:
            raise ValueError(f"{name} is {budget!r}, expected a share above 0% and up to 100% of the experts")
        return round(experts_bytes * share / 100)
    try:
        return parse_bytes(budget, name)
    except ValueError as error:
        raise ValueError(f"{error}, a share such as '25%', or 'auto'") from None
