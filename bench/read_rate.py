"""How near the engine's lanes come to the disk: ``python -m bench.read_rate STORE``, about half a minute.

The engine reads every expert of two layers ahead, as an announced batch wants them, into slots that were used before;
and the same file is read by plain direct reads of 16 MiB, four at a time and unchecked. In turns; medians. The engine
reads with the lanes and the read size that its plan picks, checks every record and evicts what was there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import sida_ext.ops  # noqa: F401 - loads the extension's libraries
from bench.limited_memory import disk_rate
from sida_ext import _C
from sida_ext.read_plan import read_plan
from sida_ext.store import open_store

LAYERS = 2


def engine_rate(path: Path) -> float:
    """Bytes a second of the second of two batches; the first one's pages were new to the process."""
    plan = read_plan(path)
    store, header = open_store(path)
    experts = list(range(header.num_experts))
    slots = LAYERS * header.num_experts
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
    seconds = 0.0
    for batch in range(2):
        begin = time.perf_counter()
        number = engine.announce([(batch * LAYERS + layer, experts) for layer in range(LAYERS)])
        while sum(layer["loads"] for layer in engine.stats()["layers"]) < (batch + 1) * slots:
            time.sleep(1e-3)
        seconds = time.perf_counter() - begin
        engine.retire(number)
    engine.close()
    return slots * header.record_bytes / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ours, disk = [], []
    for _ in range(arguments.rounds):
        disk.append(disk_rate(arguments.store))
        ours.append(engine_rate(arguments.store))
    plan = read_plan(arguments.store)
    print(f"{plan.lanes} lanes, reads of {plan.read_bytes >> 10} KiB: {plan.why}")
    print(
        f"engine {median(ours) / 1e9:.2f} GB/s ({min(ours) / 1e9:.2f} to {max(ours) / 1e9:.2f}), disk "
        f"{median(disk) / 1e9:.2f} GB/s ({min(disk) / 1e9:.2f} to {max(disk) / 1e9:.2f}): "
        f"{median(ours) / median(disk):.1%} of it"
    )


if __name__ == "__main__":
    main()
