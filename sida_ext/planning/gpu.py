"""Rates of GPUs that this project was never run on. Every time that comes of them is modelled.

Published peaks and assumed costs of a launch and of a copy; bench/gpu/modelled_time.py makes docs/cuda_modelled.md from
the same figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from sida_ext.experts.budget import parse_bytes
from sida_ext.experts.folders import default_cache
from sida_ext.planning.capacity import EXPERT_DTYPES, experts_bytes, record_bytes
from sida_ext.planning.counting import ModelFacts
from sida_ext.planning.rates import PROBE_TOKENS, Measured, Pair, Rates, disk_plan

__all__ = ["CALL_SECONDS", "GPUS", "LAUNCH_SECONDS", "LINKS", "Card", "Gpu", "gpu_rates", "parse_gpu", "with_memory"]

# Assumed, not measured: what stands between two dependent kernels, and a call of the runtime on the copying thread.
LAUNCH_SECONDS = 3e-6
CALL_SECONDS = 2e-6
# Of a copy, with the wait and the record of a layer that reads it; counted by a recording run (docs/cuda_modelled.md).
CALLS_OF_A_COPY = 5


@dataclass(frozen=True)
class Card:
    """Published peaks: memory bandwidth in bytes/s, dense bf16 tensor-core FLOP/s with fp32 sums."""

    name: str
    bandwidth: float
    flops: float
    links: tuple[int, ...]  # generations of PCIe that it is modelled with, x16
    source: str
    memory: int = 0


GPUS = (
    Card("A100 80 GB SXM", 2039e9, 312e12, (4,), "NVIDIA A100 Tensor Core GPU data sheet", 80 << 30),
    Card("RTX 4090", 1008e9, 165.2e12, (4,), "NVIDIA Ada GPU architecture white paper", 24 << 30),
    Card("H100 80 GB SXM", 3350e9, 989.4e12, (4, 5), "NVIDIA H100 Tensor Core GPU data sheet", 80 << 30),
    Card(
        "L4", 300e9, 121e12, (4,), "NVIDIA L4 Tensor Core GPU data sheet (half of the figure with sparsity)", 24 << 30
    ),
)
# Bytes/s that pinned copies commonly reach; the links' own rates are 31.5 and 63 GB/s (PCI-SIG, 16 and 32 GT/s x16).
LINKS = {4: 25e9, 5: 50e9}

# Kernels that stand one behind the other in a decoder layer beside the experts', and what Python may take instead where
# it is slower than the GPU: a layer of transformers between them.
LAYER_LAUNCHES, LAYER_PYTHON = 14, 0.5e-3


@dataclass(frozen=True)
class Gpu:
    """A card to plan with: bytes of its memory, the card of the fast end of a range and of the slow one."""

    memory: int
    fast: Card
    slow: Card
    context_bytes: int = 1 << 30  # of the CUDA context, its libraries and activations; assumed


def parse_gpu(text: str) -> Gpu:
    """``"8GiB"`` (any card between the slowest and the fastest that are known), ``"L4"`` or ``"RTX 4090:16GiB"``.

    Raises:
        ValueError: neither a size nor a known card; the message lists them.
    """
    name, _, size = text.rpartition(":")
    cards = [
        card for card in GPUS if (name or text).strip().lower() in (card.name.lower(), card.name.split(" ")[0].lower())
    ]
    if cards:
        memory = parse_bytes(size, "gpu") if name else cards[0].memory
        return Gpu(memory, cards[0], cards[0])
    try:
        if name:
            raise ValueError
        memory = parse_bytes(text, "gpu")
    except ValueError:
        raise ValueError(
            f"gpu is {text!r}, expected a size such as '8GiB', a card ({', '.join(card.name for card in GPUS)}) or "
            "both, such as 'RTX 4090:16GiB'"
        ) from None
    by_bandwidth = sorted(GPUS, key=lambda card: card.bandwidth)
    return Gpu(memory, by_bandwidth[-1], by_bandwidth[0])


def with_memory(text: str, memory: int) -> str:
    """The same card with ``memory`` bytes."""
    card = parse_gpu(text)
    return f"{card.fast.name}:{memory}" if card.fast is card.slow else str(memory)


def gpu_rates(facts: ModelFacts, dtype: str, gpu: Gpu, host_memory: int, disk_rate: float | None = None) -> Rates:
    """Modelled: kernels at their roofline, copies from a pinned pool of half the host's memory, the rest from disk."""
    shape = facts.shape
    weights = shape.d_model * shape.d_ff * (3 if shape.gated else 2)
    item = EXPERT_DTYPES[dtype] / 8

    def roofline(numbers: float, bytes_: float, tokens: int, card: Card) -> float:
        return max(bytes_ / card.bandwidth, 2 * numbers * tokens / card.flops)

    def pair(numbers: float, bytes_: float, tokens: int) -> Pair:
        return roofline(numbers, bytes_, tokens, gpu.fast), roofline(numbers, bytes_, tokens, gpu.slow)

    disk_rate = disk_plan(default_cache()).disk_rate if disk_rate is None else disk_rate
    pool = min(1.0, host_memory / 2 / experts_bytes(facts, dtype))
    record = record_bytes(shape, dtype)
    disk = []
    for card in (gpu.fast, gpu.slow):
        copy = record / LINKS[card.links[-1]] + CALLS_OF_A_COPY * CALL_SECONDS
        disk.append(record / (copy + (1 - pool) * record / disk_rate if pool < 1 else copy))
    layer_numbers = facts.layer_numbers / facts.depth
    layer = {
        tokens: (
            pair(layer_numbers, 2 * layer_numbers, tokens)[0] + LAYER_LAUNCHES * LAUNCH_SECONDS,
            pair(layer_numbers, 2 * layer_numbers, tokens)[1] + LAYER_PYTHON,
        )
        for tokens in PROBE_TOKENS
    }
    cards = gpu.fast.name if gpu.fast is gpu.slow else f"between {gpu.slow.name} and {gpu.fast.name}"
    return Rates(
        disk=(disk[0], disk[1]),
        store=disk_rate,
        lanes=1,
        memory=0.0,
        expert=Measured({tokens: pair(weights, weights * item, tokens) for tokens in PROBE_TOKENS}),
        number=Measured({tokens: pair(1, 2, tokens) for tokens in PROBE_TOKENS}),
        layer=Measured(layer),
        said={
            "GPU": f"modelled, {cards}: published peaks, kernels at their roofline",
            "copies": f"modelled: pinned memory over PCIe, {pool:.0%} of the experts in it, the others read from disk",
            "layers": f"modelled: {LAYER_LAUNCHES} launches of {LAUNCH_SECONDS * 1e6:g} us, "
            f"or {LAYER_PYTHON * 1e3:g} ms of Python",
        },
    )
