"""The swap: ``from_pretrained`` and ``swap_experts`` for every family."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sida_ext.experts.cache import check_source, ensure_store
from sida_ext.experts.cuda import resolve_device
from sida_ext.experts.folders import scratch_folder
from sida_ext.experts.options import LOW_BIT_DTYPES, Options, options_from
from sida_ext.experts.runtime import Runtime
from sida_ext.experts.store import open_store
from sida_ext.experts.store_writer import write_store
from sida_ext.models.checkpoint_files import LOCATION_ARGUMENTS, CheckpointFiles, resolve_checkpoint
from sida_ext.models.dense import expect_dense, finish_dense, loading_one_by_one, saved_bytes, wants_float32
from sida_ext.models.families import Family, family_of, moe_layers
from sida_ext.models.guards import guard_model
from sida_ext.models.layers import ServedLayer
from sida_ext.models.packing import source_of
from sida_ext.models.quantized import dequantised
from sida_ext.models.router_lookahead import attach_lookahead
from sida_ext.models.seam import SeamFamily
from sida_ext.models.seam_source import SeamCheckpoint
from sida_ext.models.switch_source import SwitchCheckpoint
from sida_ext.prediction.protocol import split_predictors
from sida_ext.prediction.router_asking import find_routers
from sida_ext.prediction.router_lookahead import RouterLookahead, split_lookahead

__all__ = ["from_pretrained", "swap_experts"]

logger = logging.getLogger("sida_ext")

REFUSED_ARGUMENTS = {
    "device_map": "expert memory has one device, named by device=",
    "quantization_config": "experts are quantised by expert_dtype='int8'",
    "tp_plan": "tensor parallelism is not supported",
    "state_dict": "the experts are read from the checkpoint's files",
    "gguf_file": "experts are read from safetensors files; load the model that the GGUF file was made from",
    "key_mapping": "the experts are found by the names in the checkpoint; save it with transformers and load that",
    "tp_size": "tensor parallelism is not supported",
    "distributed_config": "a model is served by one process",
    "device_mesh": "a model is served by one process",
    "output_loading_info": "the model alone is returned",
}


def _gathered(options: Options | None, arguments: dict[str, Any], **named: Any) -> Options:
    """The options of a call: ``options=``, and over it what was given by name.

    Args:
        arguments: further keyword arguments; those that are options are taken out.
        named: options that are parameters of the callee. Beside ``options=`` one that equals its default yields to it.

    Raises:
        TypeError: one of the further arguments is nearly the name of an option.
    """
    known = [field.name for field in fields(Options)]
    for name in arguments:
        meant = get_close_matches(name, known, n=1, cutoff=0.85)
        if meant and name not in known:
            raise TypeError(f"{name}= is no argument; did you mean {meant[0]}= (see sida_ext.Options)?")
    for name, value in named.items():
        if options is None or value != Options.__dataclass_fields__[name].default:
            arguments[name] = value
    return options_from(options, arguments)


def _check_predictors(predictor: Any, device: torch.device) -> None:
    """What is known of the predictors before there is a model."""
    rest, lookahead = split_lookahead(predictor)
    split_predictors(rest)
    if lookahead is not None and device.type != "cpu":
        raise ValueError(
            f"predictor holds RouterLookahead, expected device='cpu' with it, not {str(device)!r}: its answers would "
            "have to be copied from the GPU at every layer, which is not supported"
        )


def _check_dense(options: Options, device: torch.device) -> None:
    if options.dense_dtype is not None and device.type != "cpu":
        raise ValueError(
            f"dense_dtype is {options.dense_dtype!r}, expected None on {str(device)!r}: the matrices that it makes "
            "stay in the CPU's memory; dtype= says what transformers keeps everything but the experts as"
        )


def _spared_bfloat16(options: Options, found: CheckpointFiles, arguments: dict[str, Any]) -> Options:
    """The options, and ``dtype`` among the arguments, where neither says what the large matrices are computed in and
    transformers' own choice would be the slow one."""
    given = options.dense_dtype is not None or not {"dtype", "torch_dtype"}.isdisjoint(arguments)
    if given or resolve_device(options.device, options.host_memory).type != "cpu":
        return options
    if not wants_float32(found.config, found.model_class):
        return options
    arguments["dtype"] = torch.float32
    logger.warning(
        "%s is bfloat16 and this CPU has no instructions for it: its matrices stay bfloat16 and are computed by sida's "
        "kernels (dense_dtype='bfloat16'), everything else by transformers in float32; dtype='auto' leaves it all to "
        "transformers in bfloat16",
        found.name,
    )
    return replace(options, dense_dtype="bfloat16")


