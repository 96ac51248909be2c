"""What stands in a PromQL expression, as far as one can tell without its parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_NAME = re.compile(r"(?<![\w:$])(?:[a-z]\w*:)?linker_\w+(?::\w+)?(?![\w:])")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r'([a-zA-Z_:][\w:]*)\{((?:[^{}"]|"(?:[^"\\]|\\.)*")*)\}')
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_WORDS = re.compile(r"\(?\w+(?:[.]\w+)?(?:\|\w+)*\)?")


class Wanted(NamedTuple):
    """A value of a label that an expression singles out."""

    metric: str
    label: str
    value: str


def names_in(expression: str) -> frozenset[str]:
    """Returns the project's metrics and recorded series that an expression asks for."""
    return frozenset(_NAME.findall(_QUOTED.sub('""', expression)))


def labels_in(expression: str) -> Iterator[tuple[str, str]]:
    """Yields every metric with every label that it is filtered by."""
    for metric, inside in _SELECTOR.findall(expression):
        for label, _, _ in _MATCHER.findall(inside):
            yield metric, label


def values_in(expression: str) -> Iterator[Wanted]:
    """Yields every value that a filter names, alternatives one by one; patterns are left out."""
    for metric, inside in _SELECTOR.findall(expression):
        for label, operator, value in _MATCHER.findall(inside):
            if _WORDS.fullmatch(value) is None:
                continue
            alternatives = value.strip("()").split("|") if "~" in operator else [value]
            for alternative in alternatives:
                yield Wanted(metric, label, alternative)
