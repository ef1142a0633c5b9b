"""``dense_dtype``: the large matrices beside the experts (attention, dense and shared feed-forward, the head) are kept
as bfloat16, int8 or int4 and computed by ``torch.ops.sida.linear``.

A swapped ``nn.Linear`` keeps its place, its name and its bias; its parameter ``weight`` is gone. While transformers
loads a checkpoint, a weight is rounded the moment it is set: one at a time is in memory in the checkpoint's type.
Routers, norms, embeddings and small matrices stay as transformers has them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sida_ext import ops
from sida_ext.experts.budget import format_bytes
from sida_ext.experts.quantise import GROUP, Quantised, is_quantised, quantise
from sida_ext.models.families import family_of
from sida_ext.models.seam_source import meta_model

__all__ = [
    "DenseLinear",
    "dense_linears",
    "expect_dense",
    "finish_dense",
    "loading_one_by_one",
    "saved_bytes",
    "wants_float32",
]

logger = logging.getLogger("sida_ext")

# Numbers of a matrix below which it stays transformers': its bytes are nothing beside the others, a router's gate or a
# classifier's head is told apart by them.
LARGE = 1 << 14
# Numbers of all large matrices from which on a CPU without bfloat16 instructions is spared torch's bfloat16 products.
WORTH = 1 << 24
# Parts of a module's path that stand for what chooses experts.
ROUTERS = frozenset(("router", "gate"))
# transformers' switch: read one weight after the other instead of ahead, by threads.
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


@dataclass(frozen=True)
class Matrix:
    """A weight as the kernels take it. Read-only: copies of a model share it.

    Attributes:
        values: bfloat16 or int8 [rows, columns], int4: uint8 [rows, 16 * ceil(columns / 32)].
        scale: None for bfloat16; int8: float32 [rows]; int4: float16 [rows, ceil(columns / 32)].
        columns: of the matrix.
    """

    values: Tensor
    scale: Tensor | None
    columns: int

    @classmethod
    def of(cls, weight: Tensor, dtype: str) -> Matrix:
        """``weight`` [rows, columns] rounded to ``dtype``, in memory of its own."""
        return cls.empty(weight.shape, dtype).filled(weight)

    @classmethod
    def empty(cls, shape: torch.Size, dtype: str) -> Matrix:
        """Memory for a weight of that shape, not touched yet."""
        rows, columns = shape

        def place(kind: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=kind, device="cpu")

        groups = -(-columns // GROUP)
        if dtype == "bfloat16":
            return cls(place(torch.bfloat16, rows, columns), None, columns)
        if dtype == "int8":
            return cls(place(torch.int8, rows, columns), place(torch.float32, rows), columns)
        return cls(place(torch.uint8, rows, groups * GROUP // 2), place(torch.float16, rows, groups), columns)

    def filled(self, weight: Tensor) -> Matrix:
        """The same memory, with ``weight`` rounded to its type in it."""
        with torch.no_grad():
            if self.scale is None:
                self.values.copy_(weight)
            else:
                dtype = self.dtype
                assert is_quantised(dtype)  # for the type checker: it has factors
                found = quantise(weight.detach(), dtype)
                self.values.copy_(found.values)
                self.scale.copy_(found.scale)
        return self

    def dequantise(self) -> Tensor:
        """float32 [rows, columns], exactly what the kernels multiply with."""
        if self.scale is None:
            return self.values.float()
        return Quantised(self.values, self.scale, self.columns).dequantise()

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.scale is None else Quantised(self.values, self.scale, self.columns).dtype

    @property
    def bytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Matrix:
        return self


class StoredWeight(Tensor):
    """What a swapped linear has as ``weight``, for code that reads it: shape, dtype and device for nothing; whatever
    computes with it gets the stored numbers, dequantised each time. It cannot be written to."""

    matrix: Matrix
    path: str
    _said = False

    @staticmethod
    def __new__(cls, matrix: Matrix, dtype: torch.dtype, path: str) -> StoredWeight:
        shape = (matrix.values.shape[0], matrix.columns)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.matrix, made.path = matrix, path
        made._is_hf_initialized = True  # type: ignore[attr-defined]  # for transformers: nothing to initialise
        return made

    def numbers(self) -> Tensor:
        if not self._said:
            self._said = True
            logger.warning("%s.weight is read by code outside of it, and dequantised each time", self.path)
        return self.matrix.dequantise().to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable and isinstance(args[0], StoredWeight):
            raise RuntimeError(f"{args[0].path}.weight is stored in few bits and cannot be changed; {_CHANGE}")

        def plain(value: Any) -> Any:
            if isinstance(value, StoredWeight):
                return value.numbers()
            return type(value)(plain(each) for each in value) if isinstance(value, (list, tuple)) else value

        return func(*plain(args), **{name: plain(value) for name, value in (kwargs or {}).items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StoredWeight, (self.matrix, self.dtype, self.path)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"StoredWeight({list(self.shape)}, {self.dtype})"


_CHANGE = "change the model first, then swap it"


class DenseLinear(nn.Linear):
    """``nn.Linear`` computed by ``torch.ops.sida.linear`` from a :class:`Matrix`. A row's bits depend on its token
    alone, not on the batch or the number of threads. ``bias`` stays a parameter.

    Attributes:
        matrix: the weight.
        path: of the module in its model.
    """

    matrix: Matrix
    path: str

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] float32, bfloat16 or float16 -> [..., out_features] of the same dtype, summed in fp32."""
        matrix, bias = self.matrix, self.bias
        return ops.linear(input, matrix.values, matrix.scale, None if bias is None else bias.float())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "matrix" in self.__dict__:
            raise RuntimeError(f"{self.path}.weight is stored in few bits and cannot be changed; {_CHANGE}")
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> DenseLinear:
        """Every move and cast: the stored numbers stay as they are, ``weight`` tells the new dtype."""
        probe = fn(torch.empty(0, dtype=self.weight.dtype))
        if probe.device.type != "cpu":
            raise RuntimeError(f"{self.path} is computed by kernels of the CPU and cannot move to {probe.device}")
        super()._apply(fn, recurse)
        self.__dict__["weight"] = StoredWeight(self.matrix, probe.dtype, self.path)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.matrix.dtype}"


