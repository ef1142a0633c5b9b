"""Predictors on disk: one safetensors file whose metadata says, as JSON, what it is and for which model."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sida_ext.errors import PredictorError
from sida_ext.files import written_whole

PREDICTOR_FILE = "predictor.safetensors"
FORMAT_VERSION = 1
_ADVICE = "train one for this model with `sida train MODEL TEXT... -o PREDICTOR`"


def write_predictor(path: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write PATH/predictor.safetensors, whole or not at all: a good file is never half replaced.

    Args:
        path: folder, made if missing.
        config: JSON values; must hold "kind" and "model_fingerprint".
        tensors: what the predictor learned.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    description = {"format_version": FORMAT_VERSION, **config, "tensors_sha256": _digest(stored)}
    with written_whole(folder / PREDICTOR_FILE, sync=True) as partial:
        save_file(stored, partial, {"sida_predictor": json.dumps(description)})


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of the predictor in folder ``path``, without its weights."""
    return _open(path, with_tensors=False)[0]


def read_predictor(
    path: str | os.PathLike[str], kind: str, model_fingerprint: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a predictor and refuse one of another kind or another model.

    Raises:
        PredictorError: with the file, what was found and what was expected.
    """
    config, tensors = _open(path, with_tensors=True)
    file = Path(path) / PREDICTOR_FILE
    if config.get("kind") != kind:
        raise PredictorError(f"{file} holds a predictor of kind {config.get('kind')!r}, expected {kind!r}")
    if config.get("model_fingerprint") != model_fingerprint:
        raise PredictorError(
            f"{file} was trained for a model with fingerprint {str(config.get('model_fingerprint'))[:16]}; this "
            f"model's embeddings and routers have {model_fingerprint[:16]}; {_ADVICE}"
        )
    return config, tensors


def field(config: dict[str, Any], name: str, kind: type, path: str | os.PathLike[str]) -> Any:
    """A field of the description, or a PredictorError that names it."""
    value = config.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PredictorError(f"{Path(path) / PREDICTOR_FILE}: {name} is {value!r}, expected {kind.__name__}")
    return value


def _open(path: str | os.PathLike[str], with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = Path(path) / PREDICTOR_FILE
    if not file.is_file():
        raise PredictorError(f"there is no predictor at {Path(path)}: {PREDICTOR_FILE} is missing; {_ADVICE}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()} if with_tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise PredictorError(f"{file} is not a whole safetensors file ({error}); {_ADVICE}") from error
    if "sida_predictor" not in metadata:
        raise PredictorError(f"{file} is a safetensors file, but not one of a predictor; {_ADVICE}")
    try:
        config = json.loads(metadata["sida_predictor"])
    except ValueError as error:
        raise PredictorError(f"{file}: its description is not JSON ({error}); {_ADVICE}") from error
    if not isinstance(config, dict):
        raise PredictorError(f"{file}: its description is a {type(config).__name__}, expected a JSON object")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise PredictorError(f"{file} has format version {version!r}; this release reads {FORMAT_VERSION}")
    if with_tensors and _digest(tensors) != config.get("tensors_sha256"):
        raise PredictorError(f"{file}: its weights do not match their checksum (damaged on disk?); {_ADVICE}")
    return config, tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
