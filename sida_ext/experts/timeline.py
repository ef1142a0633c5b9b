"""What happened when: a Chrome/Perfetto trace and a picture of lanes, compute, predictor and stalls."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sida_ext.files import written_whole

__all__ = ["Event", "draw", "write_chrome_trace"]


@dataclass(frozen=True)
class Event:
    """One interval; times in nanoseconds of ``time.perf_counter_ns``."""

    kind: str  # "copy", "stall", "compute" or "predict"
    row: str  # the line of the timeline that it belongs to
    name: str
    begin: int
    end: int
    batch: int = 0


COLOURS = {"compute": "#3b6fb6", "copy": "#5aa469", "stall": "#c8553d", "predict": "#b58db6"}


# Rows in this order from the top; others follow by name.
FIRST_ROWS = ("predictor", "compute")


def _tracks(events: Sequence[Event]) -> dict[str, list[list[Event]]]:
    """Row -> tracks, on each of which any two events are apart or one inside the other, as a viewer expects it of a
    thread. A second track is needed where two threads compute in one model."""
    rows: dict[str, list[list[Event]]] = {}
    open_until: dict[tuple[str, int], list[int]] = {}  # ends of the events that are open on a track, innermost last
    for event in sorted(events, key=lambda event: (event.begin, -event.end)):
        tracks = rows.setdefault(event.row, [])
        for number in range(len(tracks) + 1):
            ends = open_until.setdefault((event.row, number), [])
            while ends and ends[-1] <= event.begin:
                ends.pop()
            if not ends or event.end <= ends[-1]:
                break
        if number == len(tracks):
            tracks.append([])
        tracks[number].append(event)
        ends.append(event.end)
    return {row: rows[row] for row in _sorted_rows(rows)}


def _sorted_rows(rows: Iterable[str]) -> list[str]:
    order = {name: place for place, name in enumerate(FIRST_ROWS)}
    return sorted(rows, key=lambda row: (order.get(row, len(order)), row))


def write_chrome_trace(events: Sequence[Event], path: str | os.PathLike[str]) -> None:
    """Write the JSON that ui.perfetto.dev and chrome://tracing open; times in microseconds from the first event.

    Every row is a named thread; a second thread of the same row has its number in the name.
    """
    start = min((event.begin for event in events), default=0)
    entries: list[dict] = [_metadata("process_name", 0, {"name": "sida_ext"})]
    tid = 0
    for row, tracks in _tracks(events).items():
        for number, track in enumerate(tracks, 1):
            tid += 1
            entries.append(_metadata("thread_name", tid, {"name": row if number == 1 else f"{row} {number}"}))
            entries.append(_metadata("thread_sort_index", tid, {"sort_index": tid}))
            entries += [
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": tid,
                    "name": event.name,
                    "cat": event.kind,
                    "ts": (event.begin - start) / 1e3,
                    "dur": (event.end - event.begin) / 1e3,
                    "args": {"batch": event.batch},
                }
                for event in track
            ]
    with written_whole(path) as partial:
        partial.write_text(json.dumps({"traceEvents": entries, "displayTimeUnit": "ms"}))


def _metadata(name: str, tid: int, args: dict) -> dict:
    return {"ph": "M", "pid": 1, "tid": tid, "ts": 0, "name": name, "args": args}


def draw(
    runs: Sequence[tuple[str, Sequence[Event]]], path: str | os.PathLike[str], seconds: float | None = None
) -> None:
    """Draw one panel for each run, all on one time axis.

    Args:
        runs: (title, events) of each run.
        path: the PNG to write.
        seconds: how much of each run's start to show; None: all.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 0.9 + sum(0.7 + 0.28 * len({e.row for e in events}) for _, events in runs)))
    heights = [1 + len({event.row for event in events}) for _, events in runs]
    panels = figure.subplots(len(runs), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for panel, (title, events) in zip(panels, runs, strict=True):
        start = min((event.begin for event in events), default=0)
        rows = _sorted_rows({event.row for event in events})[::-1]  # level 0 is at the bottom
        for level, row in enumerate(rows):
            for kind, colour in COLOURS.items():
                bars = [
                    ((event.begin - start) / 1e6, max((event.end - event.begin) / 1e6, 1e-3))
                    for event in events
                    if event.row == row
                    and event.kind == kind
                    and (seconds is None or (event.begin - start) / 1e9 < seconds)
                ]
                panel.broken_barh(bars, (level - 0.4, 0.8), facecolors=colour)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_title(title, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    if seconds is not None:
        panels[-1].set_xlim(0, seconds * 1e3)
    panels[-1].set_xlabel("milliseconds")
    figure.legend(handles=[Patch(color=c, label=k) for k, c in COLOURS.items()], loc="upper right", ncols=4)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
