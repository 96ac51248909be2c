"""The openai SDK against the server that says what it is told: errors, retries and departures."""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai

from tests.clients.programs.scenarios import DONOR, VARIANT, Servers, run

HI: list[Any] = [{"role": "user", "content": "hi"}]


def client_of(servers: Servers, *, retries: int = 0) -> openai.OpenAI:
    """Returns a client that tries again as often as said."""
    return openai.OpenAI(base_url=f"{servers['echoing']}/v1", api_key="any", max_retries=retries)


class Retries(logging.Handler):
    """What the SDK says when it is about to try again, and something to do at that moment."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []
        self._then = then

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Retrying"):
            self.messages.append(message)
            self._then()


@contextmanager
def retries(then: Callable[[], object] = lambda: None) -> Iterator[list[str]]:
    """Yields the messages of tries made again until the block ends."""
    logger, handler = logging.getLogger("openai"), Retries(then)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)


def described(work: Callable[[], object]) -> dict[str, object]:
    """Returns the error that some work ends with, as users see it."""
    try:
        work()
    except openai.APIStatusError as error:
        return {
            "class": type(error).__name__,
            "status": error.status_code,
            "code": error.code,
            "param": error.param,
            "type": error.type,
            "message": error.message,
            "request_id": error.request_id,
            "headers": dict(error.response.headers),
        }
    except openai.APIError as error:
        return {"class": type(error).__name__, "code": error.code, "message": error.message}
    raise AssertionError("there was no error")


def errors(servers: Servers) -> object:
    with client_of(servers) as client:
        chat = client.chat.completions
        prompt = [servers["faults"]["FAIL"], 50]
        return {
            "bad": described(lambda: chat.create(model=DONOR, messages=HI, temperature=-1)),
            "long": described(lambda: chat.create(model=DONOR, messages=HI, max_tokens=10**6)),
            "unknown": described(lambda: chat.create(model="nobody", messages=HI)),
            "in_use": described(lambda: client.models.delete(DONOR)),
            "absent": described(lambda: client.embeddings.create(model=DONOR, input="hi")),
            "numbers": described(lambda: client.completions.create(model=DONOR, prompt=prompt)),
        }


def conflict_is_final(servers: Servers) -> object:
    with client_of(servers, retries=3) as client, retries() as tries:
        error = described(lambda: client.models.delete(DONOR))
        return {"class": error["class"], "tries": list(tries)}


def full_server(servers: Servers) -> object:
    """Every place is taken by a stream until the SDK says that it will try again."""
    with client_of(servers) as holder, client_of(servers, retries=5) as client:
        held = [
            holder.completions.create(
                model=DONOR, prompt=[servers["faults"]["MUTE"], 50], max_tokens=50, stream=True
            )
            for _ in range(4)
        ]

        def leave() -> None:
            for stream in held:
                stream.close()

        refused = described(lambda: holder.chat.completions.create(model=DONOR, messages=HI))
        with retries(leave) as tries:
            answer = client.chat.completions.create(model=DONOR, messages=HI)
        return {
            "refused": refused,
            "tries": list(tries),
            "answer": answer.choices[0].message.content,
        }


def dead_engine(servers: Servers) -> object:
    """The engine dies in a stream; requests are tried again until the next one is there."""
    seen: list[str] = []

    def read() -> None:
        stream = client.completions.create(
            model=DONOR, prompt=[servers["faults"]["DIE"], 70, 71], max_tokens=50, stream=True
        )
        seen.extend(chunk.choices[0].text for chunk in stream)

    with client_of(servers) as client:
        broken = described(read)
        refused = described(lambda: client.chat.completions.create(model=DONOR, messages=HI))
    with client_of(servers, retries=10) as patient, retries() as tries:
        answer = patient.chat.completions.create(model=DONOR, messages=HI)
    return {
        "seen": "".join(seen),
        "broken": broken,
        "refused": refused,
        "tries": list(tries),
        "answer": answer.choices[0].message.content,
    }


def deleting(servers: Servers) -> object:
    """Onboards a model as operators do, and forgets it as the SDK does."""
    body = {"name": "acme/spare", "source": servers["spare"], "policy": "exact"}
    asked = urllib.request.Request(
        f"{servers['echoing']}/models?wait=true",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked) as response:
        onboarded = response.status
    with client_of(servers) as client:
        return {
            "onboarded": onboarded,
            "found": client.models.retrieve("acme/spare").id,
            "deleted": client.models.delete("acme/spare").model_dump(),
            "then": described(lambda: client.models.retrieve("acme/spare")),
        }


def impatience(servers: Servers) -> object:
    prompt = [servers["faults"]["WAIT"], 50]
    with client_of(servers) as client:
        return described(
            lambda: client.with_options(timeout=0.5).completions.create(
                model=DONOR, prompt=prompt, max_tokens=50
            )
        )


def headers(servers: Servers) -> object:
    with client_of(servers) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=VARIANT, messages=HI, extra_headers={"X-Request-Id": "mine-1"}
        )
        with client.chat.completions.with_streaming_response.create(
            model=VARIANT, messages=HI, stream=True
        ) as streamed:
            lines = list(streamed.iter_lines())
            return {
                "whole": dict(raw.headers),
                "text": raw.parse().choices[0].message.content,
                "stream": dict(streamed.headers),
                "last_lines": lines[-3:],
            }


def keys(servers: Servers) -> object:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{servers['guarded']}/v1", api_key=key, max_retries=0)

    def ask(with_key: openai.OpenAI) -> str | None:
        answer = with_key.chat.completions.create(model=DONOR, messages=HI)
        return answer.choices[0].message.content

    good, slow = client(servers["keys"]["client"]), client(servers["keys"]["slow"])
    with client("wrong") as stranger, good, slow:
        return {
            "stranger": described(lambda: ask(stranger)),
            "good": ask(good),
            "not_for_clients": described(lambda: good.models.delete(VARIANT)),
            # Other versions may have used the minute up already.
            "too_fast": described(lambda: [ask(slow) for _ in range(2)]),
        }


def main() -> None:
    """Runs every scenario."""
    run(
        {
            "errors": errors,
            "conflict_is_final": conflict_is_final,
            "full_server": full_server,
            "dead_engine": dead_engine,
            "deleting": deleting,
            "impatience": impatience,
            "headers": headers,
            "keys": keys,
        }
    )


if __name__ == "__main__":
    main()