def _lookahead(
    model: PreTrainedModel, family: Family, predictor: Any, options: Options
) -> tuple[RouterLookahead, Any] | None:
    """Who asks the model's routers ahead, and where they are; None: nobody does."""
    given = split_lookahead(predictor)[1]
    if given is not None:
        return given, find_routers(model, family.layers(model))
    on_cpu = resolve_device(options.device, options.host_memory).type == "cpu"
    if not (options.read_ahead and on_cpu and isinstance(family, SeamFamily)):
        return None
    try:
        return RouterLookahead(1, prompts_only=True), find_routers(model, family.layers(model))
    except ValueError as error:
        logger.info("prompts are not read ahead in: %s", error)
        return None


def _check_predictor(model: nn.Module, family: Family, predictor: Any, options: Options) -> None:
    """What the predictors and the routing need of the model."""
    predictor, lookahead = split_lookahead(predictor)
    _, decoder = split_predictors(predictor)
    if lookahead is not None and not isinstance(family, SeamFamily):
        raise ValueError(
            f"predictor holds RouterLookahead, which asks the routers of the {SeamFamily.name}, but "
            f"{type(model).__name__} is served by a swap of its own"
        )
    if options.routing != "router" and not family.predicted_routing:
        raise ValueError(
            f"routing is {options.routing!r}, expected 'router' for {type(model).__name__}: tables replace the "
            "router of Switch Transformers alone"
        )
    if decoder is not None and not family.has_decoder(model):
        raise ValueError(
            f"predictor holds {type(decoder).__name__}, which predicts a decoder, but {type(model).__name__} has no "
            "decoder with MoE layers"
        )
    device = resolve_device(options.device, options.host_memory)
    if decoder is not None and isinstance(family, SeamFamily) and device.type != "cpu":
        raise ValueError(
            f"predictor holds {type(decoder).__name__}, which predicts steps, expected device='cpu' with it, not "
            f"{str(device)!r}: a GPU machine's two tiers take no announcement between layers"
        )


def _connect(
    model: PreTrainedModel,
    family: Family,
    layers: list[ServedLayer],
    runtime: Runtime,
    predictor: Any,
    ahead: tuple[RouterLookahead, Any] | None,
) -> None:
    """Let the stripped model compute from the runtime's experts.

    Args:
        ahead: who asks its routers, and what :func:`find_routers` has found of them.
    """
    predictor, _ = split_lookahead(predictor)
    for layer in layers:
        layer.connect(runtime, family.activation(model, layer))
    _say_waits(model, layers, runtime)
    model.to(runtime.device)  # type: ignore[arg-type]
    guard_model(model, list(family.layers(model)))
    runtime.predictor, runtime.decoder_predictor = split_predictors(predictor)
    family.enter(model, runtime, layers)
    _flatten_head_input(model)
    if ahead is not None:
        served = cast(dict[str, ServedLayer], family.layers(model))
        attach_lookahead(runtime, served, *ahead)
    model.sida = runtime  # type: ignore[assignment]


