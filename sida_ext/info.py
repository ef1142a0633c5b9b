"""What this machine is: versions, instruction sets, devices, measured rates."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["collect", "show"]

# What is measured with: at most a quarter of what is free, for this is no reason to run out of either.
MOST_MEMORY = 2 << 30
MOST_DISK = 1 << 30
LEAST = 64 << 20  # below it a cache, or the start of the threads, is what would be measured


def collect(path: Path | None = None, measure: bool = True) -> dict[str, Any]:
    """Facts by section. Measuring streams an array of up to 2 GiB and reads a file of up to 1 GiB past the page cache,
    each at most a quarter of what is free; it takes a few seconds. The reads' plan is measured again, and remembered
    for the next start.

    Args:
        path: folder whose disk is measured; None: the store cache.
    """
    import torch
    import transformers

    from sida_ext._load import _C, check_build
    from sida_ext.experts.budget import available_memory, format_bytes
    from sida_ext.experts.folders import default_cache
    from sida_ext.experts.read_plan import folder_plan

    build = check_build()
    found: dict[str, Any] = {
        "versions": {
            "sida_ext": _version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "built": "CPU and CUDA" if build["cuda"] else "CPU",
        },
        "cpu": {
            "instruction set in force": _C.instruction_set(),
            "instruction sets of this CPU": ", ".join(_C.instruction_sets()) + " (SIDA_CPU chooses)",
            "precision": f"{_C.get_precision()}; this set has: {', '.join(_C.precisions())}",
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "memory available": format_bytes(available_memory()),
        },
        "devices": {"cpu": "expert memory in RAM", **_cuda_devices()},
    }
    if measure:
        folder = path if path is not None else default_cache()
        folder.mkdir(parents=True, exist_ok=True)
        found["measured"] = {**_memory_rate(torch.get_num_threads()), **_disk_rate(folder)}
        plan = folder_plan(folder, again=True)
        found["reads of an expert store there"] = {
            "lanes": plan.lanes,
            "largest read": format_bytes(plan.read_bytes),
            "why": plan.why,
            "to set it yourself": "lanes=, read_bytes= of from_pretrained",
        }
    return found


def _version() -> str:
    try:
        return version("sida_ext")
    except PackageNotFoundError:
        return "a source tree that was never installed"


def _memory_rate(threads: int) -> dict[str, object]:
    from sida_ext._load import _C
    from sida_ext.experts.budget import available_memory, format_bytes

    free = available_memory()
    size = min(free // 4, MOST_MEMORY)
    if size < LEAST:
        return {"memory bandwidth": f"not measured: {format_bytes(free)} of memory are free, least {_least()}"}
    return {"memory bandwidth, GB/s": round(_C.measure_memory_bandwidth(threads, size) / 1e9, 1)}


def _disk_rate(folder: Path) -> dict[str, object]:
    from sida_ext._load import _C
    from sida_ext.experts.budget import format_bytes

    free = shutil.disk_usage(folder).free
    size = min(free // 4, MOST_DISK)
    if size < LEAST:
        return {f"disk read rate of {folder}": f"not measured: {format_bytes(free)} are free there, least {_least()}"}
    disk = _C.measure_disk_rate(str(folder), size)
    return {
        f"disk read rate of {folder}, GB/s": round(disk.bytes_per_second / 1e9, 2),
        "disk read past the page cache": disk.direct,
    }


def _least() -> str:
    from sida_ext.experts.budget import format_bytes

    return format_bytes(4 * LEAST)


def _cuda_devices() -> dict[str, str]:
    """The CUDA devices that torch sees, each with its compute capability and its memory; none without CUDA."""
    import torch

    from sida_ext.experts.budget import format_bytes

    if not torch.cuda.is_available():
        return {}
    devices = {}
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        devices[f"cuda:{number}"] = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {format_bytes(total)}, "
            f"{format_bytes(free)} free"
        )
    return devices


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for section, facts in found.items():
        table.add_row(f"[bold]{escape(section)}[/]", "")
        for name, value in facts.items():
            table.add_row(escape(f"  {name}"), escape(str(value)))
    Console().print(table)
