"""The openai SDK calling functions: calls asked for, calls found, and results sent back."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.programs.scenarios import VARIANT, Servers, run

ASK: list[Any] = [{"role": "user", "content": "How warm is it?"}]
# Greedy, a random model may write white space for ever.
FREELY: dict[str, Any] = {"model": VARIANT, "temperature": 1, "seed": 3, "max_tokens": 600}
CITIES = ["Oslo", "Rome"]


def tool(name: str) -> Any:
    """Returns a function with few possible arguments."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks the weather up.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": CITIES}, "days": {"enum": [1, 2]}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }


TOOLS: list[Any] = [tool("warmth"), tool("rain")]


class Wind(BaseModel):
    """How windy it is."""

    city: Literal["Oslo", "Rome"]
    by_night: bool


def client_of(servers: Servers, *, echoing: bool = False) -> openai.OpenAI:
    """Returns a client of one of the servers."""
    url = servers["echoing"] if echoing else servers["answering"]
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def answered(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    """Returns a dialogue with the answer, and a result of each of its calls."""
    answer = client.chat.completions.create(messages=messages, tools=TOOLS, **more)
    message = answer.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "mild"}
        for call in message.tool_calls or ()
    ]
    return answer, [*messages, message.model_dump(exclude_none=True), *results]


def required(servers: Servers) -> object:
    """The loop of an agent: calls, results, and an answer without calls."""
    with client_of(servers) as client:
        answer, dialogue = answered(client, ASK, tool_choice="required", **FREELY)
        last = client.chat.completions.create(
            messages=dialogue, tools=TOOLS, tool_choice="none", **(FREELY | {"max_tokens": 8})
        )
        return {"answer": answer.model_dump(), "last": last.model_dump()}


def named(servers: Servers) -> object:
    choice: Any = {"type": "function", "function": {"name": "rain"}}
    with client_of(servers) as client:
        whole = client.chat.completions.create(
            messages=ASK, tools=TOOLS, tool_choice=choice, **FREELY
        )
        return whole.model_dump()


def one_call(servers: Servers) -> object:
    with client_of(servers) as client:
        answer = client.chat.completions.create(
            messages=ASK,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            **FREELY,
        )
        return answer.model_dump()


def accumulated(client: openai.OpenAI, messages: list[Any], **more: Any) -> object:
    """Puts the pieces of calls together as the SDK's documents say."""
    calls: dict[int, dict[str, str]] = {}
    content, reasons, pieces = "", [], []
    for chunk in client.chat.completions.create(
        messages=messages, tools=TOOLS, stream=True, **more
    ):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for part in choice.delta.tool_calls or ():
                assert part.function is not None
                pieces.append(part.model_dump())
                call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += part.id or ""
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
    return {"content": content, "calls": calls, "reasons": reasons, "pieces": pieces}


def streamed(servers: Servers) -> object:
    asked = {"tool_choice": "required", **FREELY}
    with client_of(servers) as client:
        with client.chat.completions.stream(messages=ASK, tools=TOOLS, **asked) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        return {
            "pieces": accumulated(client, ASK, **asked),
            "final": final.model_dump(),
            "kinds": sorted(kinds),
        }


def parsed(servers: Servers) -> object:
    with client_of(servers) as client:
        answer = client.chat.completions.parse(
            messages=ASK,
            tools=[openai.pydantic_function_tool(Wind, name="wind")],
            tool_choice="required",
            **FREELY,
        )
        calls: list[Any] = list(answer.choices[0].message.tool_calls or ())
        return [call.function.parsed_arguments.model_dump() for call in calls]


def auto(servers: Servers) -> object:
    """The echoing server says what it is told: a call in the template's own words."""
    call = {"name": "rain", "arguments": {"city": "Oslo", "days": 2}}
    says: Any = {"role": "user", "content": f"So <tool_call>{json.dumps(call)}</tool_call>"}
    with client_of(servers, echoing=True) as client:
        answer, dialogue = answered(client, [says], model=VARIANT)
        last, _ = answered(client, dialogue, model=VARIANT)
        return {
            "answer": answer.model_dump(),
            "last": last.model_dump(),
            "streamed": accumulated(client, [says], model=VARIANT),
            "none": client.chat.completions.create(
                messages=[says], tools=TOOLS, tool_choice="none", model=VARIANT
            ).model_dump(),
        }


def main() -> None:
    """Runs every scenario."""
    run(
        {
            "required": required,
            "named": named,
            "one_call": one_call,
            "streamed": streamed,
            "parsed": parsed,
            "auto": auto,
        }
    )


if __name__ == "__main__":
    main()
