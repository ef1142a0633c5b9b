"""Memory of a measurement: a control group with a limit, what it holds at its peak, and what the page cache has of a
file."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

PAGE = 4096
ROOT = Path("/sys/fs/cgroup")
UNLIMITED = 2**62


class MemoryGroup:
    """A control group with a memory limit, v1 or v2; making one needs root.

    Anonymous memory (slots, weights, the interpreter's heap; pages under direct reads are among it) cannot be dropped.
    File pages (the page cache) fill whatever the limit leaves and are dropped when memory is needed, so that the
    group's own peak is its limit wherever files are read through the page cache. So both are watched apart.
    """

    def __init__(self, name: str = "sida_bench") -> None:
        self.v1 = (ROOT / "memory").is_dir()
        self.folder = (ROOT / "memory" if self.v1 else ROOT) / name
        self._limit = self.folder / ("memory.limit_in_bytes" if self.v1 else "memory.max")
        self._usage = self.folder / ("memory.usage_in_bytes" if self.v1 else "memory.current")
        self.folder.mkdir(exist_ok=True)

    def set_limit(self, limit: int) -> None:
        """Bytes; 0: none."""
        self._limit.write_text(str(limit or UNLIMITED) if self.v1 or limit else "max")

    def enter(self) -> None:
        """Move this process in."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def memory(self) -> dict[str, int]:
        """Bytes now: ``anonymous``, ``file`` (page cache) and ``all`` (with the kernel's own)."""
        counts = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        names = ("rss", "cache") if self.v1 else ("anon", "file")
        anonymous, file = (int(counts[name]) for name in names)
        return {"anonymous": anonymous, "file": file, "all": int(self._usage.read_text())}

    def remove(self) -> None:
        """Once nobody is in it any more."""
        for _ in range(100):
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"{self.folder} is still in use")


class Peak:
    """The most of each kind that was seen, for whoever calls ``look`` often enough."""

    def __init__(self, group: MemoryGroup) -> None:
        self._group = group
        self.bytes = {"anonymous": 0, "file": 0, "all": 0}

    def look(self) -> None:
        for name, value in self._group.memory().items():
            self.bytes[name] = max(self.bytes[name], value)


def cached_bytes(path: Path) -> int:
    """Bytes of a file that the page cache holds now."""
    size = path.stat().st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {path}")
    pages = (size + PAGE - 1) // PAGE
    held = (ctypes.c_ubyte * pages)()
    try:
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), held) != 0:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in bytes(held)) * PAGE


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
