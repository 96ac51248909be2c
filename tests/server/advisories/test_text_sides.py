"""Rows A16-A18 and C10: tokenizers and templates of strangers, and answers that imitate calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.gateway.tools import calls
from server.gateway.tools.finder import MAX_CALL_CHARS, CallFinder
from server.gateway.tools.pieces import CallBegun
from server.gateway.tools.wire import HERMES, LLAMA3, WireFormat
from tests.server.advisories.attacks import Bystander, refused
from tests.server.live import LiveServer

CHAT = "/v1/chat/completions"
Change = Callable[[dict[str, Any]], None]


def split_by(pattern: str) -> Change:
    """A pre-tokenizer of a pattern."""
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda record: record.update(pre_tokenizer=cut)


def many_tokens(record: dict[str, Any]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": False}  # fmt: skip
    record["added_tokens"] += [
        {"id": 512 + number, "content": f"<{number}>", **flags} for number in range(70_000)
    ]


def growing(record: dict[str, Any]) -> None:
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 5000}
    record["normalizer"] = {"type": "Sequence", "normalizers": [grow] * 4}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(split_by("(a+)+$"), id="huntr-tokenizer-json-regex-dos"),
        pytest.param(split_by("(.*a){20}.*z"), id="CVE-2025-2099"),
        pytest.param(split_by("("), id="broken-pattern"),
        pytest.param(
            lambda record: record.update(decoder={"type": "Strip", "content": "a", "start": 2**62,
                                                  "stop": 2**62}),
            id="huntr-tokenizers-decoder-panic",
        ),
        pytest.param(lambda record: record.update(decoder={"type": "Nothing"}), id="decoder"),
        pytest.param(lambda record: record["model"].update(vocab={}), id="empty-vocabulary"),
        pytest.param(many_tokens, id="added-tokens"),
        pytest.param(growing, id="growing-normalizer"),
    ],
)  # fmt: skip
def test_tokenizer_that_is_a_bomb(target: LiveServer, source: Path, change: Change) -> None:
    others = Bystander(target)
    file = source / "tokenizer.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with ThreadPoolExecutor(2) as threads:
        attack = threads.submit(target.onboard, "attack", source, wait=False)
        said = others.ask()
        while not attack.done():
            assert others.ask() == said
    response = attack.result()
    if response.status_code == 202:  # accepted: then it must be harmless
        target.call(target.services.onboarder.wait(response.json()["id"]))
        for text in ("a" * 60 + "!", "za" * 30):
            assert target.complete("attack", text, max_tokens=2).status_code in (200, 400)
        assert target.client.delete("/models/attack").status_code == 200
    else:
        refused(response, 400, "bad_checkpoint")


@contextmanager
def onboarded(server: LiveServer, source: Path, template: str) -> Iterator[None]:
    """A model with another template; one that a trial refuses is never served."""
    (source / "chat_template.jinja").write_text(template)
    response = server.onboard("attack", source, donor="base")
    if response.status_code == 201:
        yield
        assert server.client.delete("/models/attack").status_code == 200
    else:
        refused(response, 400)
        yield
        assert server.client.delete("/models/attack").status_code in (200, 404)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{% for c in ''.__class__.__mro__[-1].__subclasses__() %}"
            "{% if c.__name__ == 'Popen' %}{{ c(['mkdir', '@']) }}{% endif %}{% endfor %}",
            id="CVE-2024-34359",
        ),
        pytest.param("{{ cycler.__init__.__globals__.os.mkdir('@') }}", id="CVE-2024-5760"),
        pytest.param("{{ (''|attr('format_map')).__globals__ }}", id="attr"),
        pytest.param("{{ '{0.__class__.__mro__}'.format(messages) }}", id="format"),
        pytest.param("{{ ['{0.__init__.__globals__}']|map('format', cycler)|list }}", id="map"),
        pytest.param("{{ lipsum.__globals__['os'].mkdir('@') }}", id="lipsum"),
        pytest.param("{% include '/etc/passwd' %}", id="include"),
        pytest.param("{{ self.__init__.__globals__['os'].mkdir('@') }}", id="self"),
        pytest.param("{{ raise_exception.__globals__['os'].mkdir('@') }}", id="globals"),
    ],
)
def test_template_that_reaches_out(
    target: LiveServer, source: Path, template: str, tmp_path: Path
) -> None:
    place = tmp_path / "ran"
    with onboarded(target, source, template.replace("@", str(place))):
        response = target.chat("attack")
        if response.status_code != 200:  # what the sandbox hides may be nothing instead of an error
            refused(response, 404 if response.status_code == 404 else 400)
        assert "builtin" not in response.text
    assert not place.exists()


WEDGES = {
    "CVE-2026-115911": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "string": "{% set ns = namespace(s='a') %}{% for i in range(40) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "repetition": "{{ 'a' * 10**9 }}",
    "power": "{{ (9 ** (9 ** 9))|string|length }}",  # templates read powers from the left
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "format": "{{ '%099999999d' % 1 }}",
    "filter-center": "{{ 'a'|center(10**10) }}",
}


@pytest.mark.parametrize("name", list(WEDGES))
def test_template_without_end_keeps_nobody_waiting(
    target: LiveServer, source: Path, name: str
) -> None:
    others = Bystander(target)
    # Only for the one message, so that its trial passes.
    wedge = "{% if messages[0]['content'] == 'attack' %}" + WEDGES[name] + "{% endif %}x"
    with onboarded(target, source, wedge), ThreadPoolExecutor(4) as threads:
        attacks = [threads.submit(target.chat, "attack", "attack", max_tokens=1) for _ in "ab"]
        said = target.chat("near", "hello").json()["choices"]
        assert target.chat("near", "hello").json()["choices"] == said
        assert others.ask() == others.ask()
        for attack in attacks:
            response = attack.result()
            assert response.status_code in (200, 400, 404, 429), response.text
            if response.status_code != 200:
                refused(response, response.status_code)
        if target.client.get("/models/attack").json().get("state") == "ready":
            assert target.chat("attack", "hello", max_tokens=1).status_code in (200, 400)


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"tokenize": True}, id="CVE-2025-62426"),
        *(
            {key: "x"}
            for key in ("messages", "tools", "chat_template", "add_generation_prompt", "bos_token",
                        "conversation", "return_tensors", "return_dict", "__class__", "self")
        ),
        {"a": {"b": 1}}, {"a": [1]}, {"a": "x" * 100_000}, {f"k{n}": 1 for n in range(1000)},
        {"": 1}, {"a b": 1}, {"a": 1e308, "b": None, "c.d": 1},
    ],
    ids=lambda kwargs: f"{kwargs!s:.24}",
)  # fmt: skip
def test_template_variables_that_are_the_servers_own(
    target: LiveServer, kwargs: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "base", "messages": messages, "chat_template_kwargs": kwargs}
    refused(target.client.post(CHAT, json=body), 400, param="chat_template_kwargs")
    tokenized = target.client.post("/tokenize", json=body)
    refused(tokenized, 400, param="chat_template_kwargs")


def test_cve_2024_34359_template_of_a_request_is_refused(target: LiveServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "base", "messages": messages, "chat_template": "{{ 1 }}"}
    refused(target.client.post(CHAT, json=body), 400, param="chat_template")
    refused(target.client.post("/tokenize", json=body), 400, param="chat_template")


ANSWERS = {
    "CVE-2025-71379": "<tool_call>" * 400,
    "open": "<tool_call>{" + '"a":{' * 3000,
    "quotes": '<tool_call>{"' + '\\"' * 4000,
    "spaces": "<tool_call>" + " " * 8000 + "x",
    "brackets": "[" * 8000,
    "tags": "<tool_" * 2000,
    "objects": '{"name": "get", "parameters": {' * 400,
    "closing": '<tool_call>{"name": "get", "arguments": {}}' + "</tool_" * 1000,
}


@pytest.mark.parametrize("wire", [HERMES, LLAMA3], ids=["hermes", "llama3"])
@pytest.mark.parametrize("name", list(ANSWERS))
def test_answer_that_almost_calls_costs_its_length(
    wire: WireFormat, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [0]
    plain, reading = calls.JsonSpan.take, calls.read_calls

    def take(span: calls.JsonSpan, char: str) -> calls.Progress:
        steps[0] += 1
        return plain(span, char)

    def read(text: str, names: Any, *, is_marked: bool) -> Any:
        steps[0] += len(text)
        return reading(text, names, is_marked=is_marked)

    monkeypatch.setattr(calls.JsonSpan, "take", take)
    monkeypatch.setattr("server.gateway.tools.finder.read_calls", read)

    def work(text: str) -> int:
        steps[0] = 0
        finder = CallFinder(wire, ["get"])
        pieces = [piece for char in text for piece in finder.push(char)] + finder.finish()
        assert sum(len(p.text) for p in pieces if not isinstance(p, CallBegun)) <= len(text)
        return steps[0]

    text = ANSWERS[name]
    assert work(text) <= 2 * len(text)
    assert work(text * 3) <= 6 * len(text)


def test_answer_that_holds_a_call_back_is_bounded() -> None:
    finder = CallFinder(HERMES, ["get"])
    shown = 0
    for _ in range(3 * MAX_CALL_CHARS // 1000):
        shown += sum(len(getattr(piece, "text", "")) for piece in finder.push('{"a": "' * 143))
    assert shown > MAX_CALL_CHARS
