"""From a parsed body to a checked record.

A known field that is not honoured must carry its neutral value; unknown fields are ignored with a
warning that names them, since clients forward parameters of their users.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from linker_core.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_MAX_WARNED = 8
_WORDS: Mapping[str, str] = {  # by pydantic's names of faults
    "missing": "this has to be given",
    "extra_forbidden": "there is no such parameter here",
    "model_type": "this has to be an object",
    "dict_type": "this has to be an object",
    "list_type": "this has to be a list",
    "string_type": "this has to be a text",
    "int_type": "this has to be a whole number",
    "int_from_float": "this has to be a whole number",
    "float_type": "this has to be a number",
    "finite_number": "this has to be a finite number",
    "bool_type": "this has to be true or false",
    "bool_parsing": "this has to be true or false",
    "none_required": "this has to be null",
    "literal_error": "this has to be {expected}",
    "greater_than": "this has to be more than {gt}",
    "greater_than_equal": "this has to be at least {ge}",
    "less_than": "this has to be less than {lt}",
    "less_than_equal": "this has to be at most {le}",
    "too_short": "at least {min_length} have to be given, and these are {actual_length}",
    "too_long": "at most {max_length} are taken, and these are more",
    "string_too_short": "this has to have a length of {min_length} characters at least",
    "string_too_long": "this has to have a length of {max_length} characters at most",
    "string_pattern_mismatch": "this has to match {pattern}",
}
_Request = TypeVar("_Request", bound=BaseModel)


class Strict(BaseModel):
    """A record of a client's: no type is guessed, no unknown field matters."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Closed(BaseModel):
    """A record of a client's: no type is guessed, no unknown field is taken."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, value: object) -> object:
        """Leaves one unknown field to be refused: see `few` for what 100,000 would cost."""
        if not isinstance(value, dict):
            return value
        unknown = [name for name in value if name not in cls.model_fields]
        return {name: value[name] for name in (*(value.keys() & cls.model_fields), *unknown[:1])}


def few(most: int) -> BeforeValidator:
    """Returns what bounds an object before any of its entries is looked at.

    Faults are written down entry by entry: those of 100,000 would stop the whole server for a
    second, since nothing else runs meanwhile, and `max_length` counts only what has none.

    Args:
        most: Entries.
    """

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"at most {most} entries are taken, and these are {len(value)}")
        return value

    return BeforeValidator(check)


class Unhonoured:
    """A known field that no request can use here.

    Args:
        neutral: The values under which it says nothing; null always does.
        remedy: What to do instead of setting it.
    """

    def __init__(self, *neutral: object, remedy: str = "Leave it out") -> None:
        self.neutral = (None, *neutral)
        self.remedy = remedy

    def check(self, name: str, value: object) -> None:
        """Refuses a value that says something.

        Raises:
            InvalidRequestError: It does.
        """
        # True is 1 to Python, but to no client.
        is_bool = isinstance(value, bool)
        if not any(value == one and is_bool == isinstance(one, bool) for one in self.neutral):
            raise InvalidRequestError(f"{name} is not supported here. {self.remedy}.", param=name)


def parse_request(
    kind: type[_Request],
    body: Mapping[str, Any],
    *,
    neutral: Mapping[str, Unhonoured] = MappingProxyType({}),
) -> _Request:
    """Builds a request record from a parsed body.

    Raises:
        InvalidRequestError: A field of the wrong type or out of bounds, or one that cannot be
            honoured; `param` is its dotted path.
    """
    for name in neutral.keys() & body.keys():
        neutral[name].check(name, body[name])
    unknown = [name for name in body if name not in kind.model_fields and name not in neutral]
    if unknown and kind.model_config.get("extra") != "forbid":
        names = [name[:64] for name in unknown[:_MAX_WARNED]]
        logger.warning("ignored %d unknown request fields: %r", len(unknown), names)
    known = {name: value for name, value in body.items() if name not in neutral}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        faults = [(_dotted(body, fault), fault) for fault in found]
        first = faults[0][0]
        # Of a field that may be of several types, the alternative that fits best says most.
        param, fault = max(
            (fault for fault in faults if fault[0].startswith(first)),
            key=lambda fault: (fault[0].count("."), not fault[1]["type"].endswith("_type")),
        )
        raise InvalidRequestError(f"{param}: {said(fault)}.", param=param) from None


def said(fault: ErrorDetails) -> str:
    """Returns a fault in words that a client knows: JSON's, and none of the server's records'."""
    words = _WORDS.get(fault["type"])
    if words is not None:
        return words.format(**fault.get("ctx", {}))
    # pydantic puts the kind of error before what checks of ours say.
    return fault["msg"].removeprefix("Value error, ").rstrip(".")


def _dotted(body: object, fault: ErrorDetails) -> str:
    """Returns the path of a fault; the parts that name alternatives of a type are left out."""
    parts: list[str] = []
    missing = fault["loc"][-1] if fault["type"] in ("missing", "value_error") else None
    for part in fault["loc"]:
        if isinstance(body, dict) and (part in body or part == missing):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        parts.append(str(part)[:64])
    return ".".join(parts)