class _ArrivingLinear(nn.Linear):
    """An ``nn.Linear`` without data, until transformers sets its weight: then it is a :class:`DenseLinear`."""

    path: str
    place: Matrix

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # What transformers has read, not what it makes for a weight that the checkpoint lacks and initialises later.
        if (
            name == "weight"
            and isinstance(value, Tensor)
            and not value.is_meta
            and getattr(value, "_is_hf_initialized", False)
        ):
            _become(self, _rounded(self, value, self.place))
            _give_back()


def _give_back() -> None:
    """Give freed pages back to the system where the C library can be asked to (glibc): small parameters between the
    wide weights that come and go would keep holes of their size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _TiedLinear(_ArrivingLinear):
    """The same for a weight that is another module's too: both are there when all is loaded."""

    __setattr__ = nn.Linear.__setattr__


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> NoReturn:
    raise RuntimeError(
        "state_dict() of a model whose matrices are stored in few bits would lack them "
        f"({cast(DenseLinear, module).path}); use the checkpoint that it was loaded from"
    )


def _rounded(module: nn.Linear, weight: Tensor, place: Matrix) -> Matrix:
    try:
        return place.filled(weight)
    except ValueError as error:
        raise ValueError(f"{module.path}: {error}") from error


def _become(module: nn.Linear, matrix: Matrix) -> None:
    """Let the module compute from ``matrix``; its parameter ``weight`` goes."""
    dtype = module._parameters.pop("weight").dtype  # type: ignore[union-attr]
    module.__dict__.pop("place", None)
    module.__class__ = DenseLinear
    swapped = cast(DenseLinear, module)
    swapped.__dict__["weight"] = StoredWeight(matrix, dtype, swapped.path)
    swapped.matrix = matrix
    swapped.register_state_dict_pre_hook(_refuse_state_dict)


