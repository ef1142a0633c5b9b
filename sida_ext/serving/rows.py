"""Keys and values of the rows that decode together, each row at its own length.

A row lives in a slab of its capacity class (128 tokens, 256, 512, ...), so memory follows what rows hold and not the
longest of them. A slab grows by doubling; a freed slot is used again.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Group", "KvPool", "Part", "Place", "groups_of"]

SMALLEST_CAPACITY = 128


@dataclass
class Place:
    """Where a row's keys and values are: the slab of ``capacity`` tokens, the slot in it, and how many tokens."""

    capacity: int
    slot: int
    length: int


@dataclass
class Group:
    """Rows of one slab with the same length, whose attention may be computed by one call."""

    rows: list[int]  # positions in the step
    slots: list[int]
    length: int


@dataclass
class Part:
    """The rows of a step that lie in one slab."""

    capacity: int
    rows: Tensor  # [n] int64, positions in the step
    slots: Tensor  # [n] int64
    lengths: Tensor  # [n] int64: where each row's new token goes
    groups: list[Group] = field(default_factory=list)
    _new: dict[int, Tensor] = field(default_factory=dict)

    def new_vectors(self, heads: int) -> Tensor:
        """[n * heads] int64: where each row's new token goes in a layer's slab [slots, heads, capacity, dim], in
        vectors of ``dim``."""
        if heads not in self._new:
            vectors = self.slots[:, None] * heads + torch.arange(heads)
            self._new[heads] = (vectors * self.capacity + self.lengths[:, None]).reshape(-1)
        return self._new[heads]

    def group(self, together: bool) -> None:
        """Part the rows into groups whose attention is one call: one a row, or with ``together`` rows of one length."""
        self.groups = groups_of(self.rows.tolist(), self.slots.tolist(), self.lengths.tolist(), together)


class _Slab:
    def __init__(self, capacity: int, layers: int) -> None:
        self.capacity = capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.layers = layers
        self.slots = 0
        self.free: list[int] = []

    def take(self, like: Sequence[tuple[Tensor, Tensor]]) -> int:
        if not self.free:
            self._grow(like)
        return heapq.heappop(self.free)

    def _grow(self, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        old, self.slots = self.slots, max(2 * self.slots, 1)
        for stored, index in ((self.keys, 0), (self.values, 1)):
            for layer in range(self.layers):
                pattern = like[layer][index]
                shape = (self.slots, pattern.shape[1], self.capacity, pattern.shape[3])
                grown = pattern.new_empty(shape)
                if old:
                    grown[:old] = stored[layer]
                    stored[layer] = grown
                else:
                    stored.append(grown)
        for slot in range(old, self.slots):
            heapq.heappush(self.free, slot)


class KvPool:
    """Keys and values of one kind of attention (self or cross) for all rows and layers.

    Args:
        layers: number of attention layers.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._slabs: dict[int, _Slab] = {}

    def put(self, states: Sequence[tuple[Tensor, Tensor]], spare: int) -> Place:
        """Keep a row's keys and values, ``[1, heads, length, dim]`` for each layer, with room for ``spare`` more."""
        length = states[0][0].shape[2]
        capacity = SMALLEST_CAPACITY
        while capacity < length + spare:
            capacity *= 2
        slab = self._slabs.setdefault(capacity, _Slab(capacity, self.layers))
        slot = slab.take(states)
        for layer, (keys, values) in enumerate(states):
            slab.keys[layer][slot, :, :length] = keys[0]
            slab.values[layer][slot, :, :length] = values[0]
        return Place(capacity, slot, length)

    def make_room(self, place: Place) -> None:
        """See that the row has room for one more token: a full row moves to the next capacity class."""
        if place.length < place.capacity:
            return
        slab = self._slabs[place.capacity]
        states = [
            (slab.keys[layer][place.slot : place.slot + 1], slab.values[layer][place.slot : place.slot + 1])
            for layer in range(self.layers)
        ]
        moved = self.put(states, 1)
        self.release(place)
        place.capacity, place.slot = moved.capacity, moved.slot

    def release(self, place: Place) -> None:
        """The row is over. A slab without rows gives its memory back."""
        slab = self._slabs[place.capacity]
        heapq.heappush(slab.free, place.slot)
        if len(slab.free) == slab.slots:
            del self._slabs[place.capacity]

    @property
    def bytes(self) -> int:
        """What the slabs hold now."""
        return sum(
            tensor.numel() * tensor.element_size()
            for slab in self._slabs.values()
            for tensor in (*slab.keys, *slab.values)
        )

    def shapes(self, layer: int) -> tuple[int, int]:
        """Heads of keys and values, and the width of a value."""
        slab = next(iter(self._slabs.values()))
        return slab.keys[layer].shape[1], slab.values[layer].shape[3]

    def parts(self, places: Sequence[Place]) -> list[Part]:
        """The rows of a step by slab."""
        by_slab: dict[int, list[int]] = {}
        for row, place in enumerate(places):
            by_slab.setdefault(place.capacity, []).append(row)
        return [
            Part(
                capacity,
                torch.tensor(rows),
                torch.tensor([places[row].slot for row in rows]),
                torch.tensor([places[row].length for row in rows]),
            )
            for capacity, rows in by_slab.items()
        ]

    def append(self, part: Part, layer: int, keys: Tensor, values: Tensor, every_row: bool) -> None:
        """Write each row's new token; ``keys`` and ``values`` [B, heads, 1, dim] of the whole step."""
        slab = self._slabs[part.capacity]
        for stored, new in ((slab.keys[layer], keys), (slab.values[layer], values)):
            if not every_row:
                new = new[part.rows]
            # By vectors, a tenth of the time of an assignment by slots and lengths.
            heads, dim = stored.shape[1], stored.shape[3]
            stored.view(-1, dim).index_copy_(0, part.new_vectors(heads), new.reshape(-1, dim))

    def slab(self, part: Part, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots of the part's slab, [slots, heads, capacity, dim]."""
        slab = self._slabs[part.capacity]
        return slab.keys[layer], slab.values[layer]

    def read(self, part: Part, group: Group, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The group's keys and values, [n, heads, length, dim]: a view where its slots lie side by side."""
        slab, slots = self._slabs[part.capacity], group.slots
        keys, values = slab.keys[layer], slab.values[layer]
        if slots[-1] - slots[0] == len(slots) - 1:
            chosen = slice(slots[0], slots[-1] + 1)
            return keys[chosen, :, :length], values[chosen, :, :length]
        index = torch.tensor(slots)
        return keys[:, :, :length].index_select(0, index), values[:, :, :length].index_select(0, index)


def groups_of(rows: Sequence[int], slots: Sequence[int], lengths: Sequence[int], together: bool) -> list[Group]:
    """Rows of equal length, in the order of their slots; with ``together`` false every row is a group of its own."""
    if not together:
        return [Group([row], [slot], length) for row, slot, length in zip(rows, slots, lengths, strict=True)]
    by_length: dict[int, list[tuple[int, int]]] = {}
    for row, slot, length in zip(rows, slots, lengths, strict=True):
        by_length.setdefault(length, []).append((slot, row))
    groups = []
    for length, members in by_length.items():
        members.sort()
        groups.append(Group([row for _, row in members], [slot for slot, _ in members], length))
    return groups
