"""What clients send is nowhere but in their own answers: words of one request, looked for anywhere.

litellm CVE-2024-9606, CVE-2025-11203; text-embeddings-inference CVE-2026-108857; vllm
CVE-2026-22778.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from server.registry.records import Role
from tests.server.cli.fake_serve import QUOTE_VARIABLE
from tests.server.cli.test_serve import Served, serving
from tests.server.fake_engine import Fault
from tests.server.keyed import give_key

TIMEOUT_S = 60.0


class Canaries(NamedTuple):
    """Words that occur once in the world."""

    prompt: str
    other: str  # in fields beside the prompt
    wrong: str  # shown as a key

    @classmethod
    def hatched(cls) -> Canaries:
        return cls(*(f"canary{secrets.token_hex(8)}" for _ in range(3)))


def bodies(canaries: Canaries) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields requests that are answered, and such that are refused at every place there is."""
    said, other = canaries.prompt, canaries.other
    chat, text = "/v1/chat/completions", "/v1/completions"
    message = {"role": "user", "content": said}
    for more in ({}, {"stream": True}, {"n": 2, "logprobs": True}, {"user": other}):
        yield chat, {"model": "base", "messages": [message], "max_tokens": 4, **more}
        yield text, {"model": "base", "prompt": said, "max_tokens": 4, "unknown": other}
    yield text, {"model": "base", "prompt": [Fault.FAIL, 3], "user": other, "cache_salt": other}
    yield text, {"model": f"no/{other}", "prompt": said}
    yield text, {"model": "base", "prompt": said * 100}
    yield text, {"model": "base", "prompt": said, "n": other}
    yield text, {"model": "base", "prompt": {"deep": said}}
    yield text, {"model": "base", "prompt": said, "structured_outputs": {"regex": f"({other}"}}
    yield text, {"model": "base", "prompt": said, "logit_bias": {other: 1}}
    yield text, {"model": "base", "prompt": said, "stop": [other] * 17}
    yield chat, {"model": "base", "messages": [{**message, "role": other}]}
    yield chat, {"model": "base", "messages": [message], "chat_template": other}
    yield chat, {"model": "base", "messages": [message], "chat_template_kwargs": {other: said}}
    yield chat, {"model": "base", "messages": [message], "tools": [{"type": other}]}
    yield "/tokenize", {"model": "base", "prompt": said}
    yield "/models/load", {"model": said}


def ask_everything(client: httpx.Client, canaries: Canaries) -> list[int]:
    """Sends every request; returns how each was answered."""
    headers = {"X-Request-Id": canaries.other, "Cookie": canaries.other}
    answers = [
        client.post(path, json=body, headers=headers, params={"q": canaries.other})
        for path, body in bodies(canaries)
    ]
    answers.append(client.post("/v1/completions", content=f'{{"prompt": "{canaries.prompt}'))
    answers.append(client.get(f"/v1/models/{canaries.prompt}"))
    answers.append(client.get(f"/{canaries.prompt}", params={"q": canaries.other}))
    wrong = {"Authorization": f"Bearer {canaries.wrong}"}
    answers.append(client.get("/models", headers=wrong))
    assert canaries.wrong not in answers[-1].text
    return [answer.status_code for answer in answers]


def seen_by_others(client: httpx.Client) -> str:
    """Returns whatever the server tells those who were not asked."""
    paths = ("/metrics", "/health", "/ready", "/models", "/models/jobs", "/v1/models", "/nothing")
    return "\n".join(client.get(path).text for path in paths)


def on_disk(state: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in state.rglob("*") if path.is_file())


def assert_nowhere(words: list[str], *places: str | bytes) -> None:
    for place in places:
        text = place if isinstance(place, bytes) else place.encode()
        for word in words:
            assert word.encode() not in text
            assert word.encode().hex().encode() not in text


@pytest.fixture
def key(tmp_path: Path) -> str:
    return give_key(tmp_path / "s", Role.ADMIN).key


def client_of(served: Served, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=served.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def test_prompts_answers_and_keys_are_kept_nowhere(tmp_path: Path, family: Path, key: str) -> None:
    canaries = Canaries.hatched()
    words = [*canaries, key, key.removeprefix(key[:14])]
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        with client_of(served, key) as client:
            statuses = ask_everything(client, canaries)
            shown = seen_by_others(client)
        assert_nowhere(words, on_disk(tmp_path / "s"))
        served.process.send_signal(signal.SIGTERM)
        assert served.ends() == 0
    assert {200, 400, 401, 404} <= set(statuses)  # all kinds of ends were met
    assert_nowhere(words, shown, "".join(served.log), on_disk(tmp_path / "s"))


def test_a_fault_of_ours_that_quotes_a_prompt_is_told_without_it(
    tmp_path: Path, family: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, QUOTE_VARIABLE, "1")
    canaries = Canaries.hatched()
    with serving(tmp_path, "--model", f"base={family / 'base'}") as served:
        served.until_ready()
        with client_of(served, key) as client:
            body = {"model": "base", "prompt": canaries.prompt}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 500
            shown = answer.text + seen_by_others(client)
        served.process.send_signal(signal.SIGTERM)
        assert served.ends() == 0
    log = "".join(served.log)
    assert "KeyError" in log
    assert "in prepare" in log
    assert_nowhere([*canaries, key], shown, log, on_disk(tmp_path / "s"))
