"""What is said of settings that are refused: what is wrong, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list",
    "object": "a mapping of settings to values",
    "null": "null",
}
_OUR_OWN = "value_error"  # of a validator, whose words are ours
_MAX_SHOWN_CHARS = 80

Schema = Mapping[str, Any]


def explain(error: ErrorDetails, settings: type[BaseModel]) -> str:
    """Returns the key, its value and what is wrong with it, in one line.

    Args:
        error: As pydantic has it.
        settings: What was to be built.
    """
    place = error["loc"]
    key = ".".join(str(part) for part in place)
    schema = settings.model_json_schema()
    if error["type"] == "extra_forbidden":
        return f"{key}: there is no such setting. {_instead(place, schema)}"
    if error["type"] == "missing":
        return f"{key}: it is missing, and has no default."
    allowed = _allowed(_at(place, schema), schema)
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] != _OUR_OWN and allowed:
        said = f"it has to be {allowed}"
    return f"{key} = {str(error['input'])[:_MAX_SHOWN_CHARS]!r}: {said}."


def _instead(place: Sequence[int | str], schema: Schema) -> str:
    """Returns the setting that was meant, or all that there are."""
    *section, name = place
    known = list(_at(section, schema).get("properties", {}))
    near = difflib.get_close_matches(str(name), known, n=1)
    prefix = "".join(f"{part}." for part in section)
    if near:
        return f"Is {prefix}{near[0]} meant?"
    where = ".".join(str(part) for part in section) or "The file"
    return f"{where} takes {', '.join(known)}."


def _at(place: Sequence[int | str], schema: Schema) -> Schema:
    """Returns the schema of a setting; an empty one where there is none."""
    node = schema
    for part in place:
        within = "items" if isinstance(part, int) else "properties"
        node = next((one for one in _ways(node, schema) if within in one), {})
        node = node.get(within, {})
        if isinstance(part, str):
            node = node.get(part, {})
    return next((one for one in _ways(node, schema) if "properties" in one), node)


def _ways(node: Schema, schema: Schema) -> list[Schema]:
    """Returns what a setting may be one of, with references followed."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return (
        [way for one in node["anyOf"] for way in _ways(one, schema)] if "anyOf" in node else [node]
    )


def _allowed(node: Schema, schema: Schema) -> str:
    """Returns what a setting may be, or nothing where that cannot be told."""
    return " or ".join(filter(None, (_way(one) for one in _ways(node, schema))))


def _way(node: Schema) -> str:
    if "enum" in node:
        *others, last = (str(value) for value in node["enum"])
        return f"{', '.join(others)} or {last}" if others else last
    return f"{_KINDS.get(node.get('type', ''), '')}{_range(node)}"


def _range(node: Schema) -> str:
    least, most, above = (node.get(k) for k in ("minimum", "maximum", "exclusiveMinimum"))
    if least is not None and most is not None:
        return f" from {least} to {most}"
    said = [
        *([] if least is None else [f"of {least} or more"]),
        *([] if above is None else [f"above {above}"]),
        *([] if most is None else [f"up to {most}"]),
    ]
    return f" {' and '.join(said)}" if said else ""
