"""What a model calls its cache of keys and values, as an argument and in its output.

transformers has changed the name within its fifth release: ``past_key_values`` became ``cache``. A forward takes any
name among its keywords and passes over the wrong one in silence, so that whoever hands over a cache asks here.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["NAMES", "cache_argument", "cache_of"]

NAMES = ("cache", "past_key_values")  # the newer one first, which the other is translated to where both are known


def cache_argument(model: nn.Module) -> str:
    """The name of the argument.

    Raises:
        TypeError: the model's forward names neither, so that a cache would not reach it.
    """
    known = inspect.signature(type(model).forward).parameters
    for name in NAMES:
        if name in known:
            return name
    raise TypeError(f"{type(model).__name__}.forward takes neither {' nor '.join(NAMES)}, expected one of them")


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where there is none.

    Args:
        output: a mapping, as models return by default; a tuple does not say what is what.
    """
    return next((output[name] for name in NAMES if name in output), None)
