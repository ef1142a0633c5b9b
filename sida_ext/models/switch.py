"""The swap-in for transformers' Switch MoE layers: ``from_pretrained`` and ``swap_experts``."""

from __future__ import annotations

import functools
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from sida_ext import ops
from sida_ext.experts.checkpoint import Checkpoint, ModuleExperts, resolve_folder
from sida_ext.experts.cuda import on_predictor, resolve_device
from sida_ext.experts.runtime import Runtime, runtime_of
from sida_ext.experts.store import StoreHeader, check_source, default_cache, ensure_store, open_store, write_store
from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.models.decoding import predict_decoder
from sida_ext.prediction.protocol import check_table, split_predictors

__all__ = ["ROUTINGS", "SparseMLP", "Top1Router", "from_pretrained", "moe_layers", "swap_experts"]

ROUTINGS = ("router", "predicted", "confident")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
REFUSED_ARGUMENTS = {
    "device_map": "expert memory has one device, named by device=",
    "quantization_config": "experts are quantised by expert_dtype='int8'",
    "tp_plan": "tensor parallelism is not supported",
    "state_dict": "the experts are read from the checkpoint's files",
    "output_loading_info": "the model alone is returned",
}


class Top1Router(SwitchTransformersTop1Router):
    """transformers' router with softmax, argmax and capacity in one op.

    Returns ``expert_index`` [B, S] int32 (-1: over capacity), ``gate`` [B, S] float32 and the raw router logits
    [B, S, E], which transformers' output capture takes as the third result.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.input_dtype = hidden_states.dtype
        self.classifier = self.classifier.to(self.dtype)
        logits = self.classifier(hidden_states.to(self.dtype))
        # transformers rounds the probabilities to the router's dtype, then to the input's; the second rounding
        # changes nothing when the router computes in fp32 or the input is fp32.
        rounded = hidden_states.dtype if self.dtype == torch.float32 else self.dtype
        if hidden_states.dtype not in (torch.float32, rounded):
            raise ValueError(
                f"router_dtype is {self.dtype} and the model's dtype {hidden_states.dtype}; with a router below "
                "float32 the model must be float32 or of the router's dtype"
            )
        expert_index, gate = ops.route_top1(logits, self.expert_capacity, probs_dtype=rounded)
        return expert_index, gate, logits


class SparseMLP(nn.Module):
    """An MoE layer whose experts live in a :class:`~sida_ext.experts.runtime.Runtime`; replaces
    SwitchTransformersSparseMLP.

    Args:
        router: the layer's own router, kept.
        name: module path of the layer, as in the store.
        table_layer: position of the layer in its stack's hash tables; None where no table covers it.
    """

    def __init__(self, router: SwitchTransformersTop1Router, name: str, table_layer: int | None) -> None:
        super().__init__()
        router.__class__ = Top1Router
        self.router = router
        self.name = name
        self.table_layer = table_layer
        self.routing = "router"
        self.confidence = 0.0
        self.watched = False
        self.observer: Callable[[str, Tensor], None] | None = None  # told the layer's name and the experts in force
        self.training = False

    def connect(self, runtime: Runtime, activation: str, routing: str, confidence: float) -> None:
        self.runtime = runtime
        self.handle = runtime.layer_handle(self.name, activation)
        self.routing = routing
        self.confidence = confidence
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, d_model] -> [B, S, d_model], 0 for tokens over capacity."""
        if self.routing == "predicted" and self.table_layer is not None:
            expert_index, gate, _ = self._predicted(hidden_states)
        else:
            expert_index, gate, _ = self.router(hidden_states)
            if self.watched and self.table_layer is not None:
                chosen = self.runtime.current.chosen
                if chosen is not None:
                    chosen[self.table_layer] = expert_index
            if self.routing == "confident" and self.table_layer is not None:
                named, factor, probability = (part.to(expert_index.device) for part in self._predicted(hidden_states))
                sure = probability >= self.confidence
                expert_index = torch.where(sure, named, expert_index)
                gate = torch.where(sure, factor, gate)
        if self.observer is not None:
            self.observer(self.name, expert_index)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = ops.moe_layer(tokens, expert_index.reshape(-1, 1), gate.reshape(-1, 1), self.handle)
        return out.view(hidden_states.shape)

    def _predicted(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table's first choice for each token: expert_index [B, S], gate [B, S] and its probability [B, S]."""
        table = self.runtime.current.table
        if table is None:
            raise RuntimeError(
                f"{self.name}: routing={self.routing!r} needs the batch's hash table, and there is none; give the "
                "model a predictor (from_pretrained(..., predictor=...)) or run it through sida_ext.stream"
            )
        shape = tuple(table.expert_index.shape)
        if shape[:2] != tuple(hidden_states.shape[:2]) or shape[2] <= self.table_layer:
            raise ValueError(
                f"{self.name}: the hash table has shape {shape}, expected {tuple(hidden_states.shape[:2])} tokens and "
                f"more than {self.table_layer} layers"
            )
        probability = table.gate if table.probability is None else table.probability
        first = (slice(None), slice(None), self.table_layer, 0)
        return table.expert_index[first].int(), table.gate[first].float(), probability[first]

    def extra_repr(self) -> str:
        return f"name={self.name!r}, routing={self.routing!r}"


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        f"state_dict() of a model whose experts are in an expert store would lack them ({module.name}); use the "
        f"checkpoint that it was loaded from (store: {cast(Runtime, module.runtime).store_path})"
    )


