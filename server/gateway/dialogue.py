"""A dialogue as chat templates read it: plain records, and where a text that is continued ends.

Knows no template and renders none.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from linker_core.errors import InvalidRequestError
from linker_core.weights import strict_json
from server.gateway.schemas.chat import Dialogue
from server.gateway.schemas.messages import Message
from server.gateway.schemas.tools import Tool
from server.gateway.tools.wire import names_read

Record = Mapping[str, object]

_MUCH_CHARS = 64 * 1024
_MUCH_RECORDS = 512


class Rendering(NamedTuple):
    """What a template is given.

    Attributes:
        messages: Records with `role` and `content`, in order.
        tools: Records of functions; None without any.
        add_generation_prompt: Whether the text ends where the assistant's answer begins.
        more: Further variables of the client's, none of which the server sets.
        end_mark: Stands where the text is to end; None: the text ends where it does.
    """

    messages: Sequence[Record]
    tools: Sequence[Record] | None
    add_generation_prompt: bool
    more: Mapping[str, object]
    end_mark: str | None

    def cut(self, rendered: str) -> str:
        """Returns the text up to the end of the message that is continued, if one is.

        Raises:
            InvalidRequestError: The template does not write that message out once.
        """
        if self.end_mark is None:
            return rendered
        before, mark, after = rendered.partition(self.end_mark)
        if not mark or self.end_mark in after:
            raise InvalidRequestError(
                "This model's chat template does not write the last message as it is, so it "
                "cannot be continued.",
                param="continue_final_message",
            )
        return before


def rendering(dialogue: Dialogue, template: str) -> Rendering:
    """Returns what a template is given of a dialogue.

    Args:
        dialogue: The checked body.
        template: The source, which says what it reads.

    Raises:
        InvalidRequestError: The template knows no tools or reads no such variable, or the last
            message cannot be continued.
    """
    tools = [tool_record(tool) for tool in dialogue.offered_tools()]
    _check_read(dialogue, names_read(template))
    # Templates that do not know the role leave the message out, or fail on it.
    developer = "developer" if "developer" in template else "system"
    messages = [_message_record(message, developer=developer) for message in dialogue.messages]
    end_mark = None
    if dialogue.continue_final_message:
        _check_continuable(dialogue.messages[-1])
        end_mark = secrets.token_hex(16)
        messages[-1] |= {"content": f"{messages[-1]['content']}{end_mark}"}
    adds_prompt = dialogue.add_generation_prompt is not False and end_mark is None
    return Rendering(
        messages=messages,
        tools=tools or None,
        add_generation_prompt=adds_prompt,
        more=dialogue.chat_template_kwargs or {},
        end_mark=end_mark,
    )


def is_much(dialogue: Dialogue, template: str) -> bool:
    """Says whether `rendering` may take milliseconds."""
    calls = [call for message in dialogue.messages for _, call in message.calls]
    num_chars = len(template) + sum(len(call.arguments) for call in calls)
    parts = [message.content for message in dialogue.messages if isinstance(message.content, list)]
    num_records = len(dialogue.messages) + len(calls) + sum(map(len, parts))
    return num_chars > _MUCH_CHARS or num_records > _MUCH_RECORDS


def tool_record(tool: Tool) -> Record:
    """Returns a tool as models are trained to read it."""
    function: dict[str, object] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": "function", "function": function}


def _check_read(dialogue: Dialogue, names: Collection[str]) -> None:
    """Refuses what the template would leave out without a word."""
    if dialogue.tools and "tools" not in names:
        raise InvalidRequestError(
            "This model's chat template knows no tools. Leave them out, or choose a model that "
            "was trained to call them.",
            param="tools",
        )
    for name in dialogue.chat_template_kwargs or ():
        if name not in names:
            raise InvalidRequestError(
                f"This model's chat template reads no variable {name!r}. Leave it out.",
                param=f"chat_template_kwargs.{name}",
            )


def _check_continuable(message: Message) -> None:
    if message.calls or not message.text().strip():
        raise InvalidRequestError(
            "The last message has no text that could be continued, or calls tools.",
            param="continue_final_message",
        )


def _message_record(message: Message, *, developer: str) -> dict[str, object]:
    role = {"developer": developer, "function": "tool"}.get(message.role, message.role)
    record: dict[str, object] = {"role": role, "content": message.text()}
    if message.name is not None:
        record["name"] = message.name
    if message.tool_call_id is not None:
        record["tool_call_id"] = message.tool_call_id
    if message.calls:  # templates ask whether there is such a field
        record["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": function.name, "arguments": _arguments(function.arguments)},
                **({} if call_id is None else {"id": call_id}),
            }
            for call_id, function in message.calls
        ]
    return record


def _arguments(text: str) -> Any:
    """Returns arguments as templates print them: a record, or what a model wrote instead."""
    try:
        value = strict_json.parse(text.encode() or b"{}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
