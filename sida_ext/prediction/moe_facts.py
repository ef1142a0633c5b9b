"""What a predictor must know of a model: its stacks, MoE layers, token embeddings and fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StackFacts:
    """One stack (encoder or decoder) as its predictor sees it.

    Attributes:
        stack: the module that is called with input_ids.
        embedding: [vocabulary, d_model], the model's own tensor (not a copy).
        routers: the router of each MoE layer, in order.
        blocks: the index of each MoE layer's block in the stack.
        experts: experts in each MoE layer.
        fingerprint: see ``fingerprint``.
    """

    stack: nn.Module
    embedding: Tensor
    routers: tuple[nn.Module, ...]
    blocks: tuple[int, ...]
    experts: int
    fingerprint: str

    @property
    def layers(self) -> int:
        return len(self.routers)


def stack_facts(model: nn.Module, stack: str = "encoder") -> StackFacts:
    """Find the stack of a Switch model, plain or with swapped experts.

    Args:
        model: any module that holds a Switch ``encoder`` (and ``decoder``) at some depth, or the stack itself.
        stack: "encoder" or "decoder".

    Raises:
        ValueError: the model has no such stack, no MoE layer in it, or layers of different sizes.
    """
    if stack not in ("encoder", "decoder"):
        raise ValueError(f"stack is {stack!r}, expected 'encoder' or 'decoder'")
    module = _find_stack(model, stack)
    embedding = getattr(module, "embed_tokens", None)
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"the {stack} of {type(model).__name__} has no embed_tokens; a predictor reads token embeddings"
        )
    routers, blocks = [], []
    for number, block in enumerate(module.block):
        router = getattr(getattr(block.layer[-1], "mlp", None), "router", None)
        if router is not None:
            routers.append(router)
            blocks.append(number)
    if not routers:
        raise ValueError(f"the {stack} of {type(model).__name__} has no MoE layer; there is nothing to predict")
    experts = {int(router.classifier.weight.shape[0]) for router in routers}
    if len(experts) != 1:
        raise ValueError(f"the {stack}'s MoE layers have {sorted(experts)} experts, expected one number for all")
    weight = embedding.weight.detach()
    tensors = [weight, *(p.detach() for router in routers for p in router.classifier.parameters())]
    return StackFacts(module, weight, tuple(routers), tuple(blocks), experts.pop(), fingerprint(tensors))


def fingerprint(tensors: list[Tensor]) -> str:
    """SHA-256 over shapes and values rounded to bfloat16, so that a float32 model and its bfloat16 copy agree."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} among embeddings and routers holds NaN or inf")
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_tokens(input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int | None = None) -> Tensor:
    """Check what a predictor was given.

    Args:
        vocabulary: ids from here on are an error; None: any id may be, for what predicts tokens that have come to the
            model since (``resize_token_embeddings``).

    Returns:
        [B, S] bool: True where there is a real token. Without a mask every position is one, as in the model.

    Raises:
        TypeError, ValueError: naming the argument, the value found and the value expected.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids is {kind}, expected an int32 or int64 tensor of token ids")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected [B, S]")
    if attention_mask is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask is {type(attention_mask).__name__}, expected a tensor")
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected input_ids' {tuple(input_ids.shape)}"
            )
        real = attention_mask == 1
        if not bool((real | (attention_mask == 0)).all()):
            found = attention_mask[~(real | (attention_mask == 0))][0].item()
            raise ValueError(f"attention_mask holds {found}, expected 1 (token) or 0 (padding)")
    check_vocabulary(input_ids, real, vocabulary)
    return real


def check_vocabulary(input_ids: Tensor, real: Tensor | None, vocabulary: int | None) -> None:
    """Raises ValueError for an id that is no token of the model's.

    Args:
        real: [B, S], where ids count; None: everywhere.
        vocabulary: tokens of the model; None: not known.
    """
    unknown = input_ids < 0 if vocabulary is None else (input_ids < 0) | (input_ids >= vocabulary)
    if real is not None:
        unknown = unknown & real
    if bool(unknown.any()):
        row, column = (int(n) for n in unknown.nonzero()[0])
        known = "tokens from 0 on" if vocabulary is None else f"tokens 0..{vocabulary - 1}"
        raise ValueError(
            f"input_ids[{row}, {column}] is {int(input_ids[row, column])}; the model knows {known} (is this the "
            "model's own tokenizer?)"
        )


def check_top_k(top_k: int, experts: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k!r}, expected an integer in 1..{experts} (the number of experts)")


def _find_stack(model: nn.Module, stack: str) -> Any:
    wants_decoder = stack == "decoder"
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "block", None), nn.ModuleList)
        and bool(getattr(module, "is_decoder", False)) == wants_decoder
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} {stack} stacks of the Switch family, expected exactly one; "
            "trained predictors are for Switch Transformers"
        )
    return found[0]
