"""How much anonymous memory packing takes above the interpreter's: ``python -m bench.engine.pack_memory CHECKPOINT
STORE``."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

from sida_ext.models.packing import pack
from sida_ext.progress import progress_bar


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("store", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        with progress_bar("packing, experts") as bar:
            header = pack(arguments.checkpoint, arguments.store, arguments.dtype, progress=bar)
    finally:
        done.set()
        watcher.join()
    print(
        f"{header.experts_bytes / 2**30:.2f} GiB in {time.perf_counter() - begin:.0f} s; anonymous memory: "
        f"{before / 2**20:.0f} MiB before, at most {(peak - before) / 2**20:.0f} MiB more while packing"
    )


if __name__ == "__main__":
    main()
