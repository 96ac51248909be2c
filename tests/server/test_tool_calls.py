"""Models that have to call tools, over HTTP, with the real engine. Their weights are noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from server.gateway.tools.wire import HERMES
from tests.server.live import LiveServer, live_server
from tests.tiny import CHATML, make_checkpoint

MARKS = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "other": "[CALLS]"}
SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["é", "b"]}},
    "required": ["sure", "kind"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "reply", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
NAMED = {"type": "function", "function": {"name": "reply"}}
NOISE: dict[str, Any] = {"tools": TOOLS, "temperature": 1, "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Models of a template that marks calls as each of the families, or as nobody."""
    root = tmp_path_factory.mktemp("real")
    models: dict[str, Path] = {}
    for name, mark in MARKS.items():
        models[name] = make_checkpoint(root / name, seed=len(models))
        template = f"{{% if tools %}}{{% set mark = '{mark}' %}}{{% endif %}}{CHATML}"
        (models[name] / "chat_template.jinja").write_text(template)
    state = tmp_path_factory.mktemp("state")
    with live_server(state, models=models, root=root, engine_command=None) as live:
        live.until_ready()
        yield live


def choice_of(server: LiveServer, model: str, **more: Any) -> dict[str, Any]:
    response = server.chat(model, "hi", **NOISE | more)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert isinstance(choice, dict)
    return choice


def check_call(call: dict[str, Any]) -> None:
    """Asserts that a call is one of the tools'."""
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "stop":
        assert arguments == {}
    else:
        assert call["function"]["name"] == "reply"
        assert set(arguments) == {"sure", "kind"}
        assert isinstance(arguments["sure"], bool)
        assert arguments["kind"] in ("é", "b")


@pytest.mark.parametrize("model", MARKS)
@pytest.mark.parametrize("seed", [1, 2])
def test_required_call_is_a_sound_one_of_the_tools(
    server: LiveServer, model: str, seed: int
) -> None:
    choice = choice_of(server, model, tool_choice="required", seed=seed)
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    check_call(call)
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("model", MARKS)
def test_named_function_is_called_and_the_answer_stops(server: LiveServer, model: str) -> None:
    choice = choice_of(server, model, tool_choice=NAMED, seed=3)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "reply"
    check_call(call)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("model", MARKS)
