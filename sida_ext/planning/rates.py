"""What this machine does at a model's shape, measured and remembered: its disk, its memory, its kernels.

Every rate is a pair: of the fastest call of the measurement and of the median one. On an idle machine they are near
each other; on a busy one they are not, and a prediction's range shows it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sida_ext.experts.folders import default_cache
from sida_ext.planning.capacity import EXPERT_DTYPES, experts_bytes, other_bytes, record_bytes
from sida_ext.planning.counting import ModelFacts
from sida_ext.planning.engine import engine, threads

if TYPE_CHECKING:
    from sida_ext.experts.read_plan import ReadPlan

__all__ = ["PROBE_TOKENS", "Measured", "Pair", "Rates", "as_served", "measured_rates", "plan_cache"]

Pair = tuple[float, float]  # (fastest, median)
PROBE_TOKENS = (1, 4, 16, 64)  # of each expert, and of a matrix
CACHED_TOKENS = (1, 4)  # with more tokens computing takes longer than streaming the weights, from wherever
PROBE_EXPERTS = 8
PROBE_SECONDS = 0.04
LEAST_NUMBERS = 4 << 20  # of the matrix that stands for the dense ones: a call costs little beside it
DISK_FILE_BYTES = 256 << 20
# Weights that a probe walks through are twice what the last-level cache holds: none of them is found in it again.
LEAST_WALKED, MOST_WALKED = 64 << 20, 1 << 30
# Where nothing was measured of a layer's small ops (norms, softmax, the router, Python between them): a decoder layer
# of transformers took 0.4 to 1.4 ms of it a call on the two-core machines of docs/planning.md.
ASSUMED_LAYER: Pair = (0.3e-3, 1.5e-3)


@dataclass(frozen=True)
class Measured:
    """Seconds by tokens: of weights that are streamed from memory, and of some that the
    last-level cache holds, {} where it holds too little to measure or the tokens are too many to make a difference."""

    streamed: dict[int, Pair]
    cached: dict[int, Pair] = field(default_factory=dict)

    def seconds(self, tokens: float, end: int, held: float = 0.0) -> float:
        """On ``tokens`` tokens, between the measured points in a straight line, beyond them along the last one.

        Args:
            end: of each pair.
            held: share of the weights that is found in the cache.
        """
        points = {}
        for count, pair in self.streamed.items():
            cached = self.cached.get(count, pair)[end]
            points[count] = pair[end] + held * (min(cached, pair[end]) - pair[end])
        return _between(points, tokens)

    def per(self, count: float) -> Measured:
        """Of one of ``count`` equal parts."""
        parts = [
            {tokens: (a / count, b / count) for tokens, (a, b) in of.items()} for of in (self.streamed, self.cached)
        ]
        return Measured(*parts)


@dataclass(frozen=True)
class Rates:
    """Seconds and bytes a second.

    Attributes:
        disk: bytes a second of all lanes, on a GPU machine of the copies to it; lanes: of these under way at once.
        alone: bytes a second of one lane while the others rest; 0: not known, a lane has its share of the disk.
        store: bytes a second that the disk gives one that reads or writes a store.
        memory: bytes a second that the cores stream.
        expert: of one expert.
        number: of one parameter of a dense matrix.
        layer: of one layer without its experts, as transformers runs it; None: never measured at this shape.
        rest: of what a forward takes beside its layers and its head; measured with ``layer``.
        cache: bytes of the last-level cache; 0: not known, or of no interest.
        said: where each comes from, in words.
    """

    disk: Pair
    store: float
    lanes: int
    memory: float
    expert: Measured
    number: Measured
    layer: Measured | None = None
    rest: Measured | None = None
    alone: float = 0.0
    cache: int = 0
    said: dict[str, str] = field(default_factory=dict)

    def held(self, touched: float, end: int) -> float:
        """Share of a forward's weights that is still in the cache from the last one.

        Args:
            touched: bytes of all the weights that a forward reads.
            end: at the fast one the cache keeps as much as it holds; at the slow one it keeps nothing of what is larger
                than a half of it, for least-recently-used lines are overwritten before they are read again.
        """
        if not self.cache or touched <= 0:
            return 0.0
        if end == 0:
            return min(1.0, self.cache / touched)
        return 1.0 if touched <= self.cache / 2 else 0.0

    def layer_seconds(self, numbers: float, tokens: float, end: int, held: float = 0.0) -> float:
        """Of one layer without its experts, of ``numbers`` parameters."""
        if self.layer is not None:
            return self.layer.seconds(tokens, end, held)
        return ASSUMED_LAYER[end] + numbers * self.number.seconds(tokens, end, held)


def _between(points: dict[int, float], at: float) -> float:
    """On the line through the two points around ``at``, at the ends through the nearest two; it never falls."""
    known = sorted(points.items())
    after = next((n for n, (count, _) in enumerate(known) if count >= at), len(known) - 1)
    (few, low), (many, high) = known[max(0, after - 1)], known[max(1, after)]
    slope = max(0.0, (high - low) / (many - few))
    return low + slope * (max(at, known[0][0]) - few)


def plan_cache() -> Path:
    """Where rates are remembered: in the store cache."""
    return default_cache() / "plan_rates.json"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine_key() -> str:
    from sida_ext._load import installed_torch

    return f"{_cpu()}, {engine().instruction_set()}, {threads()} threads, torch {installed_torch()}"


def remembered(key: str) -> Any:
    """What an earlier measurement of this machine left under ``key``; None: nothing that can be read."""
    try:
        return json.loads(plan_cache().read_text())[machine_key()][key]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never measured here, or written by something else: measured again


def remember(key: str, value: Any) -> None:
    cache = plan_cache()
    try:
        known: Any = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    known.setdefault(machine_key(), {})[key] = value
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = cache.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(known, indent=1) + "\n")
    part.replace(cache)


def _pair(times: list[float], per: float) -> Pair:
    return min(times) / per, statistics.median(times) / per


def cache_bytes() -> int:
    """Of the last-level cache that a core sees, as Linux says; 0: it does not say."""
    levels: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = (int((index / name).read_text().strip().removesuffix("K")) for name in ("level", "size"))
            kind = (index / "type").read_text().strip()
        except (OSError, ValueError):
            continue  # a machine without that file, or with another unit: no figure
        if kind != "Instruction":
            levels[level] = size << 10
    return levels[max(levels)] if levels else 0


def walked_bytes(facts: ModelFacts, dtype: str, cache: int) -> int:
    """Bytes of weights that a probe walks through so that none is found in the cache again; of a small model, as many
    as it has itself."""
    return min(max(LEAST_WALKED, min(2 * cache, MOST_WALKED)), experts_bytes(facts, dtype) + other_bytes(facts))


def _measured_from(found: Any) -> Measured | None:
    """What JSON brought back; None: nothing, or written by another version, and to be measured again."""
    try:
        parts = (found[name].items() for name in ("streamed", "cached"))
        return Measured(*({int(n): (float(pair[0]), float(pair[1])) for n, pair in part} for part in parts))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return None


# Of one measurement: (tokens, bytes walked) -> seconds of the calls for each number of tokens.
Probe = Callable[[Sequence[int], int], list[list[float]]]


def _remembered_or(key: str, probe: Probe, call_bytes: float, walked: int, again: bool) -> tuple[Measured, bool]:
    """What was remembered or is measured now, and whether it is new.

    Args:
        call_bytes: of the weights of one call; walked: of the weights that calls follow one another through.
    """
    key = f"{key}, {walked >> 20} MiB"
    known = None if again else _measured_from(remembered(key))
    if known is not None:
        return known, False

    def measured(counts: Sequence[int], walked: int) -> dict[int, Pair]:
        return {count: _pair(times, 1) for count, times in zip(counts, probe(counts, walked), strict=True)}

    cache = cache_bytes()
    # What fills the cache to a half stays in it, other things beside.
    cached = measured(CACHED_TOKENS, min(cache // 2, walked)) if call_bytes <= cache / 2 else {}
    found = Measured(measured(PROBE_TOKENS, walked), cached)
    remember(key, asdict(found))
    return found, True


def _activations(facts: ModelFacts) -> str:
    """What a model of that checkpoint computes in on a CPU."""
    return facts.dtype if facts.dtype in ("float32", "bfloat16", "float16") else "float32"


# Numbers of all large matrices from which on a CPU without bfloat16 instructions is spared torch's bfloat16 products,
# as sida_ext.models.dense has it.
WORTH = 1 << 24


def as_served(facts: ModelFacts, dense_dtype: str | None) -> tuple[ModelFacts, str | None, str | None]:
    """The model and its ``dense_dtype`` as ``from_pretrained`` takes them by itself on this CPU, and a sentence where
    that is something else: torch computes bfloat16 slowly without instructions made for it."""
    few = sum(rows * columns for rows, columns in facts.dense) < WORTH
    wide = {"avx512", "amx"} & set(engine().instruction_sets()) or platform.machine() not in ("x86_64", "AMD64")
    if dense_dtype is not None or facts.dtype != "bfloat16" or few or wide:
        return facts, dense_dtype, None
    said = (
        "this CPU has no instructions for bfloat16: the large matrices stay so and are computed by sida's kernels, "
        "everything else in float32"
    )
    return replace(facts, dtype="float32"), "bfloat16", said


def _computed(x_dtype: str) -> str:
    """The part of a key that says how a kernel computes: the machine's key has the instruction set."""
    return f"of {x_dtype}, {engine().get_precision()}"