class _Guard:
    """Stands before one method of one module. The module is held weakly: a strong reference from its own attribute
    would be a cycle, and a dropped model would keep its expert memory until the cycle collector comes by."""

    def __init__(self, module: nn.Module, call: Callable[..., nn.Module]) -> None:
        self._module, self._call = weakref.ref(module), call

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("a method of a model that is gone; keep the model itself, not one of its methods")
        return self._call(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Guard:
        # A copied module is in the memo before its attributes are copied: its guard is its own.
        module = self._module()
        return self if module is None else _Guard(memo.get(id(module), module), self._call)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model whose experts are in an expert store cannot be pickled: they belong to this process")


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands before ``module.train``: a model without its experts' parameters cannot be trained."""
    if mode:
        raise RuntimeError(
            "train() on a model whose experts are in an expert store: they are frozen and their dropout is gone; "
            "train the model first, then swap its experts"
        )
    return type(module).train(module, False)


def _move(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stands before ``module._apply``, through which every move and cast goes: refused before anything has moved."""
    own = next(
        (layer.runtime.device for layer in module.modules() if isinstance(layer, SparseMLP)), torch.device("cpu")
    )
    device = fn(torch.empty(0, device=own)).device
    if device != own:
        raise RuntimeError(
            f"this model's experts are computed on {own} and cannot move to {device}; load it with "
            f"sida_ext.from_pretrained(..., device={str(device)!r})"
        )
    return type(module)._apply(module, fn, recurse)


def moe_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> MoE layer, swapped or not, in the order in which they run (encoder first)."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (SwitchTransformersSparseMLP, SparseMLP))
    }


def _replace_layers(model: nn.Module) -> dict[str, SparseMLP]:
    """Put a :class:`SparseMLP` in the place of every MoE layer; the experts' parameters go with the old ones."""
    replaced: dict[str, SparseMLP] = {}
    tables = 0
    for name, layer in moe_layers(model).items():
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        decoder = "decoder" in name.split(".")
        replaced[name] = SparseMLP(cast(SwitchTransformersTop1Router, layer.router), name, None if decoder else tables)
        tables += not decoder
        setattr(parent, attribute, replaced[name])
    return replaced


def _connect(
    model: PreTrainedModel, layers: dict[str, SparseMLP], runtime: Runtime, routing: str, confidence: float
) -> None:
    for layer in layers.values():
        layer.connect(runtime, model.config.dense_act_fn, routing, confidence)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    if runtime.device.type != "cpu":
        model.to(runtime.device)  # type: ignore[arg-type]
    holders = {""} | {name.rsplit(".", cut)[0] for name in layers for cut in range(name.count(".") + 1)}
    for name in holders:
        module = model.get_submodule(name)
        module.train = _Guard(module, _train)  # type: ignore[method-assign]
        module._apply = _Guard(module, _move)  # type: ignore[method-assign]
    model.sida = runtime  # type: ignore[assignment]


def _check_routing(routing: str, predictor: object, confidence: float) -> None:
    if routing not in ROUTINGS:
        raise ValueError(f"routing is {routing!r}, expected one of {', '.join(ROUTINGS)}")
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not confidence >= 0:
        raise ValueError(
            f"confidence is {confidence!r}, expected a probability from which the table decides: 0 for always, above "
            "1 for never"
        )
    split_predictors(predictor)


def _check_fit(config: SwitchTransformersConfig, header: StoreHeader, layers: dict[str, SparseMLP], path: str) -> None:
    """The store must hold the model's layers in the model's shapes."""
    for field, found, expected in (
        ("d_model", header.d_model, config.d_model),
        ("d_ff", header.d_ff, config.d_ff),
        ("num_experts", header.num_experts, config.num_experts),
    ):
        if found != expected:
            raise ValueError(f"{path}: {field} is {found}, the model's is {expected}; it was packed from another model")
    missing = [name for name in layers if name not in header.layers]
    if missing:
        raise ValueError(f"{path} lacks the MoE layer {missing[0]}; it was packed from another model")


def _check_stacks(model: nn.Module, predictor: Any) -> None:
    """A decoder's predictor needs a decoder with MoE layers."""
    decoder = split_predictors(predictor)[1]
    if decoder is not None and not any("decoder" in name.split(".") for name in moe_layers(model)):
        raise ValueError(
            f"predictor holds {type(decoder).__name__}, which predicts a decoder, but {type(model).__name__} has no "
            "decoder with MoE layers"
        )


def _attach_predictor(model: PreTrainedModel, predictor: Any, routing: str) -> None:
    """Keep the predictors on the runtime; with predicted or confident routing the encoder builds its hash table when it
    is called outside a stream, by ``model(x)`` or by ``generate``. A decoder's steps are predicted in every routing."""
    runtime = runtime_of(model)
    predictor, runtime.decoder_predictor = split_predictors(predictor)
    runtime.predictor = predictor
    decoder = [
        layer.name for layer in moe_layers(model).values() if isinstance(layer, SparseMLP) and layer.table_layer is None
    ]
    if decoder:
        predict_decoder(model, runtime, decoder)
    if predictor is not None and routing != "router":
        encoder = model.get_submodule("encoder")
        covered = sum(isinstance(module, SparseMLP) for module in encoder.modules())
        encoder.register_forward_pre_hook(functools.partial(_build_table, runtime, covered), with_kwargs=True)
        encoder.register_forward_hook(functools.partial(_drop_table, runtime), with_kwargs=True, always_call=True)


def _build_table(
    runtime: Runtime, layers: int, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    runtime.open_tables.append(None)
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if runtime.current.table is None and input_ids is not None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if runtime.device.type != "cpu":
            input_ids, mask = on_predictor(runtime.predictor, input_ids, mask)
        with torch.profiler.record_function("sida::predict"):
            table = runtime.predictor.predict(input_ids, mask)
        check_table(table, runtime.predictor, input_ids, layers, runtime.header.num_experts)
        block = runtime.batch(runtime.current.number, table)
        block.__enter__()
        runtime.open_tables[-1] = block


def _drop_table(
    runtime: Runtime, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    tables = runtime.open_tables
    block = tables.pop() if tables else None
    if block is not None:
        block.__exit__(None, None, None)


def _model_class(config: SwitchTransformersConfig, model_class: type[PreTrainedModel] | None) -> type[PreTrainedModel]:
    if model_class is not None:
        return model_class
    names = config.architectures or []
    own = {SwitchTransformersForSequenceClassification.__name__: SwitchTransformersForSequenceClassification}
    for name in names:
        found = own.get(name) or getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(f"config.json names architectures {names}, none of which is known; pass model_class=")


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    expert_memory: str | int = "2GiB",
    host_memory: str | int | None = None,
    expert_dtype: str = "bfloat16",
    routing: str = "router",
    predictor: Any = None,
    model_class: type[PreTrainedModel] | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    store_cache: str | os.PathLike[str] | None = None,
    lanes: int | None = None,
    read_bytes: int | None = None,
    eviction: str = "next_use",
    wait_deadline: float = 60.0,
    confidence: float = 0.9,
    pin: str = "require",
    faults: Any = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A transformers Switch model whose experts stay in an expert store and are brought into a bounded memory.

    The experts are never all in memory, also while loading. At first use they are packed into a store in the cache
    folder (``$SIDA_CACHE`` or ``~/.cache/sida``), and said where.

    Args:
        path_or_id: checkpoint folder or hub id.
        device: where the model computes: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        expert_memory: the hard budget of expert memory, on a GPU of its own memory: bytes, ``"2GiB"``, ``"25%"`` of the
            experts or ``"auto"``.
        host_memory: the pinned host pool of a GPU machine; None: all experts if they fit in half of the free memory,
            else as many; the CPU has none.
        expert_dtype: bfloat16, float32, float16 or int8 (one factor for each row).
        routing: ``"router"``: the model's own router decides, predictions only prefetch, the output does not depend on
            budget or timing. ``"predicted"``: the hash table replaces router and scaling factors (SiDA as published).
            ``"confident"``: the table for a token and layer where its probability reaches ``confidence``, the router
            elsewhere.
        predictor: a :class:`~sida_ext.prediction.protocol.Predictor`, what ``stream`` takes when it is given none; or a
            :class:`~sida_ext.prediction.protocol.DecoderPredictor` for ``generate``; or a pair of both.
        model_class: the transformers class to load; None: the one that config.json names.
        store: an expert store made by ``sida pack``, in whose dtype the experts then are; None: the packed one in the
            cache.
        confidence: with ``routing="confident"``, the probability (``HashTable.probability``, or ``gate`` where a
            predictor gives none) from which the table decides. 0 gives the bits of ``"predicted"``, more than 1 those
            of ``"router"``. Expert capacity binds the router's choices alone; the router's choice for a token that the
            table decides still takes its place in it.
        lanes, read_bytes, eviction, wait_deadline, pin, faults: see :class:`~sida_ext.experts.runtime.Runtime`.
        kwargs: passed to transformers (``dtype`` of everything but the experts, ``attn_implementation``, ``revision``,
            ``token``, ``cache_dir``, ...); ``device_map`` and ``quantization_config`` are refused.

    Returns:
        A model of ``model_class`` in evaluation mode, parameters frozen; its runtime is ``model.sida``.

    Raises:
        ValueError: an argument that cannot work. StoreError: a store that is damaged or of another checkpoint.
    """
    say = say if say is not None else transformers.logging.get_logger("sida_ext").warning
    device = resolve_device(device, host_memory)
    _check_routing(routing, predictor, confidence)
    for name, reason in REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}={kwargs[name]!r} is not supported: {reason}")
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    with Checkpoint(resolve_folder(path_or_id, allow_pickle=allow_pickle, **hub), allow_pickle) as source:
        if store is None:
            path = ensure_store(source, expert_dtype, store_cache, say=say, progress=progress)
        else:
            path = Path(store)
            _, header = open_store(path)
            check_source(header, source, str(path))
        # The widest type that the other parameters can get here: what is not float32 leaves a little more free.
        other_bytes = source.other_bytes(itemsize=4)
        folder = source.folder
    base = _model_class(kwargs.get("config") or SwitchTransformersConfig.from_pretrained(folder), model_class)
    layers: dict[str, SparseMLP] = {}

    class WithoutExperts(base):  # type: ignore[misc, valid-type]
        """Built without expert parameters, so that loading never asks for them."""

        _keys_to_ignore_on_load_unexpected = (r"\.mlp\.experts\.expert_\d+\.",)

        def __init__(self, config: SwitchTransformersConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            layers.update(_replace_layers(self))

    for name in HUB_ARGUMENTS:
        kwargs.pop(name, None)
    # Before the other weights, so that the system backs expert memory while they are read.
    runtime = Runtime(
        path,
        device=device,
        expert_memory=expert_memory,
        host_memory=host_memory,
        pin=pin,
        lanes=lanes,
        read_bytes=read_bytes,
        eviction=eviction,
        wait_deadline=wait_deadline,
        faults=faults,
        reserved=other_bytes,
        say=say,
    )
    try:
        model = WithoutExperts.from_pretrained(folder, use_safetensors=None if allow_pickle else True, **kwargs)
        model.__class__ = base
        _check_fit(model.config, runtime.header, layers, str(path))
        _check_stacks(model, predictor)
        _connect(model, layers, runtime, routing, confidence)
        _attach_predictor(model, predictor, routing)
    except BaseException:
        runtime.close()
        raise
    finally:
        layers.clear()  # a class is freed by the cycle collector alone, and this one would keep the layers till then
    return model


def swap_experts(
    model: PreTrainedModel,
    device: str | torch.device = "cpu",
    expert_memory: str | int = "2GiB",
    host_memory: str | int | None = None,
    expert_dtype: str = "bfloat16",
    routing: str = "router",
    predictor: Any = None,
    *,
    store: str | os.PathLike[str] | None = None,
    lanes: int | None = None,
    read_bytes: int | None = None,
    eviction: str = "next_use",
    wait_deadline: float = 60.0,
    confidence: float = 0.9,
    pin: str = "require",
    faults: Any = None,
) -> PreTrainedModel:
    """Move the experts of a model in memory into an expert store and serve them from there; changes ``model``.

    Args:
        store: where to write the store; None: a temporary folder that goes when the runtime is closed.
        The others are those of :func:`from_pretrained`.

    Returns:
        The same model, in evaluation mode, parameters frozen. If anything fails before the swap, it is unchanged.
    """
    device = resolve_device(device, host_memory)
    _check_routing(routing, predictor, confidence)
    found = moe_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no Switch MoE layers; nothing to swap")
    if any(isinstance(layer, SparseMLP) for layer in found.values()):
        raise ValueError("the experts of this model are swapped already; model.sida is its runtime")
    _check_stacks(model, predictor)
    experts = ModuleExperts(
        {name: cast(nn.ModuleDict, layer.experts) for name, layer in found.items()}, type(model).__name__
    )
    folder = None
    if store is None:
        default_cache().mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="swapped-", dir=default_cache())
    try:
        path = Path(store) if store is not None else Path(folder.name) / "experts.sida"  # type: ignore[union-attr]
        write_store(experts, path, expert_dtype)
        runtime = Runtime(
            path,
            device=device,
            expert_memory=expert_memory,
            host_memory=host_memory,
            pin=pin,
            lanes=lanes,
            read_bytes=read_bytes,
            eviction=eviction,
            wait_deadline=wait_deadline,
            faults=faults,
            folder=folder,
            say=transformers.logging.get_logger("sida_ext").warning,
        )
        # The activation is checked before the model is touched.
        try:
            runtime.layer_handle(next(iter(found)), model.config.dense_act_fn)
        except BaseException:
            runtime.close()
            raise
    except BaseException:
        if folder is not None:
            folder.cleanup()
        raise
    _connect(model, _replace_layers(model), runtime, routing, confidence)
    _attach_predictor(model, predictor, routing)
    return model
