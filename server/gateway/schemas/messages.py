"""The messages of a dialogue, as people write them and as clients send answers back."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from server.gateway.schemas.parsing import Strict

_MAX_NAME_CHARS = 128
_MAX_PARTS = 2048

_NEEDED = {("user", "content"), ("tool", "tool_call_id")}

_Said = TypeVar("_Said")
_Calls = TypeVar("_Calls")
CallName = Annotated[str, Field(min_length=1, max_length=_MAX_NAME_CHARS)]


class Part(Strict):
    """A part of a message's content."""

    type: str
    text: str | None = Field(default=None, validate_default=True)
    refusal: str | None = Field(default=None, validate_default=True)

    @field_validator("type")
    @classmethod
    def _is_read(cls, kind: str) -> str:
        if kind not in ("text", "refusal"):
            raise ValueError(f"the models here read text; a part of type {kind[:40]!r} is none")
        return kind

    @field_validator("text", "refusal")
    @classmethod
    def _is_said(cls, said: str | None, info: ValidationInfo) -> str | None:
        if said is None and info.data.get("type") == info.field_name:
            raise ValueError("missing from a part of this type")
        return said

    def read(self) -> str:
        """Returns its text."""
        said = self.text if self.type == "text" else self.refusal
        assert said is not None
        return said


class CalledFunction(Strict):
    """What a call was."""

    name: CallName
    arguments: str  # JSON, as a rule


class ToolCall(Strict):
    """A call that an assistant made, as it is sent back."""

    id: str | None = Field(default=None, max_length=256)
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(Strict):
    """One message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=_MAX_PARTS)] | None = (
        Field(default=None, validate_default=True)
    )
    name: str | None = Field(default=None, max_length=256)
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = Field(default=None, max_length=256, validate_default=True)
    function_call: CalledFunction | None = None
    audio: None = None  # an answer that was spoken; there are none here

    @field_validator("content", "tool_call_id")
    @classmethod
    def _is_said_where_needed(cls, said: _Said, info: ValidationInfo) -> _Said:
        if said is None and (info.data.get("role"), info.field_name) in _NEEDED:
            raise ValueError(f"a message of role {info.data['role']} needs it")
        return said

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _is_an_assistants(cls, calls: _Calls, info: ValidationInfo) -> _Calls:
        if calls and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only an assistant calls tools")
        return calls

    @property
    def calls(self) -> list[tuple[str | None, CalledFunction]]:
        """The calls that it holds, with their ids."""
        calls = [(call.id, call.function) for call in self.tool_calls or ()]
        return calls or ([(None, self.function_call)] if self.function_call else [])

    def text(self) -> str:
        """Returns the content as one text."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.read() for part in self.content)
