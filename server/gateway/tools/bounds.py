"""How large a function's schema may be. Knows no request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

MAX_SCHEMA_CHARS: Final = 64 * 1024  # about what the engine compiles
MAX_SCHEMA_DEPTH: Final = 32


def check_parameters(schema: Mapping[str, Any]) -> None:
    """Refuses parameters that are no object's, too long or too deep.

    Raises:
        ValueError: Says which.
    """
    if schema.get("type", "object") != "object":
        raise ValueError("parameters describe an object, so their type is 'object'")
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise ValueError(f"nested deeper than {MAX_SCHEMA_DEPTH} levels; flatten it")
    size = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
    if size > MAX_SCHEMA_CHARS:
        raise ValueError(f"{size} characters long; at most {MAX_SCHEMA_CHARS} are taken")


def is_deeper(value: object, levels: int) -> bool:
    """Says whether arrays and objects are nested deeper; bodies are bounded, so this recursion is.

    Args:
        value: Of a parsed body.
        levels: How deep it may be.
    """
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(one, levels - 1) for one in inner)
