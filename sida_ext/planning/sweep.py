"""What to buy: tokens a second over memory and disk rate, and where more of either stops to help."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sida_ext.experts.budget import format_bytes
from sida_ext.planning.gpu import with_memory
from sida_ext.planning.verdict import plan

__all__ = ["Sweep", "draw", "sweep"]

DISKS = (0.5e9, 1e9, 2e9, 4e9, 8e9)
MEMORIES = 8  # sizes that are tried, from the least in which the model fits to where it fits whole
GAIN = 1.25  # a step that gives less than this is not worth taking
STEP = 1.5  # each size is this much of the one before, at the least


@dataclass(frozen=True)
class Sweep:
    """Tokens a second by memory and disk rate.

    Attributes:
        what: decode, or prompt for a model that does not decode.
        memories, disks: bytes, and bytes a second; cells: by memory, then disk: (low, high), None: does not fit.
        knee: one sentence; knee_at: (memory, disk rate), None where nothing fits.
        mark: ``, modelled`` for a GPU.
    """

    model: str
    dtype: str
    what: str
    memories: tuple[int, ...]
    disks: tuple[float, ...]
    cells: tuple[tuple[tuple[float, float] | None, ...], ...]
    knee: str
    knee_at: tuple[int, float] | None
    mark: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _sizes(first: Any) -> list[int]:
    """Memories from the least that works to what holds everything, in even ratios."""
    fixed = first.memory_needed - (first.expert_memory or first.smallest_budget)
    least, most = fixed + 2 * first.smallest_budget, int(1.02 * (fixed + first.experts_bytes)) + (600 << 20)
    ratio = max(STEP if most > 4 * least else 1.2, (most / least) ** (1 / (MEMORIES - 1)))
    found = [least]
    while found[-1] < most:
        found.append(min(most, int(found[-1] * ratio)))
    return found


def _middle(cell: tuple[float, float]) -> float:
    return (cell[0] * cell[1]) ** 0.5


def _knee(
    memories: list[int], disks: tuple[float, ...], cells: list[list[tuple[float, float] | None]]
) -> tuple[str, tuple[int, float] | None]:
    """The smallest machine whose neighbours, one step more of either, are less than a quarter faster."""
    for row, memory in enumerate(memories):
        for column, disk in enumerate(disks):
            here = cells[row][column]
            if here is None:
                continue
            further = []
            for r, c in ((row + 1, column), (row, column + 1)):
                if r < len(memories) and c < len(disks):
                    further.append(cells[r][c])
            if all(cell is not None and _middle(cell) < GAIN * _middle(here) for cell in further):
                return (
                    f"knee: {format_bytes(memory)} of memory with a disk of {disk / 1e9:g} GB/s, {here[0]:.3g} to "
                    f"{here[1]:.3g} tokens/s; the next step of either gives less than {GAIN - 1:.0%} more",
                    (memory, disk),
                )
    return "knee: none, the model fits in no memory that was tried", None


def sweep(path_or_id: str | os.PathLike[str], *, disks: tuple[float, ...] = DISKS, **options: Any) -> Sweep:
    """Plans over memories from the least that works to what holds every expert, with each disk.

    Args:
        disks: bytes a second.
        options: of :func:`sida_ext.plan`; ``memory``, ``disk`` and ``expert_memory`` are what is varied.
    """
    for name in ("memory", "disk", "expert_memory"):
        if options.pop(name, None) is not None:
            raise ValueError(f"{name} is given, but a sweep varies it; leave it out")
    measure = options.pop("measure", False)
    first = plan(path_or_id, memory=1 << 50, measure=measure, **options)
    gpu = options.pop("gpu", None)
    memories = _sizes(first)
    cells: list[list[tuple[float, float] | None]] = []
    for memory in memories:
        row = []
        for disk in disks:
            size = None if gpu is None else with_memory(gpu, memory)
            found = plan(path_or_id, memory=memory, disk=disk, gpu=size, **options)
            row.append(found.decode_tokens_per_s or found.prompt_tokens_per_s if found.fits else None)
        cells.append(row)
    knee, at = _knee(memories, disks, cells)
    return Sweep(
        model=first.model,
        dtype=first.dtype,
        what="prompt" if first.decode_tokens_per_s is None else "decode",
        memories=tuple(memories),
        disks=disks,
        cells=tuple(tuple(row) for row in cells),
        knee=knee,
        knee_at=at,
        mark=", modelled" if first.modelled else "",
    )


def draw(found: Sweep, path: Path) -> None:
    """A picture: a band for each disk rate over memory, the knee marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sida_ext.files import written_whole

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for column, disk in enumerate(found.disks):
        points = [
            (memory / 2**30, row[column])
            for memory, row in zip(found.memories, found.cells, strict=True)
            if row[column]
        ]
        if not points:
            continue
        sizes = [size for size, _ in points]
        low, high = ([cell[end] for _, cell in points if cell] for end in (0, 1))
        (line,) = axes.plot(
            sizes, [(a * b) ** 0.5 for a, b in zip(low, high, strict=True)], label=f"{disk / 1e9:g} GB/s"
        )
        axes.fill_between(sizes, low, high, alpha=0.15, color=line.get_color())
    if found.knee_at is not None:
        axes.axvline(found.knee_at[0] / 2**30, color="black", linestyle=":", label="knee")
    axes.set(
        xlabel="memory, GiB",
        ylabel=f"{found.what}, tokens/s{found.mark}",
        title=f"{found.model}, {found.dtype} experts: low to high of each disk rate",
        yscale="log",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with written_whole(path) as part:
        figure.savefig(part, dpi=120)