def expert_rates(facts: ModelFacts, dtype: str, again: bool = False) -> tuple[Measured, str]:
    """Seconds of one expert by tokens, of ``torch.ops.sida.moe_ffn`` itself with tokens of the model's type in the
    precision in force, and a sentence on where they come from.

    Raises:
        ValueError: this build of the engine has no kernel for ``dtype``.
    """
    shape, _C, x_dtype = facts.shape, engine(), _activations(facts)
    many = min(PROBE_EXPERTS, facts.experts)

    def probe(tokens: Sequence[int], walked: int) -> list[list[float]]:
        activation = "gated-silu" if shape.gated else "relu"
        return _C.measure_moe_ffn(
            shape.d_model, shape.d_ff, activation, dtype, many, tokens, PROBE_SECONDS, x_dtype, walked
        )

    key = f"experts {shape.d_model}x{shape.d_ff} {'gated' if shape.gated else 'plain'} {dtype} {_computed(x_dtype)}"
    walked = walked_bytes(facts, dtype, cache_bytes())
    found, new = _remembered_or(key, probe, many * record_bytes(shape, dtype), walked, again)
    return found.per(many), f"moe_ffn at {shape.d_model} x {shape.d_ff}, {dtype}, {_when(new)}"


def _when(new: bool) -> str:
    return "measured now" if new else "remembered"


