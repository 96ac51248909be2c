"""What clients that read the wire themselves rely on: load generators and web interfaces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.clients.programs.scenarios import DONOR, VARIANT
from tests.clients.wire import Wire
from tests.server.fake_engine import Fault
from tests.server.live import LiveServer

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TEXT = "Grüße, 世界"
_WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(kw_only=True)
class Measured:
    """What a load generator knows of a stream in the end."""

    text: str = ""
    num_stamps: int = 0
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


@pytest.fixture
def wire(echoing: LiveServer) -> Iterator[Wire]:
    with Wire(echoing.url) as connection:
        yield connection


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"model": VARIANT, "messages": [{"role": "user", "content": text}], **more}


def messages(writes: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Reads events as load generators do: every read is stripped and stands for itself.

    White space at the edges of a read is lost, and with it whatever an event would continue with.
    """
    for read in writes:
        for message in read.decode().strip().split("\n\n"):
            if message != "data: [DONE]":
                yield json.loads(message.removeprefix("data: "))


def measured(writes: Iterable[bytes]) -> Measured:
    """Takes the stamps that a load generator takes."""
    found = Measured()
    for message in messages(writes):
        if message["choices"]:
            choice = message["choices"][0]
            found.num_stamps += 1
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            found.text += text or ""
        elif usage := message.get("usage"):
            found.completion_tokens = usage["completion_tokens"]
            found.prompt_tokens = usage["prompt_tokens"]
    return found


def test_load_generator_measures_a_completion(wire: Wire) -> None:
    prompt = [70, 71, 72]
    body = {"model": VARIANT, "prompt": prompt, "repetition_penalty": 1.0, "max_tokens": 9,
            "logprobs": None, "temperature": 0.0, "ignore_eos": True}  # fmt: skip
    wire.ask(COMPLETION, body | _WITH_USAGE, headers={"X-Request-Id": "bench-0"})
    found = measured(wire.writes())
    wire.ask(COMPLETION, body)
    assert found.text == wire.json()["choices"][0]["text"] != ""
    assert (found.completion_tokens, found.prompt_tokens) == (9, 3)
    assert found.num_stamps == 9


def test_load_generator_measures_a_chat(wire: Wire) -> None:
    parts = [{"type": "text", "text": TEXT}]
    body = said("", max_completion_tokens=40, ignore_eos=True)
    body["messages"] = [{"role": "user", "content": parts}]
    wire.ask(CHAT, body | _WITH_USAGE)
    found = measured(wire.writes())
    assert found.text.startswith(TEXT)
    assert found.completion_tokens == 40


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_every_write_is_whole_events_without_comments(wire: Wire, path: str) -> None:
    body = said(TEXT) if path == CHAT else {"model": VARIANT, "prompt": TEXT}
    # More tokens than one write ever holds.
    wire.ask(path, {**body, **_WITH_USAGE, "max_tokens": 64, "ignore_eos": True})
    writes = list(wire.writes())
    assert len(writes) > 1
    for write in writes:
        assert write.startswith(b"data: ")
        assert write.endswith(b"\n\n")
    everything = b"".join(writes)
    assert b"\r" not in everything
    lines = everything.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])


def test_slow_tokens_are_no_reason_for_comments(wire: Wire) -> None:
    prompt = [Fault.SLOW, 70]
    wire.ask(COMPLETION, {"model": DONOR, "prompt": prompt, "max_tokens": 8, "stream": True})
    assert all(write.startswith(b"data: ") for write in wire.writes())


def test_role_comes_in_one_piece_with_the_first_token(wire: Wire) -> None:
    """Time to first token is stamped on the first piece, whatever it holds."""
    wire.ask(CHAT, said("hi", stream=True))
    first, *_ = list(wire.writes())  # a short answer may be all of it
    events = first.decode().removesuffix("data: [DONE]\n\n").removesuffix("\n\n").split("\n\n")
    deltas = [json.loads(one.removeprefix("data: "))["choices"][0]["delta"] for one in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1]["content"] == "h"


def test_connection_serves_requests_after_a_stream(wire: Wire) -> None:
    for _ in range(3):
        wire.ask(CHAT, said("again", stream=True))
        assert measured(wire.writes()).text == "again"
    wire.ask("/health")
    assert wire.json()["status"]


def interface_text(writes: Iterable[bytes]) -> str:
    """Reads a stream by lines, as web interfaces do."""
    text = ""
    for line in b"".join(writes).decode().split("\n"):
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            for choice in json.loads(data)["choices"]:
                text += choice["delta"].get("content") or ""
    return text


def test_web_interface_verifies_lists_and_talks(wire: Wire) -> None:
    """Open WebUI's requests, with the headers that it forwards."""
    user = {
        "Authorization": "Bearer any",
        "X-OpenWebUI-User-Name": "Ann%20Smith",
        "X-OpenWebUI-User-Id": "4c1d2f0e-0000-4000-8000-000000000001",
        "X-OpenWebUI-User-Email": "ann@example.org",
        "X-OpenWebUI-User-Role": "user",
        "X-OpenWebUI-Chat-Id": "4c1d2f0e-0000-4000-8000-000000000002",
    }
    wire.ask("/v1/models", headers=user)
    listed = wire.json()
    assert wire.status == 200
    assert [model["id"] for model in listed["data"]] == [DONOR, VARIANT]
    wire.ask(CHAT, said(TEXT, stream=True), headers=user)
    assert wire.headers["content-type"].startswith("text/event-stream")
    assert interface_text(wire.writes()) == TEXT
    title = said(f'{{"title": "{TEXT}"}}', stream=False, max_completion_tokens=100)
    wire.ask(CHAT, title, headers=user)
    assert json.loads(wire.json()["choices"][0]["message"]["content"]) == {"title": TEXT}


def test_web_interface_shows_why_a_request_was_refused(wire: Wire) -> None:
    body: Mapping[str, Any] = said("x" * 500, stream=True)
    wire.ask(CHAT, body)
    assert wire.status == 400
    assert wire.headers["content-type"] == "application/json"
    assert "maximum context length" in wire.json()["error"]["message"]
