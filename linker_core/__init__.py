"""Tensors of many fine-tunes in one pool: weights, sharing, residency, engine. Knows no HTTP.

`from linker_core import load_linked` is the library call; it is looked up on first use, so that
importing a part of this package that needs no torch loads none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linker_core.residency.linked import load_linked

__all__ = ["load_linked"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("linker_core.residency.linked"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
