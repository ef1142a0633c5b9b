"""Typed functions over ``torch.ops.sida``, side by side with their fake (meta) implementations.

The schemas are in ``csrc/bindings/ops.cpp``. Importing this module loads the compiled extension, and registers what
torch's stable ABI has no way to: the fake implementations, and the error of a backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sida_ext._load import _C  # noqa: F401  (registers the ops)

__all__ = ["attention", "linear", "moe_ffn", "moe_layer", "rms_norm", "route_top1"]


class _NoBackward(torch.autograd.Function):
    """Experts and routers are frozen: a backward through an op is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, name: str, compute: Callable[[], Any], *recorded: Tensor) -> Any:
        ctx.name = name
        return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"sida::{ctx.name} has no backward: swapped weights are frozen; train the model before they are swapped, "
            "or run it under torch.no_grad()"
        )


def _autograd_kernel(name: str) -> Callable[..., Any]:
    """What an op does where autograd is on. (``torch.library.register_autograd`` takes no op with a tensor that is
    given by its name alone.)
    """
    op = getattr(torch.ops.sida, name).default

    def kernel(keys: Any, *arguments: Any, **keywords: Any) -> Any:
        def compute() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments, **keywords)

        if not torch.is_grad_enabled():
            return compute()
        given = (*arguments, *keywords.values())
        recorded = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
        return _NoBackward.apply(name, compute, *recorded) if recorded else compute()

    return kernel


_kernels = torch.library.Library("sida", "IMPL")
for _name in __all__:
    _kernels.impl(_name, _autograd_kernel(_name), "Autograd", with_keyset=True)


def _is_recorded(*arguments: Any, **keywords: Any) -> bool:
    """Whether autograd would record a call. A loop: this is asked at every call, and ``any`` takes twice as long."""
    for value in (*arguments, *keywords.values()):  # noqa: SIM110
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def _call(op: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call an op; where nothing is recorded, below autograd, whose kernel in Python costs more than the op's checks."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _is_recorded(*arguments, **keywords)):
        return op(*arguments, **keywords)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments, **keywords)


def moe_ffn(
    x: Tensor,
    expert_index: Tensor,
    gate: Tensor,
    wi: Tensor,
    wo: Tensor,
    slot_of_expert: Tensor,
    wi_scale: Tensor | None = None,
    wo_scale: Tensor | None = None,
    activation: str = "relu",
    *,
    wi_bias: Tensor | None = None,
    wo_bias: Tensor | None = None,
    missing: str = "error",
) -> Tensor:
    """Expert feed-forward of one MoE layer:
    ``out[t] = sum_k gate[t, k] * (wo[s] @ act(wi[s] @ x[t] + wi_bias[s]) + wo_bias[s])``,
    ``s = slot_of_expert[expert_index[t, k]]``, summed in the order of k in fp32 and rounded once.

    Args:
        x: [T, d_model] float32, bfloat16 or float16, rows contiguous.
        expert_index: [T, K] of an integer type; -1: no expert, contributes 0.
        gate: [T, K] float32.
        wi: [S, d_ff, d_model] float32, bfloat16, float16 or int8, rows contiguous, slots may be strided; for a
            gated activation [S, 2 * d_ff, d_model], gate rows first. Or uint8 [S, d_ff, 16 * ceil(d_model / 32)]: pairs
            of 4-bit weights, int4 or mxfp4 as the dtype of ``wi_scale`` says (:mod:`sida_ext.experts.quantise`).
        wo: [S, d_model, d_ff], of the type of ``wi``; 4-bit: [S, d_model, 16 * ceil(d_ff / 32)].
        slot_of_expert: [E] int32, -1: not resident.
        wi_scale, wo_scale: int8: float32, one factor for each row of ``wi`` and ``wo`` ([S, rows]). 4-bit: one for each
            32 columns of a row ([S, rows, ceil(columns / 32)]), float16 for int4, uint8 exponents (e8m0) for mxfp4.
        activation: relu, gelu, gelu_new, silu or another element-wise activation of transformers; with ``gated-``
            before it, ``act(gate) * up``. ``"swiglu_oai"`` is GPT-OSS's, gated without a prefix: with ``g = min(gate,
            7)``, ``(clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g)`` (``GptOssExperts`` of transformers, whose gate and
            up rows alternate: separate them).
        wi_bias, wo_bias: float32, one for each row of ``wi`` and ``wo`` ([S, rows]), with weights of any dtype.
        missing: ``"error"`` raises ValueError for an expert that is not resident and wanted; ``"skip"``: it
            contributes 0, so that a layer can run in waves.

    Returns:
        [T, d_model] of x's dtype. Weights are converted in registers; no copy of them is made. The bits of a row do not
        depend on other rows, on the slots or on the number of threads.

    Raises:
        ValueError, TypeError, IndexError: the message names the argument, the value found and the value expected.
    """
    return _call(
        torch.ops.sida.moe_ffn.default,
        x,
        expert_index,
        gate,
        wi,
        wo,
        slot_of_expert,
        wi_scale,
        wo_scale,
        activation,
        wi_bias=wi_bias,
        wo_bias=wo_bias,
        missing=missing,
    )


