"""The openai SDK against the real engine: answers, streams, structure and listings."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.programs.scenarios import DONOR, VARIANT, Servers, run

MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
EXTRAS: dict[str, Any] = {"ignore_eos": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# Greedy, a random model may write white space for ever.
FREELY: dict[str, Any] = {"temperature": 1, "seed": 1, "max_tokens": 400}


class Verdict(BaseModel):
    """A structure that any model completes within a few tokens."""

    colour: Literal["red", "green", "blue"]
    is_warm: bool
    shade: Literal[1, 2, 3]


def client_of(servers: Servers) -> openai.OpenAI:
    """Returns a client as users make one: base URL and any key."""
    return openai.OpenAI(base_url=f"{servers['answering']}/v1", api_key="any", max_retries=0)


def models(servers: Servers) -> object:
    with client_of(servers) as client:
        listed = [model.model_dump() for model in client.models.list()]
        one = client.models.retrieve(VARIANT)
        raw = client.models.with_raw_response.list()
        return {
            "listed": listed,
            "one": one.model_dump(),
            "request_id": raw.headers.get("x-request-id"),
        }


def chat(servers: Servers) -> object:
    with client_of(servers) as client:
        whole = client.chat.completions.create(
            model=VARIANT, messages=MESSAGES, extra_body=EXTRAS, **GREEDY
        )
        stream = client.chat.completions.create(
            model=VARIANT,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=EXTRAS,
            **GREEDY,
        )
        return {
            "whole": whole.model_dump(),
            "request_id": whole._request_id,  # the SDK's public name for it
            "chunks": [chunk.model_dump() for chunk in stream],
        }


def chat_helper(servers: Servers) -> object:
    """The helper takes no answer that was cut, so this one ends by itself."""
    extras = {"structured_outputs": {"choice": ["yes", "no"]}}
    with client_of(servers) as client:
        with client.chat.completions.stream(
            model=VARIANT, messages=MESSAGES, temperature=0, extra_body=extras
        ) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        return {
            "kinds": [event.type for event in events],
            "deltas": [event.delta for event in events if event.type == "content.delta"],
            "final": final.model_dump(),
        }


def chat_async(servers: Servers) -> object:
    async def talk() -> object:
        async with openai.AsyncOpenAI(
            base_url=f"{servers['answering']}/v1", api_key="any", max_retries=0
        ) as client:

            async def whole(model: str) -> Any:
                answer = await client.chat.completions.create(
                    model=model, messages=MESSAGES, extra_body=EXTRAS, **GREEDY
                )
                return answer.choices[0].message.content

            stream = await client.chat.completions.create(
                model=VARIANT, messages=MESSAGES, stream=True, extra_body=EXTRAS, **GREEDY
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            donor, variant = await asyncio.gather(whole(DONOR), whole(VARIANT))
            return {"streamed": "".join(pieces), "variant": variant, "donor": donor}

    return asyncio.run(talk())


def chat_details(servers: Servers) -> object:
    with client_of(servers) as client:
        answer = client.chat.completions.create(
            model=VARIANT,
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "ann"},
            ],
            n=2,
            logprobs=True,
            top_logprobs=3,
            seed=7,
            stop=["\u2603"],
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={"5": -100},
            max_completion_tokens=6,
            user="ann",
            extra_body={"ignore_eos": True},
        )
        return answer.model_dump()


def completions(servers: Servers) -> object:
    with client_of(servers) as client:
        whole = client.completions.create(
            model=VARIANT, prompt=["One", "Two"], logprobs=2, echo=True, extra_body=EXTRAS, **GREEDY
        )
        stream = client.completions.create(
            model=VARIANT, prompt=[70, 71, 72], stream=True, extra_body=EXTRAS, **GREEDY
        )
        return {
            "whole": whole.model_dump(),
            "chunks": [chunk.model_dump() for chunk in stream],
            "ids": client.completions.create(
                model=VARIANT, prompt=[70, 71, 72], extra_body=EXTRAS, **GREEDY
            ).model_dump(),
        }


def parsed(servers: Servers) -> object:
    with client_of(servers) as client:
        whole = client.chat.completions.parse(
            model=VARIANT, messages=MESSAGES, response_format=Verdict, **FREELY
        )
        with client.chat.completions.stream(
            model=VARIANT, messages=MESSAGES, response_format=Verdict, **FREELY
        ) as stream:
            for _event in stream:
                pass
            streamed = stream.get_final_completion()
        answers = [completion.choices[0].message.parsed for completion in (whole, streamed)]
        return [answer.model_dump() for answer in answers if answer is not None]


def json_object(servers: Servers) -> object:
    with client_of(servers) as client:
        answer = client.chat.completions.create(
            model=VARIANT,
            messages=MESSAGES,
            response_format={"type": "json_object"},
            max_tokens=40,
            temperature=0,
        )
        choice = answer.choices[0]
        return {"text": choice.message.content, "reason": choice.finish_reason}


def structured_choice(servers: Servers) -> object:
    with client_of(servers) as client:
        answer = client.chat.completions.create(
            model=VARIANT,
            messages=MESSAGES,
            extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
        )
        return answer.choices[0].message.content


def main() -> None:
    """Runs every scenario."""
    run(
        {
            "models": models,
            "chat": chat,
            "chat_helper": chat_helper,
            "chat_async": chat_async,
            "chat_details": chat_details,
            "completions": completions,
            "parsed": parsed,
            "json_object": json_object,
            "structured_choice": structured_choice,
        }
    )


if __name__ == "__main__":
    main()
