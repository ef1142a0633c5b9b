"""How slow reading is beside computing, measured while a model runs: what a read in vain costs depends on it."""

from __future__ import annotations

__all__ = ["Pace"]

KEPT = 1 - 1 / 256  # of each sum from one layer to the next: about the latest 256 layers count
ENOUGH = 8.0  # reads, before which nothing is said


class Pace:
    """Sums that forget, over MoE layers that ran.

    Args:
        lanes: reads that may be under way at once.
    """

    def __init__(self, lanes: int) -> None:
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}, expected at least 1")
        self.lanes = lanes
        self._loads = self._read = self._stall = self._passed = self._layers = 0.0

    def observe(self, loads: int, read_seconds: float, stall_seconds: float, passed: float | None) -> None:
        """One more layer begins.

        Args:
            loads: reads that have ended since the last call.
            read_seconds: that the lanes spent on them, together.
            stall_seconds: that layers waited meanwhile.
            passed: seconds since the layer before began; None: this is a forward's first.
        """
        if passed is None:
            return  # what happened between two forwards tells nothing of the time in which one can read ahead
        for name, value in (
            ("_loads", loads),
            ("_read", read_seconds),
            ("_stall", stall_seconds),
            ("_passed", passed),
            ("_layers", 1),
        ):
            setattr(self, name, KEPT * getattr(self, name) + value)

    @property
    def slowness(self) -> float:
        """What the disk takes for an expert, as a multiple of what a layer computes from one MoE layer to the next; 0
        while too little was read.

        Several lanes share the disk, so that a read takes as many times longer as there are others beside it: as many
        as a layer reads, up to the number of lanes.
        """
        if self._loads < ENOUGH:
            return 0.0
        return self.read_seconds / (self._computing / self._layers)

    @property
    def pressure(self) -> float:
        """What the disk takes for all that is read, as a multiple of what is computed meanwhile; 0 while too little was
        read. Above 1 the disk never rests."""
        if self._loads < ENOUGH:
            return 0.0
        return self.read_seconds * self._loads / self._computing

    @property
    def read_seconds(self) -> float:
        """What the disk takes for an expert; 0 before the first."""
        if not self._loads or not self._layers:
            return 0.0
        beside = min(float(self.lanes), max(1.0, self._loads / self._layers))
        return self._read / self._loads / beside

    @property
    def _computing(self) -> float:
        return max(self._passed - self._stall, 1e-9)
