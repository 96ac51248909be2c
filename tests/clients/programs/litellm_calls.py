"""LiteLLM: chats, streams, completions and the exceptions it maps errors to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import litellm
import openai

from tests.clients.programs.scenarios import DONOR, VARIANT, Servers, run

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
EXTRAS = {"ignore_eos": True}


def common(servers: Servers, model: str = VARIANT, provider: str = "openai") -> dict[str, Any]:
    """Returns what every call says."""
    return {
        "model": f"{provider}/{model}",
        "api_base": f"{servers['answering']}/v1",
        "api_key": "any",
        "max_retries": 0,
        "num_retries": 0,
    }


def chat(servers: Servers) -> object:
    limits = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "extra_body": EXTRAS}
    whole = litellm.completion(**common(servers), **limits)
    pieces = list(
        litellm.completion(
            **common(servers), **limits, stream=True, stream_options={"include_usage": True}
        )
    )
    rebuilt = litellm.stream_chunk_builder(pieces, messages=MESSAGES)

    async def read() -> Any:
        return await litellm.acompletion(**common(servers), **limits)

    return {
        "whole": whole.model_dump(),
        "rebuilt": rebuilt.model_dump(),
        "again": asyncio.run(read()).model_dump(),
    }


def vllm_provider(servers: Servers) -> object:
    answer = litellm.completion(
        **common(servers, provider="hosted_vllm"),
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        extra_body=EXTRAS | {"top_k": 1},
    )
    return answer.model_dump()


def text_completion(servers: Servers) -> object:
    asked = {"prompt": "Once", "max_tokens": 8, "temperature": 0, "extra_body": EXTRAS}
    given = common(servers, provider="text-completion-openai")
    whole = litellm.text_completion(**given, **asked)
    pieces = litellm.text_completion(**given, **asked, stream=True)
    return {
        "whole": whole.choices[0].text,
        "streamed": "".join(piece.choices[0].text or "" for piece in pieces),
    }


def structured(servers: Servers) -> object:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = litellm.completion(
        **common(servers),
        messages=MESSAGES,
        temperature=0,
        max_tokens=400,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": schema, "strict": True},
        },
    )
    return answer.choices[0].message.content


def tools(servers: Servers) -> object:
    function = {
        "name": "rain",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    asked = {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "temperature": 1,
        "seed": 2,
        "max_tokens": 400,
    }
    whole = litellm.completion(**common(servers), **asked)
    pieces = list(litellm.completion(**common(servers), **asked, stream=True))
    rebuilt = litellm.stream_chunk_builder(pieces, messages=MESSAGES)
    message = whole.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "wet"} for call in message.tool_calls
    ]
    dialogue = [*MESSAGES, message.model_dump(), *results]
    last = litellm.completion(
        **common(servers), **(asked | {"messages": dialogue, "tool_choice": "none"})
    )
    return {
        "whole": whole.model_dump(),
        "rebuilt": rebuilt.model_dump(),
        "last": last.choices[0].message.content,
    }


def exceptions(servers: Servers) -> object:
    def failed(work: Callable[[], object]) -> str:
        try:
            work()
        except openai.OpenAIError as error:
            return type(error).__name__
        raise AssertionError("there was no error")

    def ask(model: str = VARIANT, **more: Any) -> Callable[[], object]:
        return lambda: litellm.completion(**common(servers, model), messages=MESSAGES, **more)

    guarded = common(servers) | {"api_base": f"{servers['guarded']}/v1"}
    fault = [servers["faults"]["FAIL"], 50]
    return {
        "unknown": failed(ask("nobody")),
        "bad": failed(ask(temperature=-1)),
        "stranger": failed(lambda: litellm.completion(**guarded, messages=MESSAGES)),
        "long": failed(ask(max_tokens=10**6)),
        "numbers": failed(
            lambda: litellm.text_completion(
                **(
                    common(servers, DONOR, "text-completion-openai")
                    | {"api_base": f"{servers['echoing']}/v1"}
                ),
                prompt=fault,
            )
        ),
    }


def main() -> None:
    """Runs every scenario."""
    litellm.suppress_debug_info = True
    run(
        {
            "chat": chat,
            "vllm_provider": vllm_provider,
            "text_completion": text_completion,
            "structured": structured,
            "tools": tools,
            "exceptions": exceptions,
        }
    )


if __name__ == "__main__":
    main()
