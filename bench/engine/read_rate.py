"""How near the engine's lanes come to the disk: ``python -m bench.engine.read_rate STORE``, about a minute.

The engine reads every expert of two layers ahead, as an announced batch wants them, into slots that were used before.
Others are read by plain direct reads, with as many threads and as much at once as the plan of the engine picked as the
disk's best, in the same order and unchecked. The two take turns over parts of the file that were not read before: a
host's cache under a virtual disk would flatter whoever reads second. The engine checks every record and evicts what was
there.
"""

from __future__ import annotations

import argparse
import mmap
import os
import threading
import time
from itertools import count
from pathlib import Path

from sida_ext import _C
from sida_ext.experts.read_plan import read_plan
from sida_ext.experts.store import StoreHeader, open_store


def plain_rate(path: Path, begin: int, size: int, readers: int, piece: int) -> float:
    """Bytes a second of plain direct reads of a part of the file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    turn = count()

    def run() -> None:
        with mmap.mmap(-1, piece) as buffer:
            while (at := next(turn) * piece) < size:
                os.preadv(descriptor, [buffer], begin + at)

    start = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    os.close(descriptor)
    return size / seconds


def warm_engine(path: Path, header: StoreHeader, slots: int) -> _C.TransferEngine:
    """An engine all of whose slots hold the experts of the last layers: their pages are there."""
    plan = read_plan(path)
    store, _ = open_store(path)
    engine = _C.TransferEngine(
        store,
        slots=slots,
        lanes=plan.lanes,
        read_bytes=plan.read_bytes,
        eviction="next_use",
        wait_deadline_ms=60_000,
        faults=_C.Faults(),
        populate=True,
    )
    read_ahead(engine, header, len(header.layers) - 1)
    return engine


def read_ahead(engine: _C.TransferEngine, header: StoreHeader, layer: int) -> float:
    """Bytes a second of reading all experts of a layer ahead."""
    before = sum(counted["loads"] for counted in engine.stats()["layers"])
    begin = time.perf_counter()
    number = engine.announce([(layer, list(range(header.num_experts)))])
    while sum(counted["loads"] for counted in engine.stats()["layers"]) < before + header.num_experts:
        time.sleep(1e-3)
    seconds = time.perf_counter() - begin
    engine.retire(number)
    return header.num_experts * header.record_bytes / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    arguments = parser.parse_args()
    plan = read_plan(arguments.store)
    _, header = open_store(arguments.store)
    engine = warm_engine(arguments.store, header, header.num_experts)
    layer_bytes = header.num_experts * header.record_bytes
    first = arguments.store.stat().st_size - len(header.layers) * layer_bytes  # records stand behind the header
    print(f"{plan.lanes} lanes, reads of {plan.read_bytes >> 10} KiB: {plan.why}")
    seconds = {"engine": 0.0, "disk": 0.0}
    for layer in range((len(header.layers) - 1) // 2 * 2):
        name = ("engine", "disk", "disk", "engine")[layer % 4]
        if name == "engine":
            rate = read_ahead(engine, header, layer)
        else:
            rate = plain_rate(arguments.store, first + layer * layer_bytes, layer_bytes, plan.lanes, plan.read_bytes)
        seconds[name] += layer_bytes / rate
        print(f"layer {layer}, {name}: {rate / 1e9:.2f} GB/s")
    engine.close()
    print(f"the engine reads at {seconds['disk'] / seconds['engine']:.1%} of the disk's rate")


if __name__ == "__main__":
    main()
