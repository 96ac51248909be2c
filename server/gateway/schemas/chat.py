"""The body of chat completions."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from server.gateway.schemas.generation import NEUTRAL, GenerationRequest
from server.gateway.schemas.messages import Message
from server.gateway.schemas.parsing import Strict, Unhonoured, few
from server.gateway.schemas.tools import AllowedChoice, NamedTool, ToolChoice, Tools

_MAX_MESSAGES = 2048
_MAX_KWARGS = 16
_MAX_KWARG_CHARS = 1024
_KWARG = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}")
# What a template is given, what rendering itself takes, and what templates call.
_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "caller", "chat_template",
        "continue_final_message", "conversation", "cycler", "dict", "documents", "joiner",
        "kwargs", "lipsum", "loop", "max_length", "messages", "namespace", "padding", "processor",
        "raise_exception", "range", "return_assistant_tokens_mask", "return_dict",
        "return_tensors", "self", "strftime_now", "super", "template", "tokenize", "tokenizer",
        "tokenizer_kwargs", "tools", "truncation", "varargs",
    }
)  # fmt: skip


class Dialogue(Strict):
    """What a chat template turns into a prompt."""

    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=_MAX_MESSAGES)
    ]
    tools: Tools | None = None
    add_generation_prompt: bool | None = None  # true, unless the last message is continued
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[
        dict[str, str | int | float | bool | None] | None,
        Field(max_length=_MAX_KWARGS),
        few(_MAX_KWARGS),
    ] = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _kwargs_are_plain(
        cls, kwargs: dict[str, str | int | float | bool | None] | None
    ) -> dict[str, str | int | float | bool | None] | None:
        for name, value in (kwargs or {}).items():
            if not _KWARG.fullmatch(name):
                raise ValueError(f"{name[:64]!r} is no name of a variable")
            if name in _RESERVED_KWARGS or name.startswith("_") or name.endswith("_token"):
                raise ValueError(f"{name!r} is the server's to set")
            if isinstance(value, str) and len(value) > _MAX_KWARG_CHARS:
                raise ValueError(f"{name!r} has more than {_MAX_KWARG_CHARS} characters")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name!r} is no finite number")
        return kwargs

    @field_validator("continue_final_message")
    @classmethod
    def _ends_one_way(cls, goes_on: bool | None, info: ValidationInfo) -> bool | None:
        if goes_on and info.data.get("add_generation_prompt"):
            raise ValueError(
                "this goes on with the last message, and add_generation_prompt begins another; "
                "set one of them"
            )
        return goes_on

    @field_validator("tools")
    @classmethod
    def _names_are_unique(cls, tools: Tools | None) -> Tools | None:
        names = Counter(tool.function.name for tool in tools or ())
        twice = next((name for name, times in names.items() if times > 1), None)
        if twice is not None:
            raise ValueError(f"two functions are called {twice!r}")
        return tools

    def offered_tools(self) -> Tools:
        """Returns the tools that the model is told of."""
        return self.tools or []


class ChatRequest(Dialogue, GenerationRequest):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = Field(default=None, max_length=128)
    prompt_cache_key: str | None = Field(default=None, max_length=1024)

    @field_validator("top_logprobs")
    @classmethod
    def _has_logprobs(cls, number: int | None, info: ValidationInfo) -> int | None:
        if number and not info.data.get("logprobs", True):
            raise ValueError("this needs logprobs: true")
        return number

    @field_validator("tool_choice")
    @classmethod
    def _is_offered(cls, choice: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        tools: Tools = info.data.get("tools") or []
        if not tools and choice not in (None, "none", "auto"):
            raise ValueError("there are no tools to choose from")
        missing = set(chosen_names(choice)) - {tool.function.name for tool in tools}
        if missing:
            raise ValueError(f"none of the tools is called {min(missing)!r}")
        return choice

    def offered_tools(self) -> Tools:
        """Returns the tools that the model is told of: all of them, or those that are allowed."""
        tools = super().offered_tools()
        if not isinstance(self.tool_choice, AllowedChoice):
            return tools
        names = chosen_names(self.tool_choice)
        return [tool for tool in tools if tool.function.name in names]


def chosen_names(choice: ToolChoice | None) -> tuple[str, ...]:
    """Returns the functions that a choice names; none where all are open."""
    if isinstance(choice, NamedTool):
        return (choice.function.name,)
    if isinstance(choice, AllowedChoice):
        return tuple(tool.function.name for tool in choice.allowed_tools.tools)
    return ()


CHAT_NEUTRAL: dict[str, Unhonoured] = {
    **NEUTRAL,
    "audio": Unhonoured(remedy="The models here write text"),
    "chat_template": Unhonoured(remedy="Templates come with models, never with requests"),
    "documents": Unhonoured([], remedy="Put them into the messages"),
    "echo": Unhonoured(False),
    "function_call": Unhonoured("none", "auto", remedy="Use tool_choice"),
    "functions": Unhonoured([], remedy="Use tools"),
    "include_reasoning": Unhonoured(True),
    "media_io_kwargs": Unhonoured({}),
    "metadata": Unhonoured({}, remedy="Nothing is stored that it could be found with"),
    "mm_processor_kwargs": Unhonoured({}),
    "modalities": Unhonoured(["text"], remedy="The models here write text"),
    "moderation": Unhonoured(),
    "prediction": Unhonoured(),
    "prompt_cache_options": Unhonoured({}, {"mode": "implicit"}),
    "prompt_cache_retention": Unhonoured("in_memory"),
    "reasoning_effort": Unhonoured(remedy="Use chat_template_kwargs, if the template knows it"),
    "store": Unhonoured(False, remedy="Nothing is stored"),
    "thinking_token_budget": Unhonoured(),
    "verbosity": Unhonoured("medium"),
    "web_search_options": Unhonoured(),
}
