"""Row C9: grammars, patterns and schemas that are bombs, over the real engine."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.server.advisories.attacks import Bystander, refused
from tests.server.live import LiveServer

HI = [{"role": "user", "content": "hi"}]


def schema(record: object) -> dict[str, Any]:
    return {"structured_outputs": {"json": record}}


def formatted(record: object) -> dict[str, Any]:
    described = {"name": "a", "schema": record}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def nested(depth: int) -> dict[str, Any]:
    record: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        record = {"type": "array", "items": record}
    return record


INTERSECTIONS = " & ".join(f"/.*[ab].{{{n}}}c.*/" for n in range(10, 60))
RECURSIVE = {
    "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}},
    "$ref": "#/$defs/a",
}
REFUSED = [
    pytest.param(schema("[" * 5000 + "]" * 5000), id="CVE-2026-25048"),
    pytest.param({"structured_outputs": {"grammar": "start: " + "(" * 30_000}}, id="parentheses"),
    pytest.param({"structured_outputs": {"grammar": "start: start"}}, id="CVE-2025-57809"),
    pytest.param(schema(RECURSIVE), id="CVE-2025-57809-ref"),
    pytest.param({"structured_outputs": {"choice": [f"c{n}" * 9 for n in range(9_000)]}},
                 id="CVE-2025-58446"),
    pytest.param(schema({"enum": [f"c{n}" * 9 for n in range(9_000)]}), id="CVE-2025-58446-enum"),
    pytest.param({"structured_outputs": {"grammar": f"start: T\nT: {INTERSECTIONS}"}},
                 id="GHSA-389x-67px-mjg3"),
    pytest.param({"structured_outputs": {"json": ""}}, id="CVE-2026-105757-empty"),
    pytest.param(schema({"$ref": "#/nowhere"}), id="CVE-2026-105757"),
    pytest.param(schema({"$ref": "http://169.254.169.254/schema"}), id="remote-ref"),
    pytest.param(schema({"$ref": "file:///etc/passwd"}), id="file-ref"),
    pytest.param(schema({"type": "object", "properties": 5}), id="no-object"),
    pytest.param(schema({"type": "string", "pattern": "("}), id="broken-pattern"),
    pytest.param({"structured_outputs": {"grammar": "%import os\nstart: X"}}, id="import"),
    pytest.param({"structured_outputs": {"regex": "(?<=a)b\\1"}}, id="lookbehind"),
]  # fmt: skip
# What ruins engines that backtrack or that build every state at once. Here states are built as the
# answer needs them, and a trial in another process bounds the work.
FOLLOWED = [
    pytest.param({"structured_outputs": {"regex": "(a+)+b" * 8000}}, id="CVE-2026-55574-long"),
    pytest.param({"structured_outputs": {"regex": "(a+)+b"}}, id="CVE-2026-55574"),
    pytest.param({"structured_outputs": {"regex": "((a{0,99}){0,99}){0,99}b"}}, id="repetition"),
    pytest.param(formatted({"type": "string", "pattern": "((a+)+)+b"}), id="PYSEC-2026-3933"),
    pytest.param(formatted({"type": "string", "pattern": "(a{0,999}){0,999}"}), id="sibling"),
    pytest.param(schema({"type": "array", "items": {"$ref": "#"}}), id="recursive"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("constraint", REFUSED)
def test_constraint_that_is_a_bomb(
    real: LiveServer, constraint: dict[str, Any], stream: bool
) -> None:
    others = Bystander(real)
    body = {"model": "base", "messages": HI, "max_tokens": 4, "stream": stream, **constraint}
    with ThreadPoolExecutor(2) as threads:
        attack = threads.submit(real.client.post, "/v1/chat/completions", json=body)
        beside = threads.submit(others.ask)
        message = refused(attack.result(), 400, "invalid_request_error")
        beside.result()
    assert len(message) < 400


@pytest.mark.parametrize("constraint", FOLLOWED)
def test_constraint_that_ruins_others_is_followed(
    real: LiveServer, constraint: dict[str, Any]
) -> None:
    others = Bystander(real)
    body = {"model": "base", "messages": HI, "max_tokens": 48, "temperature": 0, **constraint}
    with ThreadPoolExecutor(2) as threads:
        attack = threads.submit(real.client.post, "/v1/chat/completions", json=body)
        beside = threads.submit(others.ask)
        beside.result()
    if "{0,99" in str(constraint) and attack.result().status_code != 200:
        refused(attack.result(), 400, "invalid_request_error")  # its states ran out on the way
        return
    assert attack.result().status_code == 200, attack.result().text
    said = attack.result().json()["choices"][0]["message"]["content"]
    if "regex" in constraint.get("structured_outputs", {}):
        assert set(said) <= {"a", "b"}
    else:
        assert said[0] in '"['


def test_cve_2025_29770_schemas_that_are_all_new_fill_no_disk_and_no_memory(
    real: LiveServer,
) -> None:
    pid = real.services.engine.pid
    assert pid is not None
    engine = psutil.Process(pid)
    state = real.services.settings.state_directory()

    def ask(number: int) -> None:
        record = {"type": "object", "properties": {f"k{number}_{n}": {"type": "string"}
                  for n in range(40)}, "additionalProperties": False}  # fmt: skip
        body = {"model": "base", "messages": HI, "max_tokens": 2, **schema(record)}
        assert real.client.post("/v1/chat/completions", json=body).status_code == 200

    def files() -> int:
        places = [state, Path(tempfile.gettempdir())]
        return sum(1 for place in places for path in place.glob("*") if path.is_file())

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(12)))
        held, kept = engine.memory_info().rss, files()
        written = engine.io_counters().write_bytes
        list(threads.map(ask, range(12, 48)))
    assert files() <= kept
    assert engine.io_counters().write_bytes - written < 1 << 20
    assert engine.memory_info().rss - held < 32 << 20


def test_grammars_of_one_do_not_shut_others_out(real: LiveServer) -> None:
    others = Bystander(real)
    said = others.ask()

    def attack(number: int) -> int:
        grammar = f"start: T\nT: {INTERSECTIONS} & /x{{{number}}}.*/"
        outputs = {"grammar": grammar}
        body = {"model": "base", "messages": HI, "structured_outputs": outputs}
        return real.client.post("/v1/chat/completions", json=body).status_code

    with ThreadPoolExecutor(4) as threads:
        attacks = [threads.submit(attack, number) for number in range(2)]
        while not all(future.done() for future in attacks):
            assert others.ask() == said
        assert {future.result() for future in attacks} <= {400, 429}


def test_json_text_of_a_schema_is_bounded_like_the_schema(real: LiveServer) -> None:
    for text in (json.dumps(nested(100)), "[" * 10_000, '{"a":NaN}', '{"a":1,"a":2}'):
        body = {"model": "base", "messages": HI, **schema(text)}
        refused(real.client.post("/v1/chat/completions", json=body), 400)