@torch.library.register_fake("sida::moe_ffn")
def _moe_ffn_fake(
    x,
    expert_index,
    gate,
    wi,
    wo,
    slot_of_expert,
    wi_scale=None,
    wo_scale=None,
    activation="relu",
    *,
    wi_bias=None,
    wo_bias=None,
    missing="error",
):
    torch._check(x.dim() == 2 and expert_index.dim() == 2, lambda: "moe_ffn: x and expert_index must have 2 dimensions")
    torch._check(x.shape[0] == expert_index.shape[0], lambda: "moe_ffn: x and expert_index differ in tokens")
    return x.new_empty(x.shape)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` with weights of any type that :func:`moe_ffn` takes, in its kernels:
    ``out = x @ weight.T + bias``, summed in fp32 and rounded once to x's dtype.

    Args:
        x: [..., columns] float32, bfloat16 or float16; copied if its last dimension is not contiguous.
        weight: [rows, columns] float32, bfloat16, float16 or int8, or uint8 [rows, 16 * ceil(columns / 32)]: pairs of
            4-bit weights (:mod:`sida_ext.experts.quantise`). Rows contiguous.
        scale: for int8 float32 [rows]; for uint8 [rows, ceil(columns / 32)], float16: the weights are int4, or uint8:
            they are mxfp4.
        bias: [rows] float32.

    Returns:
        [..., rows] of x's dtype. A row's bits depend on its token alone, not on other tokens or the number of threads.

    Raises:
        ValueError, TypeError: the message names the argument, the value found and the value expected.
        NotImplementedError: a backward, as the weights are frozen.
    """
    return _call(torch.ops.sida.linear.default, x, weight, scale, bias)


@torch.library.register_fake("sida::linear")
def _linear_fake(x, weight, scale=None, bias=None):
    torch._check(x.dim() >= 1, lambda: "linear: x must have a dimension at least")
    torch._check(weight.dim() == 2, lambda: "linear: weight must have 2 dimensions")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))`` over the last dimension, as ``T5LayerNorm`` and the RMS norms of
    transformers' language models: in fp32, rounded before the weight and after it.

    Args:
        x: [..., columns] float32, bfloat16 or float16; copied if not contiguous.
        weight: [columns] of the same dtype.
        eps: 0 or more.

    Returns:
        [..., columns] of x's dtype. A row's bits depend on that row alone. On the CPU.

    Raises:
        ValueError, TypeError: the message names the argument, the value found and the value expected.
        NotImplementedError: a backward, as the weights are frozen.
    """
    return _call(torch.ops.sida.rms_norm.default, x, weight, eps)


@torch.library.register_fake("sida::rms_norm")
def _rms_norm_fake(x, weight, eps):
    torch._check(x.dim() >= 1, lambda: "rms_norm: x must have a dimension at least")
    torch._check(weight.dim() == 1, lambda: "rms_norm: weight must have 1 dimension")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """``softmax(scale * query @ key.T + bias) @ value`` of many sequences, each over its own keys: in fp32, rounded
    once.

    Args:
        query: [B, H, M, D] float32, bfloat16 or float16, the last dimension contiguous, as in all others; or [1, H, M,
            D], in which the queries of the B sequences stand one behind the other.
        key: [S, H_kv, N, D] of the same dtype; query head h reads head ``h // (H / H_kv)``.
        value: [S, H_kv, N, D_v].
        spans: int64 [B, 4]: for each sequence the slot (of S) of its keys, the first of them, one past the last, and
            the column of ``bias`` that belongs to the first. Of sequences that stand one behind the other [B, 6]: then
            the first query and one past the last, in ascending order.
        bias: [1 or B, 1 or H, 1 or M, columns] of the dtype of ``query``; M is that of the longest sequence.
        causal: the last query sees all keys of its span, each one before it one key less.

    Returns:
        [B, M, H, D_v] (one behind the other: [1, M, H, D_v]); 0 where a query sees no key or belongs to no sequence. A
        sequence's bits depend on its own queries, keys, values and bias alone: not on other sequences, padding outside
        of its span, or the number of threads.

    Raises:
        ValueError, TypeError, IndexError: the message names the argument, the value found and the value expected.
        NotImplementedError: a backward. There is no kernel for CUDA.
    """
    return _call(torch.ops.sida.attention.default, query, key, value, spans, scale, bias, causal)


@torch.library.register_fake("sida::attention")
def _attention_fake(query, key, value, spans, scale, bias=None, causal=False):
    torch._check(query.dim() == 4 and value.dim() == 4, lambda: "attention: query and value must have 4 dimensions")
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


def route_top1(
    router_logits: Tensor, capacity: int, *, probs_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Top-1 routing with expert capacity, as in transformers 5.x: softmax in fp32, rounded to ``probs_dtype`` before
    the argmax; each sequence keeps the first ``capacity`` tokens of an expert, in token order, padding included.

    Args:
        router_logits: [B, S, E] float32, bfloat16 or float16.
        capacity: tokens that one expert takes from one sequence.
        probs_dtype: dtype of the router's input (float32, bfloat16, float16); None: that of ``router_logits``.

    Returns:
        ``expert_index`` [B, S] int32, -1 for a token over capacity, and ``gate`` [B, S] float32, the probability of
        the chosen expert (of a dropped token too).
    """
    return _call(torch.ops.sida.route_top1.default, router_logits, capacity, probs_dtype=probs_dtype)


@torch.library.register_fake("sida::route_top1")
def _route_top1_fake(router_logits, capacity, *, probs_dtype=None):
    torch._check(router_logits.dim() == 3, lambda: "route_top1: router_logits must have 3 dimensions")
    shape = router_logits.shape[:2]
    return (
        router_logits.new_empty(shape, dtype=torch.int32),
        router_logits.new_empty(shape, dtype=torch.float32),
    )


def moe_layer(x: Tensor, expert_index: Tensor, gate: Tensor, handle: int) -> Tensor:
    """Demand the experts of ``expert_index``, compute :func:`moe_ffn` with them in waves as they arrive, release them.

    Args:
        x: [T, d_model] float32, bfloat16 or float16.
        expert_index: [T, K] of an integer type, values in [-1, experts of the layer).
        gate: [T, K] float32.
        handle: from :meth:`sida_ext.Runtime.layer_handle`.

    Returns:
        [T, d_model] of x's dtype; the same bits for every budget and timing.

    Raises:
        ValueError, TypeError, IndexError: as :func:`moe_ffn`; StoreError, OSError: an expert could not be loaded;
        TimeoutError: a wait passed the runtime's deadline; RuntimeError: the runtime was closed.
    """
    return _call(torch.ops.sida.moe_layer.default, x, expert_index, gate, handle)


@torch.library.register_fake("sida::moe_layer")
def _moe_layer_fake(x, expert_index, gate, handle):
    torch._check(x.dim() == 2 and expert_index.dim() == 2, lambda: "moe_layer: x and expert_index must be 2-D")
    torch._check(x.shape[0] == expert_index.shape[0], lambda: "moe_layer: x and expert_index differ in tokens")
    return x.new_empty(x.shape)