def test_several_calls_are_sound_up_to_where_the_answer_is_cut(
    server: LiveServer, model: str
) -> None:
    choice = choice_of(server, model, tool_choice="required", parallel_tool_calls=True, seed=4)
    *whole, last = choice["message"]["tool_calls"]
    for call in whole:
        check_call(call)
    if choice["finish_reason"] == "tool_calls":
        check_call(last)
    else:
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("model", MARKS)
def test_stream_of_a_forced_call_adds_up_to_the_whole_answer(
    server: LiveServer, model: str
) -> None:
    more = {**NOISE, "tool_choice": NAMED, "seed": 5}
    whole = choice_of(server, model, **more)["message"]["tool_calls"][0]["function"]
    text = server.chat(model, "hi", stream=True, **more).text
    blocks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    deltas = [block["choices"][0]["delta"] for block in blocks]
    parts = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert parts[0]["function"] == {"name": "reply", "arguments": ""}
    assert parts[0]["id"].startswith("call_")
    assert len(parts) > 2  # not all of the arguments at once
    assert "".join(part["function"]["arguments"] for part in parts) == whole["arguments"]
    assert not any(delta.get("content") for delta in deltas)
    assert blocks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("tool", "answer", "param"),
    [
        ({"type": "foo"}, {"type": "string"}, "tools"),
        ({"type": "string"}, {"type": "foo"}, "response_format.json_schema.schema"),
        ({"pattern": "("}, {"pattern": ")"}, "response_format.json_schema.schema"),
    ],
)
def test_field_whose_schema_does_not_compile_is_named(
    server: LiveServer, tool: dict[str, Any], answer: dict[str, Any], param: str
) -> None:
    function = {"name": "get", "parameters": {"type": "object", "properties": {"x": tool}}}
    schema = {"type": "object", "properties": {"x": answer}}
    more = {
        "tools": [{"type": "function", "function": function}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }
    response = server.chat("hermes", "hi", **more)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


class Reply(BaseModel):
    """What a client wants to know."""

    sure: bool
    places: list[bool]


def test_strict_function_of_the_sdk_comes_back_parsed(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.parse(
            model="hermes",
            messages=[{"role": "user", "content": "hi"}],
            tools=[pydantic_function_tool(Reply, name="reply")],
            tool_choice={"type": "function", "function": {"name": "reply"}},
            seed=6,
        )
    calls = answer.choices[0].message.tool_calls or []
    assert [type(call.function.parsed_arguments) for call in calls] == [Reply]


@pytest.mark.parametrize("stream", [False, True])
def test_schema_that_cannot_be_enforced_is_400_where_it_has_to_be(
    server: LiveServer, stream: bool
) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    function = {"name": "get", "parameters": schema, "strict": True}
    tools = [{"type": "function", "function": function}]
    for choice in ("required", "auto"):
        more = {"tools": tools, "tool_choice": choice, "stream": stream}
        response = server.chat("hermes", "hi", **more)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"


def test_schema_that_takes_endless_to_compile_is_400_and_hurts_nobody(server: LiveServer) -> None:
    patterns = [{"pattern": f"^.*[ab].{{{n}}}c.*$"} for n in range(10, 34)]
    schema = {"type": "object", "properties": {"x": {"type": "string", "allOf": patterns}}}
    function = {"name": "get", "parameters": schema | {"required": ["x"]}}
    tools = [{"type": "function", "function": function}]
    response = server.chat("hermes", "hi", tools=tools, tool_choice="required")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "too much memory" in response.json()["error"]["message"]
    check_call(choice_of(server, "hermes", tool_choice=NAMED, seed=8)["message"]["tool_calls"][0])


@pytest.mark.parametrize("model", ["hermes", "llama"])
def test_free_answer_under_a_grammar_is_text_or_sound_calls(server: LiveServer, model: str) -> None:
    for seed in range(3):
        choice = choice_of(server, model, tool_choice="auto", seed=seed, max_tokens=40)
        for call in choice["message"].get("tool_calls", []):
            check_call(call)
        if "tool_calls" not in choice["message"]:
            assert choice["message"]["content"]


def test_answer_that_calls_nothing_follows_the_response_format(server: LiveServer) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    choice = choice_of(server, "hermes", response_format=asked, tool_choice="auto", seed=7)
    message = choice["message"]
    if message["content"] is not None:
        record = json.loads(message["content"])
        assert set(record) == {"sure", "kind"}
    for call in message.get("tool_calls", []):
        check_call(call)
    assert message["content"] is not None or message["tool_calls"]


@pytest.mark.shared
def test_trained_model_with_a_known_template_calls_what_it_has_to(
    shared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "chat"
    shutil.copytree(shared / "families/mini-qwen2/chat", folder)
    template = (shared / "data/chat_templates/qwen2.5-instruct.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    with live_server(
        tmp_path / "state", models={"chat": folder}, root=folder.parent, engine_command=None
    ) as live:
        live.until_ready()
        more = {"tools": TOOLS, "tool_choice": "required", "temperature": 0}
        answer = live.chat("chat", "Are you sure?", parallel_tool_calls=False, **more).json()
        choice = answer["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        check_call(call)
        written = HERMES.before + call["function"]["name"] + HERMES.between
        tokenizer = live.served("chat").text.tokenizer
        again = live.chat(
            "chat", "Are you sure?", parallel_tool_calls=False, return_token_ids=True, **more
        ).json()["choices"][0]
        text = tokenizer.decode(again["token_ids"], skip_special_tokens=True)
        assert text == written + call["function"]["arguments"] + HERMES.after
