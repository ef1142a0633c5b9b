"""``sida serve --shared``: attention, and the matrix products that torch computes otherwise for another number of rows,
go through kernels of ours whose results for a row depend on that row alone. So do, for the time that they take, the
products of steps of one token a row, and the norms.

The change is made to the model itself: ``generate`` of one prompt takes the same kernels. So rows keep the bits that
they have alone while they share every call, but these are other bits than those of the model before: sums in fp32 in
another order. Nothing else of the model changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sida_ext import ops
from sida_ext.serving.row_exact import linear_joins

__all__ = ["IMPLEMENTATION", "LONG", "SharedWeight", "StepWeight", "attend_shared", "is_long", "share_rows"]

IMPLEMENTATION = "sida_shared"

# Keys from which on a prompt's attention is torch's, a row at a time: by then a call costs little beside its work, and
# torch's kernel, which takes queries in blocks, is faster than ours.
LONG = 512

# Options of attention functions that are no part of softmax(scale * q k + bias) v, and their values that ask nothing.
_UNSHARED: dict[str, tuple[Any, ...]] = {
    "softcap": (None,),
    "s_aux": (None,),
    "sliding_window": (None,),
    "output_attentions": (None, False),
}


class SharedWeight(nn.Parameter):
    """A matrix whose product with a row has the same bits beside any others: by ``torch.ops.sida.linear``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return _linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


class StepWeight(SharedWeight):
    """A matrix whose product torch computes with the same bits in any company, and ours in less time where each row
    brings one token. What a row brings depends on the row alone; a prompt of one token is no company for longer ones.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                given = args[0] if args else kwargs["input"]
                if given.dim() == 3 and given.shape[1] == 1:
                    return _linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(input, weight, None, None if bias is None else bias.float())


def share_rows(model: Any) -> int:
    """Change a model so that its rows can share every call; see the module.

    Args:
        model: on the CPU, in evaluation mode, its experts swapped or not.

    Returns:
        How many matrices are computed by our kernels from now on: those whose product by torch depends on the company,
        and in steps of one token a row, where ours take less time, the decoder's others.

    Raises:
        ValueError: the model is not on the CPU.
    """
    devices = {parameter.device.type for parameter in model.parameters()} - {"cpu"}
    if devices:
        raise ValueError(f"the model is on {', '.join(sorted(devices))}; rows are shared on the CPU only: no --shared")
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, shared_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = IMPLEMENTATION
    changed, texts = 0, _of_texts(model)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point():
            continue
        if isinstance(module, nn.Embedding) and weight is not _head(model):
            continue
        joins = linear_joins(weight.detach(), getattr(module, "bias", None))
        if joins and id(weight) in texts:
            continue
        weight.requires_grad_(False)
        weight.__class__ = StepWeight if joins else SharedWeight
        changed += 1
    for module in model.modules():
        if (eps := _rms_eps(module)) is not None:
            module.forward = functools.partial(_rms_norm, module, eps, module.forward)
    return changed


@torch.no_grad()
def _rms_eps(module: nn.Module) -> float | None:
    """What :func:`sida_ext.ops.rms_norm` takes to compute what the module computes; None if it is something else. Found
    by trying: families name their norms as they like, and some add one to the weight."""
    weight = module._parameters.get("weight")
    if set(module._parameters) != {"weight"} or module._modules or weight is None or weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or not weight.is_floating_point():
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, maybe
        return None
    rows = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(0)) + 0.5
    rows = (rows * torch.tensor([[30.0], [1.0], [max(eps, 1e-12) ** 0.5]])).to(weight.dtype)
    exact = rows.double() * (rows.double().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    found = module(rows)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    same = found.dtype == weight.dtype and torch.allclose(found.double(), exact, rtol=tolerance, atol=1e-6)
    return eps if same else None


def _rms_norm(module: Any, eps: float, own: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != module.weight.dtype:
        return own(hidden_states)
    return ops.rms_norm(hidden_states, module.weight, eps)


def _of_texts(model: Any) -> set[int]:
    """The matrices that an encoder-decoder, or a model that writes nothing, applies to its texts: their tokens come
    together with those of others."""
    if not model.can_generate():
        return {id(parameter) for parameter in model.parameters()}
    if not model.config.is_encoder_decoder:
        return set()
    found = [model.get_encoder()] if hasattr(model, "get_encoder") else []
    found += [module.k for name, module in model.named_modules() if name.endswith("EncDecAttention")]
    found += [module.v for name, module in model.named_modules() if name.endswith("EncDecAttention")]
    head = _head(model)  # which may be the encoder's embedding too
    return {id(parameter) for module in found for parameter in module.parameters() if parameter is not head}


def _head(model: Any) -> Any:
    """The matrix that makes logits, which may be the embedding too."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "weight", None)


def is_long(queries: int, keys: int) -> bool:
    """Whether a row's attention is torch's. It depends on the row alone, so alone and in company it is the same."""
    return queries > 1 and keys > LONG


def attend_shared(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[tuple[int, int, int, int]] | Tensor,
    causal: bool,
    options: dict[str, Any],
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`sida_ext.ops.attention` as transformers' attention functions are called.

    Args:
        spans: of each row: slot, first key, one past the last, column of ``bias``.

    Raises:
        RuntimeError: the model asks for more than this kernel computes.
    """
    for name, nothing in _UNSHARED.items():
        if options.get(name) not in nothing:
            raise RuntimeError(f"{type(module).__name__} wants {name}, which rows cannot share; serve without --shared")
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not isinstance(spans, Tensor):
        spans = torch.tensor(spans)
    if bias is not None and bias.stride(-1) != 1:  # learned for each head, and looked up with the heads last
        bias = bias.contiguous()
    return ops.attention(query, key, value, spans, scale, bias, causal)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a model that shares its rows uses outside of joined steps, one row alone among them. A batch whose mask is
    more than padding is computed by torch, without the promise that its rows have the bits they have alone."""
    queries, keys = query.shape[2], key.shape[2]
    spans = (
        [(row, 0, keys, 0) for row in range(query.shape[0])] if attention_mask is None else _unmasked(attention_mask)
    )
    if spans is None or is_long(queries, keys):
        given = {"position_bias": position_bias, "is_causal": is_causal, **options}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)[0], None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and queries > 1 and attention_mask is None  # a mask says all
    return attend_shared(module, query, key, value, spans, causal, options, position_bias), None


def _unmasked(mask: Tensor) -> list[tuple[int, int, int, int]] | None:
    """The span of keys that each row's queries see; None if they do not all see the same, or see no span.

    Args:
        mask: [B, 1, M or 1, N], true or 0 for what is seen, false or the lowest number for the rest.
    """
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        return None
    seen = mask[:, 0, 0]
    if seen.dtype != torch.bool:
        if not bool(((seen == 0) | (seen <= torch.finfo(seen.dtype).min)).all()):
            return None
        seen = seen == 0
    spans = []
    for row, places in enumerate(seen.tolist()):
        count = sum(places)
        first = places.index(True) if count else 0
        if not all(places[first : first + count]):
            return None
        spans.append((row, first, first + count, first))
    return spans