def number_rates(facts: ModelFacts, dtype: str, dense_dtype: str | None, again: bool = False) -> tuple[Measured, str]:
    """Seconds of one parameter of a dense matrix at the model's width, of what computes it: torch's own linear, or with
    a ``dense_dtype`` ``torch.ops.sida.linear``; and where they come from.

    Args:
        dtype: of the experts, which pass through the cache too.
    """
    width, x_dtype = facts.shape.d_model, _activations(facts)
    rows = max(2 * width, LEAST_NUMBERS // width)
    kind = dense_dtype or "torch"

    def probe(tokens: Sequence[int], walked: int) -> list[list[float]]:
        return engine().measure_linear(rows, width, kind, tokens, PROBE_SECONDS, x_dtype, walked)

    key = f"linears {rows}x{width} {kind} {_computed(x_dtype)}"
    walked = walked_bytes(facts, dtype, cache_bytes())
    found, new = _remembered_or(key, probe, rows * width * EXPERT_DTYPES[dense_dtype or x_dtype] / 8, walked, again)
    who = "torch's linear" if dense_dtype is None else "sida's linear"
    return found.per(rows * width), f"{who} at {rows} x {width}, {dense_dtype or x_dtype}, {_when(new)}"


def disk_plan(folder: Path, again: bool = False) -> ReadPlan:
    """How the lanes read a store in ``folder``, with a rate in any case: where the lanes could not be compared, that of
    four plain readers of a file of 256 MiB.

    Raises:
        OSError: the folder's disk cannot be measured; give its rate by hand.
    """
    engine()
    from sida_ext.experts.read_plan import folder_plan

    found = folder_plan(folder, again)
    if found.disk_rate > 0:
        return found
    try:
        rate = engine().measure_disk_rate(str(folder), DISK_FILE_BYTES, found.lanes)
    except OSError as error:
        raise OSError(f"the disk of {folder} cannot be measured: {error}; give its rate: --disk 2GB/s") from error
    what = "plain reads" if rate.direct else "reads of the page cache, for the file system has no direct ones,"
    return replace(found, disk_rate=rate.bytes_per_second, why=f"{what} at {rate.bytes_per_second / 1e9:.2f} GB/s")


def measured_rates(
    facts: ModelFacts, dtype: str, folder: Path, again: bool = False, dense_dtype: str | None = None
) -> Rates:
    """Of this machine at the model's shape, with the experts in ``dtype``, the other large matrices in ``dense_dtype``.

    Args:
        folder: of the expert store; its disk is measured.
        again: measure though rates are remembered.
    """
    reads = disk_plan(folder, again)
    expert, said_expert = expert_rates(facts, dtype, again)
    number, said_number = number_rates(facts, dtype, dense_dtype, again)
    layer, rest, said_layer = layer_rates(facts)
    if dense_dtype is not None:  # what --measure remembers holds torch's own matrices
        layer, said_layer = None, _assumed_layer()
    return Rates(
        disk=(reads.disk_rate, reads.disk_rate * SLOWER_DISK),
        store=reads.disk_rate,
        lanes=reads.lanes,
        memory=reads.memory_rate,
        expert=expert,
        number=number,
        layer=layer,
        rest=rest,
        alone=reads.lane_rate,
        cache=cache_bytes(),
        said={"reads": reads.why, "experts": said_expert, "dense": said_number, "layers": said_layer},
    )


# The lanes' own rate at random places is their best; beside a computing model they get some of it.
SLOWER_DISK = 0.75


def layer_key(facts: ModelFacts) -> str:
    return f"layer {facts.family} {facts.shape.d_model} {facts.layer_numbers // facts.depth} {facts.dtype}"


def layer_rates(facts: ModelFacts) -> tuple[Measured | None, Measured | None, str]:
    """Of a layer without its experts and of what a forward takes beside its layers: what ``--measure`` remembered, or
    None; and where they come from."""
    known = remembered(layer_key(facts))
    layer, rest = (_measured_from(known.get(name) if isinstance(known, dict) else None) for name in ("layer", "rest"))
    if layer is None or rest is None:
        return None, None, f"{_assumed_layer()}; --measure measures it"
    return layer, rest, "a layer of transformers without experts, remembered"


def _assumed_layer() -> str:
    low, high = ASSUMED_LAYER
    return f"assumed: {low * 1e3:g} to {high * 1e3:g} ms a layer beside its matrices"
