"""LangChain's ChatOpenAI: invoke, stream, batches, structure and errors."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field, SecretStr

from tests.clients.programs.scenarios import DONOR, VARIANT, Servers, run

DIALOGUE = [
    SystemMessage("Be brief."),
    HumanMessage("Hi"),
    AIMessage("Hello"),
    HumanMessage("Once upon a time"),
]
# Greedy, a random model may write white space for ever.
FREELY: dict[str, Any] = {"temperature": 1, "seed": 1, "max_completion_tokens": 400}


class Verdict(BaseModel):
    """What to think of a colour."""

    colour: Literal["red", "green"] = Field(description="Which")
    is_warm: bool = Field(description="Whether it is")


def chat_of(servers: Servers, model: str = VARIANT, **more: Any) -> ChatOpenAI:
    """Returns a chat model as users make one."""
    settings: dict[str, Any] = {"temperature": 0, "max_completion_tokens": 12, "max_retries": 0}
    return ChatOpenAI(
        base_url=f"{servers['answering']}/v1",
        api_key=SecretStr("any"),
        model=model,
        **(settings | more),
    )


def invoke(servers: Servers) -> object:
    answer = chat_of(servers, extra_body={"ignore_eos": True}).invoke(DIALOGUE)
    return {
        "text": answer.content,
        "usage": answer.usage_metadata,
        "about": {
            key: answer.response_metadata[key]
            for key in ("model_name", "finish_reason", "id", "token_usage")
        },
    }


def stream(servers: Servers) -> object:
    chat = chat_of(servers, extra_body={"ignore_eos": True}, stream_usage=True)
    pieces = list(chat.stream(DIALOGUE))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece

    async def read() -> str:
        return "".join([str(piece.content) async for piece in chat.astream(DIALOGUE)])

    return {
        "text": whole.content,
        "usage": whole.usage_metadata,
        "reason": whole.response_metadata["finish_reason"],
        "again": asyncio.run(read()),
    }


def batch(servers: Servers) -> object:
    chat = chat_of(servers, extra_body={"ignore_eos": True})
    answers = chat.batch([DIALOGUE, [HumanMessage("Hi")], DIALOGUE])
    return [answer.content for answer in answers]


def logprobs(servers: Servers) -> object:
    chat = chat_of(servers).bind(logprobs=True, top_logprobs=2)
    return chat.invoke(DIALOGUE).response_metadata["logprobs"]["content"]


def structured(servers: Servers) -> object:
    def ask(method: Literal["json_schema", "function_calling"]) -> object:
        chat = chat_of(servers, **FREELY)
        model: Runnable[Any, Any] = chat.with_structured_output(Verdict, method=method)
        verdict = model.invoke(DIALOGUE)
        return verdict.model_dump()

    return {"json_schema": ask("json_schema"), "function_calling": ask("function_calling")}


@tool
def rain(city: Literal["Oslo", "Rome"], days: Literal[1, 2]) -> str:
    """Says how much it will rain."""
    return f"{days} drops in {city}"


def tools(servers: Servers) -> object:
    """The loop of an agent, with calls that the model has to make."""
    chat = chat_of(servers, **FREELY).bind_tools([rain], tool_choice="required")
    answer = chat.invoke(DIALOGUE)
    results = [rain.invoke(dict(call) | {"type": "tool_call"}) for call in answer.tool_calls]
    last = chat_of(servers).bind_tools([rain], tool_choice="none")
    pieces = list(chat.stream(DIALOGUE))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    return {
        "calls": [call["args"] for call in answer.tool_calls],
        "reason": answer.response_metadata["finish_reason"],
        "results": [result.content for result in results],
        "last": last.invoke([*DIALOGUE, answer, *results]).content,
        "streamed": [call["args"] for call in whole.tool_calls],
    }


def auto(servers: Servers) -> object:
    """The echoing server says what it is told, here a call among text."""
    call = '<tool_call>{"name": "rain", "arguments": {"city": "Oslo", "days": 2}}</tool_call>'
    chat = ChatOpenAI(
        base_url=f"{servers['echoing']}/v1", api_key=SecretStr("any"), model=VARIANT, max_retries=0
    ).bind_tools([rain])
    answer = chat.invoke([HumanMessage(f"So {call}")])
    results = [rain.invoke(dict(call) | {"type": "tool_call"}) for call in answer.tool_calls]
    return {
        "text": answer.content,
        "calls": [call["args"] for call in answer.tool_calls],
        "last": chat.invoke([*DIALOGUE, answer, *results]).content,
    }


def completion(servers: Servers) -> object:
    model = OpenAI(
        base_url=f"{servers['answering']}/v1",
        api_key=SecretStr("any"),
        model=VARIANT,
        temperature=0,
        max_tokens=8,
        model_kwargs={"extra_body": {"ignore_eos": True}},
    )
    return {"whole": model.invoke("Once"), "streamed": "".join(model.stream("Once"))}


def errors(servers: Servers) -> object:
    found = {}
    asked: dict[str, dict[str, Any]] = {
        "unknown": {"model": "nobody"},
        "long": {"max_completion_tokens": 10**6},
    }
    for name, settings in asked.items():
        try:
            chat_of(servers, **settings).invoke("hi")
        except openai.APIStatusError as error:
            found[name] = {"class": type(error).__name__, "code": error.code}
    return found


def both_models(servers: Servers) -> object:
    extras = {"ignore_eos": True}
    return {
        name: chat_of(servers, name, extra_body=extras)
        .invoke("Once")
        .response_metadata["model_name"]
        for name in (DONOR, VARIANT)
    }


def main() -> None:
    """Runs every scenario."""
    run(
        {
            "invoke": invoke,
            "stream": stream,
            "batch": batch,
            "logprobs": logprobs,
            "structured": structured,
            "tools": tools,
            "auto": auto,
            "completion": completion,
            "errors": errors,
            "both_models": both_models,
        }
    )


if __name__ == "__main__":
    main()
