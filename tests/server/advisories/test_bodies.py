"""Rows C1-C8, C11 and C12: request bodies and headers that no client of good will sends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.advisories.attacks import Bystander, post, refused
from tests.server.fake_engine import Fault
from tests.server.live import LiveServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
INVALID = "invalid_request_error"
MIB = 1 << 20
# Where a body is read, and a good one for it.
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "base", "messages": HI, "max_tokens": 4},
    COMPLETIONS: {"model": "base", "prompt": "hi", "max_tokens": 4},
    "/models": {"name": "attack", "source": "near"},
    "/models/plan": {"source": "near"},
    "/models/load": {"model": "base"},
    "/models/unload": {"model": "base"},
}
EVERYWHERE = pytest.mark.parametrize("path", list(GOOD))


def pieces(total: int, size: int) -> Iterator[bytes]:
    for _ in range(total // size):
        yield b" " * size


@EVERYWHERE
@pytest.mark.parametrize(
    ("total", "size"),
    [
        pytest.param(64 * MIB, MIB, id="starlette-issue-2155"),
        pytest.param(3 * MIB, 1024, id="triton-many-chunks"),
    ],
)
def test_body_without_a_length_and_an_end(
    target: LiveServer, path: str, total: int, size: int
) -> None:
    response = target.client.post(path, content=pieces(total, size))
    refused(response, 413, "request_too_large")


@EVERYWHERE
def test_cve_2024_47874_multipart_field_without_a_filename(target: LiveServer, path: str) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n%s\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    small = target.client.post(path, content=form % b"a", headers={"Content-Type": kind})
    refused(small, 400, INVALID)
    large = (form % (b"a" * 3 * MIB) for _ in range(1))
    response = target.client.post(path, content=large, headers={"Content-Type": kind})
    refused(response, 413, "request_too_large")


@EVERYWHERE
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP"])
def test_triton_compressed_body(target: LiveServer, path: str, encoding: str) -> None:
    response = post(target, path, b"\x1f\x8b\x08" + bytes(100), **{"Content-Encoding": encoding})
    refused(response, 415, "unsupported_media_type")


@EVERYWHERE
@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"a":' * 100_000, id="CVE-2024-27454"),
        pytest.param('{"a":' + "[" * 1000 + "]" * 1000 + "}", id="closed"),
        pytest.param('{"a":' + "9" * 5000 + "}", id="digits"),
        pytest.param('{"model":"base","model":"near"}', id="duplicate"),
        pytest.param('{"a":NaN}', id="nan"),
        pytest.param('{"a":1e400}', id="huge"),
        pytest.param('\ufeff{"a":1}', id="bom"),
        pytest.param('{"a":1}{"b":2}', id="two"),
    ],
)
def test_json_that_parsers_differ_about(target: LiveServer, path: str, text: str) -> None:
    refused(post(target, path, text), 400, INVALID)


@pytest.mark.parametrize("depth", [10, 55, 60])
def test_cve_2025_67221_depth_that_is_written_back(target: LiveServer, depth: int) -> None:
    nested: Any = {"a": 1}
    for _ in range(depth):
        nested = {"a": nested}
    for field in ("metadata", "nobody_knows", "user", "name", "tools", "logit_bias", "stop"):
        response = target.chat("base", **{field: nested})
        assert response.status_code in (200, 400), field
        if response.status_code == 400:
            refused(response, 400)


NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty",
           "repetition_penalty")  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        pytest.param("NaN", id="CVE-2026-54235"),
        *("Infinity", "-Infinity", "1e999", '"1"', "true", "[]", '"nan"', "-1e308"),
    ],
)
def test_number_that_compares_false(target: LiveServer, path: str, field: str, value: str) -> None:
    body = json.dumps({**GOOD[path], field: "@"}).replace('"@"', value)
    refused(post(target, path, body), 400, INVALID)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"n": 10**9}, id="CVE-2026-34756"),
        pytest.param({"stop_token_ids": [10**9]}, id="CVE-2026-116173"),
        pytest.param({"min_tokens": 10**6, "max_tokens": 4}, id="CVE-2026-114051"),
        pytest.param({"min_tokens": 10**6, "max_tokens": None}, id="CVE-2026-114051-alone"),
        pytest.param({"max_tokens": 10**18}, id="max_tokens"),
        pytest.param({"max_tokens": -1}, id="negative"),
        pytest.param({"logprobs": 10**6}, id="logprobs"),
        pytest.param({"stop": [f"s{n}" for n in range(10**5)]}, id="stop"),
        pytest.param({"logit_bias": {str(n): 1 for n in range(10**5)}}, id="logit_bias"),
        pytest.param({"logit_bias": {"1" * 5000: 1}}, id="logit_bias-digits"),
        pytest.param({"logit_bias": {"-1": 1}}, id="logit_bias-negative"),
        pytest.param({"seed": 2**70}, id="seed"),
        pytest.param({"top_k": 2**40}, id="top_k"),
        pytest.param({"bad_words": ["x" * 10**6]}, id="bad_words"),
        pytest.param({"allowed_token_ids": list(range(10**5))}, id="allowed"),
        pytest.param({"truncate_prompt_tokens": 10**12}, id="truncate"),
        pytest.param({"priority": 10**30}, id="priority"),
        pytest.param({"cache_salt": "x" * 10**6}, id="CVE-2026-105756"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bound_that_is_asked_beyond(target: LiveServer, path: str, fields: dict[str, Any]) -> None:
    if path == CHAT and "logprobs" in fields:
        fields = {"logprobs": True, "top_logprobs": fields["logprobs"]}
    response = target.client.post(path, json={**GOOD[path], **fields})
    assert response.json()["error"]["code"] in (INVALID, "context_length_exceeded")
    refused(response, 400)


WIDTH = 512  # of the models' logits
IDS = [WIDTH, WIDTH + 1, 2**15, 2**31 - 1, 2**31, 2**63, -1, -(2**31)]


@pytest.mark.parametrize("token", IDS)
@pytest.mark.parametrize(
    "field",
    [
        pytest.param("allowed_token_ids", id="CVE-2026-93840"),
        pytest.param("logit_bias", id="CVE-2026-93989"),
        pytest.param("stop_token_ids", id="stop"),
        pytest.param("prompt", id="prompt"),
    ],
)
def test_token_beyond_the_logits_touches_nobody(real: LiveServer, field: str, token: int) -> None:
    others = Bystander(real)
    value: Any = {str(token): 100} if field == "logit_bias" else [5, token]
    body = {**GOOD[COMPLETIONS], field: value}
    with ThreadPoolExecutor(4) as threads:
        beside = [threads.submit(others.ask) for _ in range(2)]
        attack = threads.submit(real.client.post, COMPLETIONS, json=body)
        refused(attack.result(), 400, INVALID, param=field)
        assert beside[0].result() == beside[1].result() == others.ask()


def test_extremes_within_the_bounds_touch_nobody(real: LiveServer) -> None:
    others = Bystander(real)
    last = WIDTH - 1
    bodies: list[dict[str, Any]] = [
        {"logit_bias": {str(last): 100, "0": -100}, "max_tokens": 8},
        {"allowed_token_ids": [last], "max_tokens": 8},
        {"temperature": 1e-9}, {"temperature": 2, "top_p": 1e-9, "min_p": 1},
        {"repetition_penalty": 2, "frequency_penalty": 2, "presence_penalty": -2},
        {"n": 8, "temperature": 1, "seed": -(2**63)}, {"stop_token_ids": [0, last]},
        {"prompt": [last] * 100, "echo": True, "logprobs": 20}, {"bad_words": ["a", "b"]},
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as threads:
        attacks = [
            threads.submit(real.client.post, COMPLETIONS, json={**GOOD[COMPLETIONS], **body})
            for body in bodies
        ]
        beside = [threads.submit(others.ask) for _ in range(6)]
        assert {attack.result().status_code for attack in attacks} == {200}
        said = [answer.result() for answer in beside]
    assert all(answer == said[0] for answer in said)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("x" * (MIB + MIB // 2), id="long"),
        pytest.param("<|im_start|>" * 10_000, id="special"),
        pytest.param("\u202e" * 100_000, id="bidi"),
        pytest.param([1] * 300_000, id="ids"),
        pytest.param([[1]] * 50_000, id="prompts"),
        pytest.param(["a"] * 50_000, id="texts"),
    ],
)
def test_cve_2025_62426_prompt_that_is_work(target: LiveServer, prompt: Any) -> None:
    body = {"model": "base", "prompt": prompt}
    refused(target.client.post(COMPLETIONS, json=body), 400)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["\\ud800", "a\\udfff", "\\ud83d"])
def test_rapid_mlx_issue_730_half_a_surrogate_pair(
    target: LiveServer, text: str, stream: bool
) -> None:
    flag = json.dumps(stream)
    for body in (
        f'{{"model":"base","stream":{flag},"messages":[{{"role":"user","content":"{text}"}}]}}',
        f'{{"model":"base","stream":{flag},"messages":[{{"role":"user","content":"a"}}],'
        f'"stop":["{text}"]}}',
        f'{{"model":"{text}","stream":{flag},"messages":[{{"role":"user","content":"a"}}]}}',
    ):
        assert "surrogate" in refused(post(target, CHAT, body), 400, INVALID)


@pytest.mark.parametrize(
    "body", [b'{"model":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xc0\x80"}']
)
def test_rapid_mlx_issue_730_bytes_that_are_no_text(target: LiveServer, body: bytes) -> None:
    refused(post(target, CHAT, body), 400, INVALID)


@pytest.mark.parametrize(
    "text", ["\0", "a\0b", "\u202eabc", "\ufffe", "\x7f\x1b[2J", "\u0000" * 50]
)
def test_odd_but_whole_text_is_answered(target: LiveServer, text: str) -> None:
    for stream in (False, True):
        assert target.chat("base", text, stream=stream, max_tokens=4).status_code == 200


def test_cve_2026_105755_request_id_that_two_share(target: LiveServer) -> None:
    headers = {"X-Request-Id": "same"}

    def ask(number: int) -> tuple[str, str]:
        token = 20 + number
        body = {"model": "base", "prompt": [token], "max_tokens": 20, "return_token_ids": True}
        response = target.client.post(COMPLETIONS, json=body, headers=headers)
        assert response.status_code == 200
        said = response.json()
        assert set(said["choices"][0]["token_ids"]) == {token}
        return said["id"], response.headers["X-Request-Id"]

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(48)))
    assert {echoed for _, echoed in answers} == {"same"}
    assert len({made for made, _ in answers}) == 48


@pytest.mark.parametrize(
    "given",
    ["http://169.254.169.254/", "a b", "x" * 65, "../../x", "a;b", "${jndi:x}", "\u00e9".encode()],
    ids=lambda given: f"CVE-2026-116176 {given!s:.16}",
)
def test_request_id_that_is_an_address(
    target: LiveServer, given: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    value = given if isinstance(given, bytes) else given.encode()
    headers = [(b"X-Request-Id", value)]
    response = target.client.post(COMPLETIONS, json=GOOD[COMPLETIONS], headers=headers)
    assert response.status_code == 200
    assert re.fullmatch(r"[\w-]{1,64}", response.headers["X-Request-Id"], re.ASCII)
    assert str(given) not in caplog.text


FORWARDED: dict[str, Any] = {
    "api_base": "http://169.254.169.254/", "base_url": "http://evil.example", "api_key": "sk-x",
    "custom_llm_provider": "evil", "extra_headers": {"Host": "evil.example"},
    "mock_response": "owned", "callbacks": ["http://evil.example"], "__proto__": {"a": 1},
    "litellm_params": {"api_base": "http://evil.example"}, "__class__": "x",
}  # fmt: skip


def test_pysec_2026_4070_fields_that_lead_elsewhere(
    target: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    plain = target.chat("base").json()["choices"]
    for field, value in FORWARDED.items():
        response = target.chat("base", **{field: value})
        assert response.status_code == 200, field
        assert response.json()["choices"] == plain
        for path in ("/models", "/models/plan", "/models/load", "/models/unload"):
            refused(target.client.post(path, json={**GOOD[path], field: value}), 400, param=field)
        changed = target.client.patch("/models/base", json={field: value})
        refused(changed, 400, param=field)
    assert "evil.example" not in caplog.text
    assert "sk-x" not in caplog.text


def test_prompt_of_faults_reaches_nobody_else(target: LiveServer) -> None:
    refused(target.complete("base", [Fault.FAIL, 5]), 500, "numerical_error")
