"""How a model writes calls of tools, found in the text of its chat template.

A model writes calls as its template writes those of earlier turns. Nothing here runs a template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

_REMEMBERED_TEMPLATES: Final = 16
_OPENING = re.compile(r"\{[{%#]")
# A string that nothing closes reaches to the end, so that no character is looked at twice.
_INSIDE = re.compile(
    r"""[-+]?[}%]\}|'(?:[^'\\]++|\\.)*+'?|"(?:[^"\\]++|\\.)*+"?|[a-zA-Z_]\w*""", re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WireFormat:
    """Calls as one family of models writes them.

    Attributes:
        marker: Comes before a call; None: nothing does.
        closing: Comes after a call that has a marker; None: nothing does.
        is_bare: Whether an answer may begin with a call that has no marker.
        opening: Where an answer has to be calls, what it begins with.
        before: Then, what comes before a call's name.
        between: Between its name and its arguments.
        after: After its arguments.
        separator: Between two calls.
        ending: After the last.
    """

    marker: str | None
    closing: str | None
    is_bare: bool
    before: str
    between: str
    after: str
    separator: str
    opening: str = ""
    ending: str = ""


HERMES: Final = WireFormat(
    marker="<tool_call>",
    closing="</tool_call>",
    is_bare=False,
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    separator="\n",
)
LLAMA3: Final = WireFormat(
    marker="<|python_tag|>",
    closing=None,
    is_bare=True,
    before='{"name": "',
    between='", "parameters": ',
    after="}",
    separator="; ",
)
PLAIN: Final = WireFormat(
    marker=None,
    closing=None,
    is_bare=True,
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    separator=", ",
    opening="[",
    ending="]",
)
# Of families that have marks of those two and write something else than their JSON.
_NO_JSON = ("<function=", "<arg_key>", "<parameter=")


def wire_format(template: str) -> WireFormat | None:
    """Returns how calls are written; None where it is not known.

    Args:
        template: The source of a chat template.
    """
    if any(tag in template for tag in _NO_JSON):
        return None
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or "<|start_header_id|>" in template:
        return LLAMA3
    return None


@lru_cache(_REMEMBERED_TEMPLATES)
def names_read(template: str) -> frozenset[str]:
    """Returns the names in a template's program, those in its texts left out.

    Args:
        template: The source of a chat template.
    """
    names: set[str] = set()
    at = 0
    while (opening := _OPENING.search(template, at)) is not None:
        at = opening.end()
        if template[at - 1] == "#":
            end = template.find("#}", at)
            if end < 0:
                break
            at = end + 2
            continue
        for token in _INSIDE.finditer(template, at):
            at = token.end()
            text = token.group()
            if text[-1] == "}":
                break
            if text[0] not in "'\"":
                names.add(text)
        else:
            break
    return frozenset(names)
