"""What a predictor must know of a model: its stacks, MoE layers, token embeddings and fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STACKS = ("encoder", "decoder", "causal")
# What the families' configurations call the number of experts that a router chooses for each token.
CHOICES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)


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
        choices: experts that a router chooses for each token.
    """

    stack: nn.Module
    embedding: Tensor
    routers: tuple[nn.Module, ...]
    blocks: tuple[int, ...]
    experts: int
    fingerprint: str
    choices: int = 1

    @property
    def layers(self) -> int:
        return len(self.routers)


def predicted_stack(model: nn.Module) -> str:
    """The stack whose tables ``stream`` takes: "causal" of a decoder-only model, "encoder" of the Switch family."""
    return "causal" if experts_of_seam(model) else "encoder"


def stack_facts(model: nn.Module, stack: str = "encoder") -> StackFacts:
    """Find the stack of a model, plain or with swapped experts.

    Args:
        model: any module that holds a Switch ``encoder`` (and ``decoder``) at some depth, or the stack itself; for
            "causal" a decoder-only model of transformers' experts seam.
        stack: "encoder", "decoder" or "causal".

    Raises:
        ValueError: the model has no such stack, no MoE layer in it, or layers of different sizes.
    """
    if stack not in STACKS:
        raise ValueError(f"stack is {stack!r}, expected one of {', '.join(STACKS)}")
    if stack == "causal":
        return _causal_facts(model)
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


def experts_of_seam(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> experts module of transformers' seam, plain or swapped: what it says of its own layout tells it."""
    flags = ("has_gate", "is_transposed", "num_experts", "_apply_gate")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, flag) for flag in flags)}


def _causal_facts(model: Any) -> StackFacts:
    """Facts of a decoder-only model; its layers are its experts modules, in the order of the model's modules."""
    who = type(model).__name__
    found: dict[str, Any] = dict(experts_of_seam(model))
    if not found:
        raise ValueError(f"{who} has no MoE layer of transformers' experts seam; there is nothing to predict")
    experts = {int(module.num_experts) for module in found.values()}
    if len(experts) != 1:
        raise ValueError(f"{who}'s MoE layers have {sorted(experts)} experts, expected one number for all")
    number = experts.pop()
    weight = model.get_input_embeddings().weight.detach()
    routers = tuple(_router_beside(model, name, number, weight.shape[1]) for name in found)
    blocks = tuple(_block_number(name, at) for at, name in enumerate(found))
    if list(blocks) != sorted(set(blocks)):
        blocks = tuple(range(len(found)))
    choices = _choices(model, number)
    tensors = [weight, *(router_matrix(router, number, weight.shape[1]) for router in routers)]
    stack = getattr(model, "base_model", model)
    return StackFacts(stack, weight, routers, blocks, number, fingerprint(tensors), choices)


def _choices(model: Any, experts: int) -> int:
    """Experts that a decoder-only model's routers choose for each token, as its configuration says."""
    config = model.config.get_text_config()
    given = {name: getattr(config, name) for name in CHOICES if getattr(config, name, None) is not None}
    for value in given.values():
        each = set(value) if isinstance(value, (list, tuple)) else {value}
        if len(each) == 1 and isinstance(number := each.pop(), int) and 1 <= number <= experts:
            return number
    raise ValueError(
        f"{type(model).__name__}: its configuration's number of experts a token is {given or 'missing'} "
        f"({', '.join(CHOICES)}), expected one number of 1 to {experts} for all layers"
    )


def _block_number(name: str, position: int) -> int:
    """Of the decoder block that a module stands in; ``position`` where its path has no number."""
    return next((int(part) for part in name.split(".") if part.isdigit()), position)


def _router_beside(model: nn.Module, experts: str, number: int, d_model: int) -> nn.Module:
    """The module beside (or one level above) an experts module that holds the router's matrix."""
    around = experts
    for _ in range(2):
        around = around.rpartition(".")[0]
        for name, module in model.get_submodule(around).named_children():
            inside = f"{around}.{name}" if around else name
            if not experts.startswith(inside) and _matrix(module, number, d_model) is not None:
                return module
    raise ValueError(
        f"{experts}: no module beside it has a matrix [{number}, {d_model}], expected the router that chooses its "
        "experts"
    )


def _matrix(router: nn.Module, number: int, d_model: int) -> Tensor | None:
    return next((p for p in router.parameters() if tuple(p.shape) == (number, d_model)), None)


def router_matrix(router: nn.Module, experts: int, d_model: int) -> Tensor:
    """The matrix [experts, d_model] of one of a decoder-only model's routers, as ``StackFacts.routers`` holds them."""
    found = _matrix(router, experts, d_model)
    if found is None:
        raise ValueError(f"{type(router).__name__} has no matrix [{experts}, {d_model}], expected a router's")
    return found.detach()


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


def check_top_k(top_k: int, experts: int, name: str = "top_k") -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(f"{name} is {top_k!r}, expected an integer in 1..{experts} (the number of experts)")


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
            "trained predictors are for Switch Transformers and for decoder-only models of transformers' experts seam"
        )
    return found[0]