def _flatten_head_input(model: PreTrainedModel) -> None:
    """Give torch's own head rows that lie as a matrix of their own.

    A prompt's last token is a view into all of its tokens' rows, and torch (2.13, CPU) multiplies such a view of
    bfloat16 by the head's transposed copy, made anew each time: 1.2 s instead of 14 ms for 32,000 words of 2,048
    numbers.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_rows_of_their_own)


def _rows_of_their_own(head: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not given:  # called by keyword, which transformers does not
        return None
    rows = given[0]
    # Contiguous it calls itself whatever the steps of its dimensions of one: they are taken from a matrix.
    return (rows.reshape(-1, rows.shape[-1]).contiguous().unflatten(0, rows.shape[:-1]), *given[1:])


def _without_experts(
    base: type[PreTrainedModel], stripped: list[tuple[Family, list[ServedLayer]]], dense_dtype: str | None
) -> type[PreTrainedModel]:
    """The class to load by: its models lose their experts' parameters as soon as they are made, before anything is
    loaded, so that transformers' loader never asks for them; with a ``dense_dtype`` their other large matrices take it
    as they are loaded."""

    def make(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        family = family_of(self)
        # transformers collects these on the object when it is made.
        self._keys_to_ignore_on_load_unexpected = {
            *(getattr(self, "_keys_to_ignore_on_load_unexpected", None) or ()),
            *family.ignored_keys,
        }
        stripped.append((family, family.strip(self)))
        if dense_dtype is not None:
            expect_dense(self, family.layers(self), dense_dtype)

    # transformers knows what to convert and to cast by the class's name.
    return type(base.__name__, (base,), {"__init__": make, "__module__": base.__module__})


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    expert_memory: str | int = "2GiB",
    host_memory: str | int | None = None,
    expert_dtype: str = "bfloat16",
    dense_dtype: str | None = None,
    routing: str = "router",
    predictor: Any = None,
    model_class: Any = None,
    *,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A transformers model whose experts stay in an expert store and are brought into a bounded memory.

    The experts are never all in memory, also while loading. At first use they are packed into a store in the cache
    folder (``$SIDA_CACHE`` or ``~/.cache/sida``), and said where.

    Args:
        path_or_id: checkpoint folder or hub id: Switch Transformers, or any family whose experts go through
            transformers' experts seam (docs/families.md).
        device, expert_memory, host_memory, expert_dtype, dense_dtype, routing: see
            :class:`~sida_ext.experts.options.Options`.
        predictor: a :class:`~sida_ext.prediction.protocol.Predictor`, what ``stream`` takes when it is given none; or a
            :class:`~sida_ext.prediction.protocol.DecoderPredictor` for ``generate``; or a pair of both; or a
            :class:`~sida_ext.prediction.router_lookahead.RouterLookahead`, for a model of the experts seam, alone or
            beside them.
        model_class: the transformers class to load, or an Auto class; None: the one that config.json names.
        options: all options in one object; options given by name go before it, unless they are this function's
            defaults.
        progress: is told experts packed and experts in all.
        kwargs: further options by name (``store``, ``lanes``, ``eviction``, ...); everything else means what it means
            to transformers: ``dtype`` of everything but the experts (without it and without ``dense_dtype``, a bfloat16
            checkpoint on a CPU that lacks the instructions for it is loaded with ``dtype=torch.float32,
            dense_dtype="bfloat16"``, which is said), ``attn_implementation``, ``revision``, ``token``,
            ``cache_dir``, fields of the configuration (``num_labels``, ``output_router_logits``, ...). ``device_map``,
            ``quantization_config`` and others that would bring the experts from elsewhere are refused.

    Returns:
        A model of ``model_class`` in evaluation mode, parameters frozen; its runtime is ``model.sida``.

    Raises:
        ValueError: an argument that cannot work. StoreError: a store that is damaged or of another checkpoint.
    """
    options = _gathered(
        options,
        kwargs,
        device=device,
        expert_memory=expert_memory,
        host_memory=host_memory,
        expert_dtype=expert_dtype,
        dense_dtype=dense_dtype,
        routing=routing,
    )
    resolved = resolve_device(options.device, options.host_memory)
    _check_predictors(predictor, resolved)
    _check_dense(options, resolved)
    for name, reason in REFUSED_ARGUMENTS.items():
        if (given := kwargs.pop(name, None)) not in (None, False):
            raise ValueError(f"{name} is {given!r}, expected nothing: {reason}")
    location = {name: kwargs.pop(name) for name in LOCATION_ARGUMENTS if name in kwargs}
    found = resolve_checkpoint(
        path_or_id,
        config=kwargs.pop("config", None),
        model_class=model_class,
        allow_pickle=options.allow_pickle,
        fields=kwargs,
        **location,
    )
    options = _spared_bfloat16(options, found, kwargs)
    with source_of(found) as source:
        if options.store is None:
            _say_rounding(found.config, options.expert_dtype)
            path = ensure_store(
                source, options.expert_dtype, options.store_cache, say=logger.warning, progress=progress
            )
        else:
            path = Path(options.store)
            _, header = open_store(path)
            check_source(header, source, str(path))
            if options.expert_dtype not in (header.dtype, Options.expert_dtype):
                raise ValueError(
                    f"expert_dtype is {options.expert_dtype!r}, expected {header.dtype!r}, what store={str(path)!r} "
                    "holds; leave it out, or pack a store of the type that you want"
                )
        options = _with_copies(options, source, progress)
        # The widest type that the other parameters can get here: what is not float32 leaves a little more free.
        other_bytes = source.other_bytes(itemsize=4)
        if options.dense_dtype is not None:
            other_bytes -= saved_bytes(found.config, found.model_class, options.dense_dtype, itemsize=4)
    stripped: list[tuple[Family, list[ServedLayer]]] = []
    # Before the other weights, so that the system backs expert memory while they are read.
    runtime = Runtime(path, options, reserved=other_bytes)
    try:
        with nullcontext() if options.dense_dtype is None else loading_one_by_one():
            model = _without_experts(found.model_class, stripped, options.dense_dtype).from_pretrained(
                found.path_or_id, config=found.config, **found.arguments, **dequantised(found.config), **kwargs
            )
        model.__class__ = found.model_class
        family, layers = stripped.pop()
        if options.dense_dtype is not None:
            finish_dense(model, family.layers(model), options.dense_dtype)
        _own_memory(model)
        family.check_fit(model, runtime.header, layers, str(path))
        _check_predictor(model, family, predictor, options)
        family.check_activation(model, runtime)
        _connect(model, family, layers, runtime, predictor, _lookahead(model, family, predictor, options))
    except BaseException:
        runtime.close()
        raise
    finally:
        stripped.clear()  # a class is freed by the cycle collector alone, and the one made here would keep the layers
    return model


