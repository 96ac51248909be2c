"""The body of chat completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.gateway.schemas.generation import NEUTRAL, GenerationRequest
from server.gateway.schemas.parsing import Strict


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)
    tool_call_id: None = None
    function_call: None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    parallel_tool_calls: bool | None = None  # without tools there is nothing to call


CHAT_NEUTRAL: dict[str, tuple[object, ...]] = {
    **NEUTRAL,
    "audio": (None,),
    "chat_template": (None,),  # templates come with models, never with requests
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
