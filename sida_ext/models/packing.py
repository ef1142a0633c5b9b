"""Checkpoint to expert store."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sida_ext.experts.store import StoreHeader
from sida_ext.experts.store_writer import write_store
from sida_ext.models.checkpoint_files import CheckpointFiles, resolve_checkpoint
from sida_ext.models.seam_source import SeamCheckpoint
from sida_ext.models.switch_source import SwitchCheckpoint

__all__ = ["pack", "source_of"]


def source_of(
    checkpoint: CheckpointFiles | str | os.PathLike[str],
    *,
    config: Any = None,
    model_class: Any = None,
    allow_pickle: bool = False,
    **location: Any,
) -> SwitchCheckpoint | SeamCheckpoint:
    """The experts of a checkpoint, an :class:`~sida_ext.experts.source.ExpertSource` to be closed after use.

    Args:
        checkpoint: what :func:`~sida_ext.models.checkpoint_files.resolve_checkpoint` found, or a folder or hub id, for
            which the other arguments are that function's.
        model_class: the class that will be loaded, whose module names the store's layers have; None: the one that
            config.json names.

    Raises:
        FileNotFoundError: no checkpoint there, or a part of it is missing.
        ValueError: its experts cannot be read; the message says why and what to do.
    """
    if not isinstance(checkpoint, CheckpointFiles):
        checkpoint = resolve_checkpoint(
            checkpoint, config=config, model_class=model_class, allow_pickle=allow_pickle, **location
        )
    if checkpoint.config.model_type == "switch_transformers":
        return SwitchCheckpoint(checkpoint)
    return SeamCheckpoint(checkpoint)


def pack(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str = "bfloat16",
    *,
    config: Any = None,
    model_class: Any = None,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **location: Any,
) -> StoreHeader:
    """Pack the experts of a checkpoint folder or hub id into an expert store; see
    :func:`~sida_ext.experts.store.write_store` and :func:`source_of`.

    Args:
        allow_pickle: read ``pytorch_model.bin`` files (with ``weights_only=True``); refused without it.
        location: ``revision``, ``token``, ``cache_dir``, ``subfolder``, ``variant``, ... as in transformers.
    """
    with source_of(checkpoint, config=config, model_class=model_class, allow_pickle=allow_pickle, **location) as source:
        return write_store(source, out, dtype, progress)
