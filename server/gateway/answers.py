"""The shapes of answers: usage, choices and chunks of both routes. Pure functions of pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.gateway.generation import Delta, SequenceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every chunk of one answer repeats."""

    id: str
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Returns an answer or a chunk."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


class Tally:
    """Counts tokens for `usage`; a prompt with several choices counts once."""

    def __init__(self, specs: Sequence[SequenceSpec], *, choices_per_prompt: int) -> None:
        self._prompt_tokens = sum(len(spec.prompt_ids) for spec in specs[::choices_per_prompt])
        self._answer_tokens = 0

    def count(self, _delta: Delta) -> None:
        """Adds one token."""
        self._answer_tokens += 1

    def usage(self) -> dict[str, int]:
        """Returns the counts so far."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._answer_tokens,
            "total_tokens": self._prompt_tokens + self._answer_tokens,
        }


@dataclass(slots=True, kw_only=True)
class Collected:
    """One finished choice."""

    parts: list[str] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Appends a piece."""
        self.parts.append(delta.text)
        self.deltas.append(delta)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(self.parts)


def token_ids(deltas: Sequence[Delta], *, wanted: bool | None) -> dict[str, list[int]]:
    """Returns the field of the tokens' ids, stop tokens included, or nothing."""
    return {"token_ids": [delta.token.token_id for delta in deltas]} if wanted else {}


def prompt_token_ids(spec: SequenceSpec, *, wanted: bool | None) -> dict[str, list[int]]:
    """Returns the field of the prompt's ids, as the model sees them, or nothing."""
    return {"prompt_token_ids": list(spec.prompt_ids)} if wanted else {}


def new_id(prefix: str) -> str:
    """Returns an id of our own making; clients' ids are never used inside."""
    return f"{prefix}-{uuid.uuid4().hex}"
