"""The texts that plans are priced on: the shipped dialogues and a user's file. Knows no tokenizer.

A user's file is untrusted: its size, rows and roles are checked before anything is made of it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal, get_args

from linker_core.errors import InvalidRequestError
from linker_core.tuning.json_lines import MAX_ROWS, parse_rows, read_bytes

SHIPPED_FILE: Final = "calibration.jsonl"
_MAX_KIND_CHARS: Final = 40
_MAX_KINDS: Final = 32
_GIVEN_KIND: Final = "given"  # of a user's rows that name none

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """Messages with at least one of the assistant, or a plain text."""

    turns: tuple[Turn, ...]  # of a plain text: one of the assistant
    kind: str  # what it is an example of; a price is held against each kind
    plain: bool = False  # shown to the model without a template
    given: bool = False  # from a user's file

    @property
    def digest(self) -> str:
        """SHA-256 of what user and assistant say, case and spacing apart."""
        return _digest(turn.content for turn in self.turns if turn.role != "system")


def load_dialogues(source: Path | None) -> list[Dialogue]:
    """Returns the dialogues of a user's file, if one is given, and after them the shipped ones.

    A row of the file is `{"messages": [{"role": …, "content": …}, …]}`, or `{"text": …}`, of which
    all but the first token is priced. A row may name its `kind`; other fields are not looked at.

    Args:
        source: A JSON-lines file, or None for the shipped dialogues alone.

    Raises:
        InvalidRequestError: The file cannot be read, is too large, or a row is no dialogue.
    """
    shipped = _parse(files("configs").joinpath(SHIPPED_FILE).read_bytes(), given=False)
    return shipped if source is None else [*_parse(_read(source), given=True), *shipped]


def text_digests(dialogues: Iterable[Dialogue]) -> set[str]:
    """Returns a SHA-256 of every user's text and of every whole dialogue, case and spacing apart.

    Two collections whose sets are disjoint share neither a prompt nor a dialogue.
    """
    digests: set[str] = set()
    for dialogue in dialogues:
        digests.add(dialogue.digest)
        digests |= {_digest([turn.content]) for turn in dialogue.turns if turn.role == "user"}
    return digests


def _digest(texts: Iterable[str]) -> str:
    normal = (" ".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in texts)
    return hashlib.sha256("\n".join(normal).encode()).hexdigest()


def _read(source: Path) -> bytes:
    try:
        return read_bytes(source)
    except ValueError as error:
        raise _refusal(str(error)) from error


def _parse(data: bytes, *, given: bool) -> list[Dialogue]:
    try:
        dialogues = parse_rows(data, partial(_dialogue, given=given), max_rows=MAX_ROWS)
    except ValueError as error:
        raise _refusal(str(error)) from error
    kinds = {dialogue.kind for dialogue in dialogues}
    if len(kinds) > _MAX_KINDS:
        raise _refusal(f"the rows are of {len(kinds)} kinds, expected at most {_MAX_KINDS}")
    return dialogues


def _dialogue(row: Any, *, given: bool) -> Dialogue:
    """Returns one row's dialogue.

    Raises:
        ValueError: Says what is wrong with the row.
    """
    if not isinstance(row, dict) or ("messages" in row) == ("text" in row):
        raise ValueError('expected an object with either "messages" or "text"')
    kind = row.get("kind", _GIVEN_KIND)
    if not isinstance(kind, str) or not 0 < len(kind) <= _MAX_KIND_CHARS:
        raise ValueError(f"kind is not a string of 1 to {_MAX_KIND_CHARS} characters")
    if "text" in row:
        text = Turn(role="assistant", content=_content(row["text"], "text"))
        if not text.content.strip():
            raise ValueError("text is empty")
        return Dialogue(turns=(text,), kind=kind, plain=True, given=given)
    turns = _turns(row["messages"])
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError("no message of the assistant, so there is nothing to price")
    return Dialogue(turns=turns, kind=kind, given=given)


def _turns(messages: object) -> tuple[Turn, ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError("messages is not a list")
    turns = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f'{where}: expected an object with "role" and "content" alone')
        role, content = message["role"], _content(message["content"], f"{where}.content")
        if role not in get_args(Role):
            raise ValueError(f"{where}.role is {role!r:.40}, expected {', '.join(get_args(Role))}")
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where}.content is empty")
        turns.append(Turn(role=role, content=content))
    return tuple(turns)


def _content(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is not a string")
    return value


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Calibration: {reason}.", param="calibration")
