"""Which of torch's operations give a row the same bits alone and beside others, and what is done for those that do not.

A matrix product or an attention call may take another kernel for another number of rows, and then adds in another
order. Whether it does depends on shape, dtype, library and instruction set, so it is measured here, once for each
shape, on numbers that cancel: partial sums are some 2^18 times larger than the result, so that another order of
additions shows in many elements even after rounding to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["RowExact", "attention_joins", "linear_joins"]

# Row counts at which kernels are known to change, and their neighbours.
_COUNTS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    12,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    100,
    127,
    128,
    129,
    200,
    256,
    257,
    500,
)
_LARGE_WEIGHT = 64 << 20  # bytes; a larger weight is not made a second time, and is probed with its own numbers
_verdicts: dict[tuple[Any, ...], bool] = {}


def _cancelling(rows: int, outputs: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input [rows, columns] and weight [outputs, columns] whose products are large and come in pairs of opposite sign,
    beside one small product that is the result."""
    generator = torch.Generator().manual_seed(0)
    half = (columns - 1) // 2
    order = torch.randperm(columns, generator=generator)
    left, right = torch.randn(rows, half, generator=generator), torch.randn(outputs, half, generator=generator)
    small = torch.full((1,), 2.0**-9)
    spare = columns - 2 * half - 1
    input = torch.cat([left, left, small.expand(rows, 1), torch.zeros(rows, spare)], dim=1)[:, order]
    weight = torch.cat([right, -right, small.expand(outputs, 1), torch.zeros(outputs, spare)], dim=1)[:, order]
    return input.to(dtype), weight.to(dtype)


def linear_joins(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``linear`` with a weight like this gives each row the same bits whatever the number of rows."""
    key = ("linear", tuple(weight.shape), weight.stride(), weight.dtype, bias is not None, torch.get_num_threads())
    if key not in _verdicts:
        _verdicts[key] = _probe_linear(weight, bias)
    return _verdicts[key]


@torch.no_grad()
def _probe_linear(weight: Tensor, bias: Tensor | None) -> bool:
    if weight.numel() * weight.element_size() <= _LARGE_WEIGHT:
        counts: Sequence[int] = _COUNTS
        rows, weight = _cancelling(counts[-1], weight.shape[0], weight.shape[1], weight.dtype)
    else:
        counts = [count for count in _COUNTS if count <= 17]
        rows = torch.randn(counts[-1], weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    whole = F.linear(rows, weight, bias)
    if any(not torch.equal(F.linear(rows[:count].clone(), weight, bias), whole[:count]) for count in counts):
        return False
    alone = torch.cat([F.linear(rows[row : row + 1].clone(), weight, bias) for row in range(min(16, len(rows)))])
    return torch.equal(alone, whole[: len(alone)])


def attention_joins(
    key: tuple[Any, ...], attend: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> bool:
    """Whether ``attend(query, keys, values, bias)`` gives each row of a batch, one query each, the bits it has alone.

    Args:
        key: tells attention functions apart.
        shape: heads, heads of keys and values, width of a key, width of a value.
    """
    key = ("attention", key, torch.get_num_threads())
    if key not in _verdicts:
        _verdicts[key] = _probe_attention(attend, dtype, *shape)
    return _verdicts[key]


@torch.no_grad()
def _probe_attention(
    attend: Callable[..., Tensor], dtype: torch.dtype, heads: int, kv_heads: int, dim: int, value_dim: int
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = (1, 7, 8, 17, 33, 129, 513)
    for length in lengths if heads * dim <= 512 else lengths[::2]:
        for count in (2, 16):
            keys, values = numbers(count, kv_heads, length + 3, dim), numbers(count, kv_heads, length + 3, value_dim)
            keys, values = keys[:, :, :length], values[:, :, :length]
            query, bias = numbers(count, heads, 1, dim), numbers(1, heads, 1, length)
            together = attend(query, keys, values, bias)
            for row in {0, 1, count // 2, count - 1}:
                part = slice(row, row + 1)
                if not torch.equal(together[part], attend(query[part], keys[part], values[part], bias)):
                    return False
    return True


class RowExact(TorchFunctionMode):
    """Inside the block a matrix product that does not keep a row's bits in company is computed row by row, in the very
    shapes of a row alone.

    Args:
        lengths: tokens of each row; the joined tensors are [rows, longest, ...] or, flattened, [rows * longest, ...].
        left: rows are padded on the left.
    """

    def __init__(self, lengths: Sequence[int], left: bool = False) -> None:
        super().__init__()
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        self.left = left
        self.split = 0  # products that were computed row by row

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and len(self.lengths) > 1:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if linear_joins(weight, bias):
            return F.linear(input, weight, bias)
        self.split += 1
        count, longest = len(self.lengths), self.longest
        if input.dim() == 3 and input.shape[:2] == (count, 1):  # one token of each row: a decoding step, or a head
            return torch.cat([F.linear(part, weight, bias) for part in input.clone().split(1)])
        if input.dim() == 2 and longest == 1:
            # A router's rows, or an expert's, each of another row of the step: alone it would see one.
            return torch.cat([F.linear(part, weight, bias) for part in input.clone().split(1)])
        if input.dim() == 3 and input.shape[:2] == (count, longest):
            return self._padded(input, weight, bias)
        if input.dim() == 2 and input.shape[0] == count * longest:
            return self._padded(input.view(count, longest, -1), weight, bias, flat=True).flatten(0, 1)
        raise RuntimeError(
            f"a matrix product of input {tuple(input.shape)} in a step of {count} rows of {longest} tokens: its rows "
            "cannot be told apart; serve this model with --rows 1"
        )

    def _padded(self, input: Tensor, weight: Tensor, bias: Tensor | None, flat: bool = False) -> Tensor:
        output = input.new_zeros(*input.shape[:2], weight.shape[0])
        for row, length in enumerate(self.lengths):
            own = slice(self.longest - length, None) if self.left else slice(length)
            part = input[row, own].clone()
            output[row, own] = F.linear(part if flat else part[None], weight, bias)
        return output