def _with_copies(
    options: Options, source: SwitchCheckpoint | SeamCheckpoint, progress: Callable[[int, int], None] | None
) -> Options:
    """The options with the store of low-bit copies that they ask for, packed now if it is not there yet."""
    if options.on_miss == "wait":
        return options
    if options.low_bit_store is None:
        path = ensure_store(source, LOW_BIT_DTYPES[0], options.store_cache, say=logger.warning, progress=progress)
        return replace(options, low_bit_store=path)
    _, header = open_store(options.low_bit_store)
    check_source(header, source, os.fspath(options.low_bit_store))
    return options


def _say_waits(model: nn.Module, layers: list[ServedLayer], runtime: Runtime) -> None:
    """One sentence on layers that wait for their experts all the same."""
    names = [layer.name for layer in layers if getattr(layer, "formula", "") is None]
    if runtime.low_bit_memory and names:
        logger.warning(
            "on_miss='low_bit': %d of %d MoE layers of %s, the first of them %s, wait for their experts all the same: "
            "their gate is computed by the module's own function, which computes from exact records alone",
            len(names),
            len(layers),
            type(model).__name__,
            names[0],
        )


def _say_rounding(config: PreTrainedConfig, expert_dtype: str) -> None:
    """One sentence where the default type of experts is less than the checkpoint has."""
    if getattr(config, "dtype", None) == torch.float32 and expert_dtype in ("bfloat16", "float16"):
        logger.info(
            "the checkpoint is of float32, its experts are served as %s, rounded; expert_dtype='float32' keeps them",
            expert_dtype,
        )


