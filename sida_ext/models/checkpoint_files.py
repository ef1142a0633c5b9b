"""Which files a checkpoint folder or hub id means: decided by transformers, for the experts as for everything else."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import hub as transformers_hub

from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.models.refused import refuse_configuration
from sida_ext.places import hub_failure, refuse_mistyped

__all__ = ["LOCATION_ARGUMENTS", "CheckpointFiles", "model_class_of", "resolve_checkpoint"]

# Arguments of transformers' from_pretrained that say which files are meant; the last two pick among a folder's weights
# and are not for its configuration.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
LOCATION_ARGUMENTS = (*HUB_ARGUMENTS, "variant", "use_safetensors")


# What transformers' from_pretrained takes for itself although a configuration has a field of that name.
LOADING_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "trust_remote_code")


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint that has been found.

    Attributes:
        path_or_id: as it was given.
        config: its configuration; the part that ``model_class`` takes.
        model_class: the class to load.
        weights: its weight files, in transformers' order.
        arguments: what a later ``from_pretrained(path_or_id, **arguments)`` of transformers needs to load the same
            files: the location arguments, a branch of the hub fixed to the commit that it is now.
    """

    path_or_id: str
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    weights: tuple[Path, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Last part of the folder or id."""
        return Path(self.path_or_id).resolve().name if Path(self.path_or_id).is_dir() else self.path_or_id


def _config(
    path_or_id: str, config: Any, model_class: Any, hub: Mapping[str, Any], fields: dict[str, Any]
) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):  # transformers, too, changes no field of a given one
        return config
    if config is not None and not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"config is {type(config).__name__}, expected a PreTrainedConfig or the place of one")
    place = path_or_id if config is None else os.fspath(config)
    folder = Path(place) / hub.get("subfolder", "")
    if Path(place).is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, expected a transformers checkpoint")
    own = getattr(model_class, "config_class", None) or AutoConfig
    changes = {name: value for name, value in fields.items() if name not in LOADING_ARGUMENTS}
    try:
        found, unused = own.from_pretrained(place, return_unused_kwargs=True, **hub, **changes)
    except OSError as error:
        raise FileNotFoundError(hub_failure(place, error)) from error
    except ValueError as error:
        raise ValueError(f"{place}: its config.json is of no model that transformers knows: {error}") from error
    for name in changes:
        if name not in unused:
            del fields[name]
    return found


def model_class_of(config: PretrainedConfig, model_class: Any = None) -> type[PreTrainedModel]:
    """The transformers class to load: the given one, what a given Auto class stands for, else the one that
    ``config.architectures`` names.

    Raises:
        TypeError: something that is no class of models.
        ValueError: none of the names is a class of transformers, or the Auto class knows none for the configuration.
    """
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None:
        try:
            return _get_model_class(config, mapping)
        except KeyError:
            raise ValueError(
                f"model_class is {model_class.__name__}, which knows no model for {type(config).__name__}; name the "
                f"class itself (config.json: {', '.join(config.architectures or []) or 'no architectures'})"
            ) from None
    if model_class is not None:
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            given = model_class if isinstance(model_class, type) else f"an object of {type(model_class).__name__}"
            raise TypeError(f"model_class is {given}, expected a class of transformers models or an Auto class")
        return model_class
    names = list(config.architectures or [])
    own = {SwitchTransformersForSequenceClassification.__name__: SwitchTransformersForSequenceClassification}
    for name in names:
        found = own.get(name) or getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(f"config.json names architectures {names}, none of which is known; pass model_class=")


def _fitting(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """The configuration that the class takes: its own part of a composite one, where that is what it is a class of."""
    own = model_class.config_class
    if own is None or isinstance(config, own) or own not in (getattr(config, "sub_configs", None) or {}).values():
        return config
    part = config.get_text_config(decoder=True)
    return part if isinstance(part, own) else config


def _pinned_revision(path_or_id: str, hub: dict[str, Any]) -> None:
    """Fix a branch to its commit, so that a push between two loads cannot mix two saves."""
    resolve = getattr(transformers_hub, "resolve_revision", None)
    if resolve is None or Path(path_or_id).is_dir():
        return
    names = ("token", "local_files_only", "cache_dir")
    try:
        hub["revision"] = resolve(
            path_or_id, hub.get("revision", "main"), **{name: hub[name] for name in names if name in hub}
        )
    except OSError as error:
        raise FileNotFoundError(hub_failure(path_or_id, error)) from error


def resolve_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    config: Any = None,
    model_class: Any = None,
    allow_pickle: bool = False,
    fields: dict[str, Any] | None = None,
    **location: Any,
) -> CheckpointFiles:
    """Find a checkpoint's configuration and weight files as transformers' ``from_pretrained`` would.

    Args:
        config: a configuration, or where one is; None: the checkpoint's own.
        model_class: the class that will be loaded or an Auto class, if the user named one.
        allow_pickle: take ``.bin`` files where there are no others.
        fields: further arguments of ``from_pretrained``; changed: those that are fields of the configuration are taken
            out of it, and the configuration has their values.
        location: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``, ``proxies``,
            ``subfolder``, ``variant``, ``use_safetensors``.

    Raises:
        FileNotFoundError: no checkpoint there, or a part of it is missing.
        ValueError: one that cannot be read, or an unknown argument.
    """
    unknown = sorted(set(location) - set(LOCATION_ARGUMENTS))
    if unknown:
        raise ValueError(f"{unknown[0]}= says nothing about which files to take, expected {LOCATION_ARGUMENTS}")
    place = os.fspath(path_or_id)
    refuse_mistyped(place)
    hub = {name: location[name] for name in HUB_ARGUMENTS if location.get(name) is not None}
    _pinned_revision(place, hub)
    folder = Path(place) / hub.get("subfolder", "")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), not a model; merge it into its model "
            "(peft: merge_and_unload) and save that"
        )
    found = _config(place, config, model_class, hub, {} if fields is None else fields)
    refuse_configuration(found, place)
    base = model_class_of(found, model_class)
    found = _fitting(found, base)
    use_safetensors = location.get("use_safetensors")
    if use_safetensors is None:
        use_safetensors = None if allow_pickle else True
    elif use_safetensors is False and not allow_pickle:
        raise ValueError(
            "use_safetensors=False asks for pytorch_model.bin files, which are Python pickles; pass allow_pickle=True"
        )
    wanted: dict[str, Any] = {
        "pretrained_model_name_or_path": place,
        "variant": location.get("variant"),
        "gguf_file": None,
        "use_safetensors": use_safetensors,
        "user_agent": {"file_type": "model", "framework": "pytorch"},
        "is_remote_code": False,
        "transformers_explicit_filename": getattr(found, "transformers_weights", None),
        "download_kwargs": hub,
    }
    accepted = inspect.signature(_get_resolved_checkpoint_files).parameters
    try:
        paths, _ = _get_resolved_checkpoint_files(**{name: wanted[name] for name in wanted if name in accepted})
    except OSError as error:
        if not allow_pickle and any(folder.glob("pytorch_model*.bin*")):
            raise ValueError(
                f"{folder} holds only pytorch_model.bin files, which are Python pickles: loading one can run code that "
                "it carries. Convert it to safetensors, or pass allow_pickle=True (--allow-pickle) if you trust its "
                "source"
            ) from None
        raise FileNotFoundError(f"{place}: transformers finds no weights there: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: its shard index cannot be read: {error!r}") from error
    weights = tuple(Path(path) for path in paths or ())
    missing = sorted(path.name for path in weights if not path.is_file())
    if missing:
        raise FileNotFoundError(f"{folder}: the shard index names {', '.join(missing)}, which is not there")
    arguments = dict(hub)
    if location.get("variant") is not None:
        arguments["variant"] = location["variant"]
    arguments["use_safetensors"] = use_safetensors
    return CheckpointFiles(place, found, base, weights, arguments)