def _within(path: str, places: Iterable[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _is_router(path: str, module: nn.Module, blocks: dict[str, int]) -> bool:
    """Whether a module has a part in choosing experts.

    Args:
        blocks: path of what holds an experts module -> number of experts.
    """
    if not ROUTERS.isdisjoint(path.split(".")):
        return True
    rows = getattr(module, "out_features", None)
    return any(_within(path, (block,)) and rows == experts for block, experts in blocks.items())


def dense_linears(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[dict[str, nn.Linear], dict[str, list[int]]]:
    """The large linears beside experts and routers.

    Args:
        layers: path -> MoE layer or experts module; nothing inside of one is taken.

    Returns:
        Path -> linear, in the model's order; and of the large matrices that are no plain ``nn.Linear`` (Conv1D,
        subclasses with a forward of their own) numbers by class, which stay as they are.
    """
    blocks = {path.rpartition(".")[0]: int(getattr(layer, "num_experts", 0)) for path, layer in layers.items()}
    found: dict[str, nn.Linear] = {}
    others: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or weight.numel() < LARGE or isinstance(module, nn.Embedding):
            continue
        if _within(path, layers) or _is_router(path, module, blocks):
            continue
        if type(module) is nn.Linear:
            found[path] = module
        elif "Router" not in type(module).__name__:
            others.setdefault(type(module).__name__, []).append(weight.numel())
    return found, others


def expect_dense(model: nn.Module, layers: dict[str, nn.Module], dtype: str) -> None:
    """Make the large linears of a model without data take their weights as ``dtype`` when transformers sets them."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {*tied, *tied.values()}
    found, others = dense_linears(model, layers)
    for path, module in found.items():
        # Before anything is read: what comes and goes while weights are rounded then leaves no holes between them.
        module.path, module.place = path, Matrix.empty(module.weight.shape, dtype)  # type: ignore[assignment]
        module.__class__ = _TiedLinear if f"{path}.weight" in names else _ArrivingLinear
    _say_others(others, dtype)


def finish_dense(model: nn.Module, layers: dict[str, nn.Module], dtype: str) -> None:
    """Swap the large linears that have their weights now: those of a model in memory; of a loaded one what was tied, or
    initialised because the checkpoint lacks it. Either all or, where one cannot be rounded, none.

    Raises:
        ValueError: a weight that is not finite; the message names it.
    """
    waiting = {path: module for path, module in model.named_modules() if isinstance(module, _ArrivingLinear)}
    others: dict[str, list[int]] = {}
    if not any(isinstance(module, (_ArrivingLinear, DenseLinear)) for module in model.modules()):
        waiting, others = dense_linears(model, layers)  # type: ignore[assignment]
    owners = _embeddings(model)
    made: dict[int, Matrix] = {}
    for path, module in waiting.items():
        module.path = path
        if id(module.weight) not in made:
            place = module.__dict__.get("place") or Matrix.empty(module.weight.shape, dtype)
            made[id(module.weight)] = _rounded(module, module.weight, place)
    for path, module in waiting.items():
        matrix = made[id(module.weight)]
        if (owner := owners.get(id(module.weight))) is not None:
            logger.warning(
                "%s is the matrix of %s, which stays as it is; %s becomes a copy of it in %s, %s more",
                path, owner, path, dtype, format_bytes(matrix.bytes),
            )  # fmt: skip
        _become(module, matrix)
    swapped = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, DenseLinear)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target in [target for target in tied if target in swapped]:
        del tied[target]
    _say_others(others, dtype)


def _embeddings(model: nn.Module) -> dict[int, str]:
    """Identity of a table -> path of the first embedding that it is of."""
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            owners.setdefault(id(module.weight), path)
    return owners


def _say_others(others: dict[str, list[int]], dtype: str) -> None:
    if others:
        what = ", ".join(f"{len(sizes)} {kind} of {sum(sizes):,} numbers" for kind, sizes in others.items())
        logger.warning("dense_dtype=%r leaves matrices as they are that are no plain nn.Linear: %s", dtype, what)


def saved_bytes(config: PreTrainedConfig, model_class: type[PreTrainedModel], dtype: str, itemsize: int) -> int:
    """Bytes that the large linears of a model take less in ``dtype`` than at ``itemsize`` bytes a
    number. Negative: more, as a copy of a tied matrix is."""
    model = meta_model(config, model_class)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    saved = 0
    for path, module in dense_linears(model, family_of(model).layers(model))[0].items():
        rows, columns = module.weight.shape
        groups = -(-columns // GROUP)
        stored = {"bfloat16": 2 * rows * columns, "int8": rows * (columns + 4), "int4": 18 * rows * groups}[dtype]
        saved += (0 if f"{path}.weight" in tied else itemsize * rows * columns) - stored
    return saved


def slow_bfloat16() -> bool:
    """Whether torch computes bfloat16 products on this CPU without instructions made for them: several times slower
    than float32 ones."""
    return platform.machine() in ("x86_64", "AMD64") and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def wants_float32(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    """Whether a checkpoint is better served here with its matrices as bfloat16 of our kernels and float32 for the rest
    than in bfloat16 by torch: it is bfloat16, this CPU is slow at that, and its matrices are more than a trifle."""
    parts = (config, config.get_text_config(decoder=True))
    named = next((part.dtype for part in parts if getattr(part, "dtype", None) is not None), None)
    if str(named).removeprefix("torch.") != "bfloat16" or not slow_bfloat16():
        return False
    empty = meta_model(config, model_class)
    found, _ = dense_linears(empty, family_of(empty).layers(empty))
    return sum(module.weight.numel() for module in found.values()) >= WORTH


@contextmanager
def loading_one_by_one() -> Iterator[None]:
    """While inside, transformers reads a weight when its turn comes. Its threads would read and cast ahead of the
    rounding, and the whole would be in memory for a time."""
    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_ONE_BY_ONE, None)
        else:
            os.environ[_ONE_BY_ONE] = before