def _own_memory(model: nn.Module) -> None:
    """Copy weights that are views of the checkpoint's mapped files: their pages would be dropped and read again where
    memory is short, and their alignment in the file would show in the last bits of products."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()


def _family_in_memory(model: Any) -> Family:
    """The family of a transformers model that is in memory with its weights."""
    family = family_of(model) if isinstance(model, nn.Module) else None
    if family is None or not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TypeError(f"model is {type(model).__name__}, expected a model of transformers")
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(f"{empty} has no data (device meta); load the model's weights before its experts are swapped")
    return family


def swap_experts(
    model: PreTrainedModel,
    device: str | torch.device = "cpu",
    expert_memory: str | int = "2GiB",
    host_memory: str | int | None = None,
    expert_dtype: str = "bfloat16",
    dense_dtype: str | None = None,
    routing: str = "router",
    predictor: Any = None,
    *,
    options: Options | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Move the experts of a model in memory into an expert store and serve them from there; changes ``model``.

    Args:
        model: Switch Transformers, or of any family of transformers' experts seam.
        kwargs: further options by name. ``store`` is where to write the store; None: a temporary folder that goes when
            the runtime is closed.
        The others are those of :func:`from_pretrained`.

    Returns:
        The same model, in evaluation mode, parameters frozen. If anything fails before the swap, it is unchanged.
    """
    options = _gathered(
        options,
        kwargs,
        device=device,
        expert_memory=expert_memory,
        host_memory=host_memory,
        expert_dtype=expert_dtype,
        dense_dtype=dense_dtype,
        routing=routing,
    )
    if kwargs:
        raise TypeError(f"swap_experts got {next(iter(kwargs))!r}, expected a field of sida_ext.Options")
    resolved = resolve_device(options.device, options.host_memory)
    _check_predictors(predictor, resolved)
    _check_dense(options, resolved)
    if options.low_bit_store is not None:
        raise ValueError(
            f"low_bit_store is {os.fspath(options.low_bit_store)!r}, expected None: the copies of a model in memory "
            "are packed beside its store"
        )
    family = _family_in_memory(model)
    if any(isinstance(layer, ServedLayer) for layer in moe_layers(model).values()):
        raise ValueError("the experts of this model are swapped already; model.sida is its runtime")
    _check_predictor(model, family, predictor, options)
    ahead = _lookahead(model, family, predictor, options)
    folder = None
    if options.store is None:
        folder = scratch_folder()
    try:
        path = Path(options.store) if options.store is not None else folder.path / "experts.sida"  # type: ignore[union-attr]
        source = family.source(model)
        write_store(source, path, options.expert_dtype)
        if options.on_miss == "low_bit":
            copies = path.with_name(f"{path.stem}.{LOW_BIT_DTYPES[0]}{path.suffix}")
            write_store(source, copies, LOW_BIT_DTYPES[0])
            options = replace(options, low_bit_store=copies)
        runtime = Runtime(path, options, folder=folder)
        # What the model asks of the kernels is checked before it is touched.
        try:
            family.check_activation(model, runtime)
        except BaseException:
            runtime.close()
            raise
    except BaseException:
        if folder is not None:
            folder.cleanup()
        raise
    try:
        if options.dense_dtype is not None:
            finish_dense(model, family.layers(model), options.dense_dtype)
        _connect(model, family, family.strip(model), runtime, predictor, ahead)
    except BaseException:
        runtime.close()
        raise
    return model
