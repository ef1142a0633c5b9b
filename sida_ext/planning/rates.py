"""What this machine does at a model's shape, measured and remembered: its disk, its memory, its kernels.

Every rate is a pair: of the fastest call of the measurement and of the median one. On an idle machine they are near
each other; on a busy one they are not, and a prediction's range shows it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sida_ext.experts.folders import default_cache
from sida_ext.planning.counting import ModelFacts
from sida_ext.planning.engine import engine, threads

if TYPE_CHECKING:
    from sida_ext.experts.read_plan import ReadPlan

__all__ = ["PROBE_TOKENS", "Pair", "Rates", "measured_rates", "plan_cache"]

Pair = tuple[float, float]  # (fastest, median)
PROBE_TOKENS = (1, 32)  # of each expert, and of a matrix
PROBE_EXPERTS = 8
PROBE_SECONDS = 0.06
LEAST_NUMBERS = 4 << 20  # of the matrix that stands for the dense ones: a call costs little beside it
DISK_FILE_BYTES = 256 << 20
# Where nothing was measured of a layer's small ops (norms, softmax, the router, Python between them): a decoder layer
# of transformers took 0.4 to 1.4 ms of it a call on the two-core machines of docs/planning.md.
ASSUMED_LAYER: Pair = (0.3e-3, 1.5e-3)


@dataclass(frozen=True)
class Rates:
    """Seconds and bytes a second.

    Attributes:
        disk: bytes a second of all lanes, on a GPU machine of the copies to it; lanes: of these under way at once.
        store: bytes a second that the disk gives one that reads or writes a store.
        memory: bytes a second that the cores stream.
        expert: of one expert by tokens, for each of PROBE_TOKENS.
        number: of one parameter of a dense matrix, by tokens.
        layer: of one layer without its experts, by tokens, as transformers runs it; None: never measured at this shape.
        said: where each comes from, in words.
    """

    disk: Pair
    store: float
    lanes: int
    memory: float
    expert: dict[int, Pair]
    number: dict[int, Pair]
    layer: dict[int, Pair] | None = None
    said: dict[str, str] = field(default_factory=dict)

    def expert_seconds(self, tokens: float, end: int) -> float:
        """Of one expert on ``tokens`` tokens; between the measured points in a straight line, beyond them along it."""
        return _between({count: pair[end] for count, pair in self.expert.items()}, tokens)

    def layer_seconds(self, numbers: float, tokens: float, end: int) -> float:
        """Of one layer without its experts, of ``numbers`` parameters."""
        if self.layer is not None:
            return _between({count: pair[end] for count, pair in self.layer.items()}, tokens)
        return ASSUMED_LAYER[end] + numbers * self.number_seconds(tokens, end)

    def number_seconds(self, tokens: float, end: int) -> float:
        return _between({count: pair[end] for count, pair in self.number.items()}, tokens)


def _between(points: dict[int, float], at: float) -> float:
    (few, low), (many, high) = sorted(points.items())[0], sorted(points.items())[-1]
    slope = max(0.0, (high - low) / (many - few))
    return low + slope * (max(at, few) - few)


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


def _remembered_or(key: str, measure: Any, again: bool) -> tuple[dict[int, Pair], bool]:
    """Pairs by number of tokens, and whether they were measured now."""
    known = None if again else remembered(key)
    if isinstance(known, dict):
        try:
            return {int(tokens): (float(pair[0]), float(pair[1])) for tokens, pair in known.items()}, False
        except (ValueError, TypeError, IndexError):
            pass  # written by another version
    found = {tokens: measure(tokens) for tokens in PROBE_TOKENS}
    remember(key, found)
    return found, True


def expert_rates(facts: ModelFacts, dtype: str, again: bool = False) -> tuple[dict[int, Pair], str]:
    """Seconds of one expert by tokens, of ``torch.ops.sida.moe_ffn`` itself, and a sentence on where they come from.

    Raises:
        ValueError: this build of the engine has no kernel for ``dtype``.
    """
    shape, _C = facts.shape, engine()
    many = min(PROBE_EXPERTS, facts.experts)

    def measure(tokens: int) -> Pair:
        activation = "gated-silu" if shape.gated else "relu"
        times = _C.measure_moe_ffn(shape.d_model, shape.d_ff, activation, dtype, many, tokens, PROBE_SECONDS)
        return _pair(times, many)

    key = f"expert {shape.d_model}x{shape.d_ff} {'gated' if shape.gated else 'plain'} {dtype}"
    pairs, new = _remembered_or(key, measure, again)
    return pairs, f"moe_ffn at {shape.d_model} x {shape.d_ff}, {dtype}, {'measured now' if new else 'remembered'}"


def number_rates(width: int, dtype: str, again: bool = False) -> tuple[dict[int, Pair], str]:
    """Seconds of one parameter of a dense matrix, of torch's own linear, and where they come from."""
    rows = max(2 * width, LEAST_NUMBERS // width)

    def measure(tokens: int) -> Pair:
        return _pair(engine().measure_linear(rows, width, dtype, tokens, PROBE_SECONDS), rows * width)

    pairs, new = _remembered_or(f"linear {rows}x{width} {dtype}", measure, again)
    return pairs, f"linear at {rows} x {width}, {dtype}, {'measured now' if new else 'remembered'}"


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


def dense_rates(facts: ModelFacts, dense_dtype: str, again: bool = False) -> tuple[dict[int, Pair], str]:
    """Seconds of one parameter of a dense matrix that is kept as ``dense_dtype``: the kernels are those of the experts,
    so an expert of that type tells."""
    shape = facts.shape
    numbers = shape.d_model * shape.d_ff * (3 if shape.gated else 2)
    pairs, said = expert_rates(facts, dense_dtype, again)
    return {tokens: (low / numbers, high / numbers) for tokens, (low, high) in pairs.items()}, f"as experts: {said}"


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
    dense = facts.dtype if facts.dtype in ("float32", "bfloat16", "float16") else "float32"
    if dense == "float16":
        dense = "float32"  # torch computes it so on a CPU
    if dense_dtype is None:
        number, said_number = number_rates(facts.shape.d_model, dense, again)
        layer, said_layer = layer_rates(facts)
    else:  # what --measure remembers holds torch's own matrices
        number, said_number = dense_rates(facts, dense_dtype, again)
        layer, said_layer = None, _assumed_layer()
    return Rates(
        disk=(reads.disk_rate, reads.disk_rate * SLOWER_DISK),
        store=reads.disk_rate,
        lanes=reads.lanes,
        memory=reads.memory_rate,
        expert=expert,
        number=number,
        layer=layer,
        said={"reads": reads.why, "experts": said_expert, "dense": said_number, "layers": said_layer},
    )


# The lanes' own rate at random places is their best; beside a computing model they get some of it.
SLOWER_DISK = 0.75


def layer_key(facts: ModelFacts) -> str:
    return f"layer {facts.family} {facts.shape.d_model} {facts.layer_numbers // facts.depth} {facts.dtype}"


def layer_rates(facts: ModelFacts) -> tuple[dict[int, Pair] | None, str]:
    """Of a layer without its experts: what ``--measure`` remembered, or None."""
    known = remembered(layer_key(facts))
    if isinstance(known, dict):
        try:
            pairs = {int(tokens): (float(pair[0]), float(pair[1])) for tokens, pair in known.items()}
            return pairs, "a layer of transformers without experts, remembered"
        except (ValueError, TypeError, IndexError):
            pass  # written by another version
    return None, f"{_assumed_layer()}; --measure measures it"


def _assumed_layer() -> str:
    low, high = ASSUMED_LAYER
    return f"assumed: {low * 1e3:g} to {high * 1e3:g} ms a layer beside its matrices"
