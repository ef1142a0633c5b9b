"""Identity of weight files: a hash of all their bytes, computed once and remembered.

A file is known again by its path, inode, size and times of change, so that a checkpoint of 60 GB is hashed at its first
use alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sida_ext.experts.folders import default_cache
from sida_ext.files import written_whole

__all__ = ["identity_of"]

log = logging.getLogger("sida_ext")

BUFFER = 4 << 20
# A file may change again within the clock's granularity and keep its times: what changed so recently is not remembered.
SETTLED_NS = 100_000_000


def _facts(path: Path) -> dict[str, int | str]:
    stat = path.stat()
    return {
        "path": str(path),
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER))
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def _remembered(entry: Path, facts: dict[str, int | str]) -> str | None:
    try:
        known = json.loads(entry.read_text())
    except (OSError, ValueError):  # none yet, or one that cannot be read: it costs time, nothing else
        return None
    if not isinstance(known, dict) or {name: known.get(name) for name in facts} != facts:
        return None
    digest = known.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _digest(path: Path, folder: Path) -> str:
    path = path.resolve()
    entry = folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    facts = _facts(path)
    digest = _remembered(entry, facts)
    if digest is not None:
        return digest
    begin = time.time_ns()
    digest = _hash(path)
    if _facts(path) != facts:
        raise ValueError(f"{path} changed while it was read; wait until its writer is done")
    if begin - max(int(facts["mtime_ns"]), int(facts["ctime_ns"])) > SETTLED_NS:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(entry) as partial:
                partial.write_text(json.dumps({**facts, "sha256": digest}))
        except OSError as error:
            log.info("the hash of %s cannot be remembered and will be computed anew: %s", path, error)
    return digest


def identity_of(paths: Iterable[Path], cache: Path | None = None) -> str:
    """SHA-256 over the SHA-256 of every file, whatever the files are called and in whatever order they come.

    Args:
        cache: folder of the remembered hashes, made at need; None: ``identities`` in the cache of packed stores.

    Raises:
        OSError: a file cannot be read. ValueError: a file changed while it was read.
    """
    folder = cache if cache is not None else default_cache() / "identities"
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = sorted(pool.map(lambda path: _digest(path, folder), set(paths)))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
