"""What a MODEL argument means: a folder here, or an id of the hub. A mistyped folder is told at once, for the hub would
be asked for it, and asked again for half a minute where there is no network."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

__all__ = ["hub_failure", "refuse_mistyped"]


def refuse_mistyped(path_or_id: str | os.PathLike[str]) -> None:
    """Refuse what neither is there nor can be an id of the hub.

    That is: what begins like a path or is longer than ``owner/name``, what huggingface_hub takes for no id, and a name
    that much resembles a folder beside it.

    Raises:
        FileNotFoundError: names what was given, and a folder of nearly that name if there is one.
    """
    name = os.fspath(path_or_id)
    path = Path(name)
    if path.is_dir():
        return
    if path.exists():
        raise FileNotFoundError(f"{name} is a file, expected a checkpoint folder or a hub id")
    near = _resembling(path)
    said = f"{name} does not exist, expected a checkpoint folder or a hub id (owner/name)"
    said += f"; did you mean {near}?" if near is not None else ""
    if near is not None or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise FileNotFoundError(said)
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"{said}: {error}") from None


def _resembling(path: Path) -> Path | None:
    """A folder with a configuration beside ``path``, of nearly its name."""
    if not path.name or not path.parent.is_dir():
        return None
    folders = [entry.name for entry in path.parent.iterdir() if (entry / "config.json").is_file()]
    close = difflib.get_close_matches(path.name, folders, n=1, cutoff=0.75)
    return path.with_name(close[0]) if close else None


def hub_failure(path_or_id: str, error: BaseException) -> str:
    """One line on why the hub did not give a model: the beginning of an error that may be a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)
    if len(text) > 300:
        text = text[:300].rsplit(" ", 1)[0] + " ..."
    return (
        f"{path_or_id} is no folder here, and the hub did not give it ({type(error).__name__}: {text}); check the "
        "name, the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    )
