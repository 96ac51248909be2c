from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

from server.gateway import chat
from server.gateway.tools.records import ChoiceCalls
from server.gateway.tools.wire import HERMES
from tests.server.live import LiveServer, live_server
from tests.tiny import CHATML, make_checkpoint

# The engine answers a prompt with itself, so these models answer with what they are told.
ECHO = "{{ messages[-1]['content'] }}<|im_end|>"
TEMPLATES = {
    "hermes": "{% if tools %}{% set mark = '<tool_call>' %}{% endif %}" + ECHO,
    "llama": "{% if tools %}{% set mark = '<|python_tag|>' %}{% endif %}" + ECHO,
    "other": "{% if tools %}{% endif %}" + ECHO,
    "plain": CHATML,
    "moody": "mood {{ mood }}<|im_end|>",
    "special": "{% if tools %}{% set mark = '<tool_call>' %}{% endif %}" + ECHO,
}
CALL = '{"name": "get", "arguments": {"x": 1}}'
MARKED = f"<tool_call>{CALL}</tool_call>"
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOLS: list[ChatCompletionFunctionToolParam] = [
    {"type": "function", "function": {"name": "get", "parameters": dict(PARAMETERS)}}
]
ASK: dict[str, Any] = {"tools": TOOLS, "temperature": 0}


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Models with templates of several kinds; to `special` a call's marks are special tokens."""
    root = tmp_path_factory.mktemp("models")
    models: dict[str, Path] = {}
    for name, template in TEMPLATES.items():
        added = ("<tool_call>", "</tool_call>") if name == "special" else ()
        models[name] = make_checkpoint(root / name, added_tokens=added, seed=len(models))
        (models[name] / "chat_template.jinja").write_text(template)
    with live_server(tmp_path_factory.mktemp("state"), models=models, root=root) as live:
        live.until_ready()
        yield live


def choice_of(server: LiveServer, model: str, text: str, **more: Any) -> dict[str, Any]:
    response = server.chat(model, text, **ASK | more)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert isinstance(choice, dict)
    return choice


def chunks_of(server: LiveServer, model: str, text: str, **more: Any) -> list[dict[str, Any]]:
    response = server.chat(model, text, stream=True, **ASK | more)
    assert response.status_code == 200, response.text
    *blocks, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def refusal_of(server: LiveServer, model: str = "hermes", **more: Any) -> tuple[str, str]:
    response = server.chat(model, **ASK | more)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("model", "text"),
    [("hermes", MARKED), ("llama", CALL), ("llama", f"<|python_tag|>{CALL}"), ("special", MARKED)],
)
def test_call_in_the_answer_becomes_a_tool_call(tooled: LiveServer, model: str, text: str) -> None:
    choice = choice_of(tooled, model, text)
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert re.fullmatch(r"call_[0-9a-f]{24}", call.pop("id"))
    assert call == {"type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}


def test_text_and_several_calls_keep_their_places(tooled: LiveServer) -> None:
    choice = choice_of(tooled, "llama", '{"name": "get", "parameters": {}}; ' + CALL + " ok")
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ["{}", '{"x": 1}']
    assert len({call["id"] for call in calls}) == 2
    assert choice["message"]["content"] == " ok"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("hermes", "hi"), ("hermes", CALL), ("hermes", MARKED.replace("get", "drop")),
        ("hermes", f"<tool_call>{CALL[:-1]}</tool_call>"), ("llama", '{"a": 1}'), ("llama", "hi"),
        ("special", "<tool_call>x</tool_call>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_content_as_it_is(
    tooled: LiveServer, model: str, text: str, stream: bool
) -> None:
    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(tooled, model, text)]
        assert all("tool_calls" not in choice["delta"] for choice in choices)
        content = "".join(choice["delta"].get("content", "") for choice in choices)
        reason = choices[-1]["finish_reason"]
    else:
        choice = choice_of(tooled, model, text)
        content, reason = choice["message"]["content"], choice["finish_reason"]
        assert "tool_calls" not in choice["message"]
    assert (content, reason) == (text, "stop")


def test_choice_of_none_leaves_calls_in_the_text(tooled: LiveServer) -> None:
    choice = choice_of(tooled, "hermes", MARKED, tool_choice="none")
    assert (choice["message"]["content"], choice["finish_reason"]) == (MARKED, "stop")
    assert "tool_calls" not in choice["message"]


def test_call_that_is_cut_short_is_content_and_ends_with_length(tooled: LiveServer) -> None:
    choice = choice_of(tooled, "hermes", MARKED, max_tokens=30)
    assert choice["message"]["content"] == MARKED[: len(choice["message"]["content"])] != ""
    assert choice["finish_reason"] == "length"


def test_stream_of_a_call_has_role_content_name_arguments_and_reason(tooled: LiveServer) -> None:
    choices = [chunk["choices"][0] for chunk in chunks_of(tooled, "hermes", f"So. {MARKED}")]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "So. "
    calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    call_id = calls[0][0].pop("id")
    assert re.fullmatch(r"call_[0-9a-f]{24}", call_id)
    assert calls == [
        [{"index": 0, "type": "function", "function": {"name": "get", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"x": 1}'}}],
    ]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [
        "tool_calls"
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_long_answers_are_parsed_off_the_event_loop(
    tooled: LiveServer, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    parse, on_loop = ChoiceCalls.message, list[bool]()

    def seen(self: ChoiceCalls, text: str) -> dict[str, Any]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_loop.append(False)
        else:
            on_loop.append(True)
        return parse(self, text)

    monkeypatch.setattr(ChoiceCalls, "message", seen)
    text = HERMES.before + "get" + HERMES.between + "{}" + HERMES.after
    for limit in (len(text) * 2, len(text) * 2 - 1):  # of both choices
        monkeypatch.setattr(chat, "_MAX_INLINE_CHARS", limit)
        answer = tooled.chat("hermes", text, **ASK, n=2, tool_choice=choice).json()
        assert [len(one["message"]["tool_calls"]) for one in answer["choices"]] == [1, 1]
    assert on_loop == [True, True, False, False]


def test_every_choice_has_calls_of_its_own(tooled: LiveServer) -> None:
    answer = tooled.chat("hermes", MARKED, n=3, **ASK).json()
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}
    assert len(ids) == 3
    chunks = chunks_of(tooled, "hermes", MARKED, n=3)
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        parts = [call for c in own for call in c["delta"].get("tool_calls", [])]
        assert {part["index"] for part in parts} == {0}
        assert "".join(part["function"]["arguments"] for part in parts) == '{"x": 1}'
        assert own[-1]["finish_reason"] == "tool_calls"


def test_usage_and_logprobs_count_every_token_of_a_call(tooled: LiveServer) -> None:
    more = {"logprobs": True, "return_token_ids": True}
    plain = tooled.chat("hermes", MARKED, temperature=0, **more).json()
    called = tooled.chat("hermes", MARKED, **ASK, **more).json()
    assert called["usage"] == plain["usage"]
    own, other = called["choices"][0], plain["choices"][0]
    assert own["token_ids"] == other["token_ids"]
    assert len(own["logprobs"]["content"]) == called["usage"]["completion_tokens"]
    chunks = chunks_of(tooled, "hermes", MARKED, **more)
    entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(entry["content"]) for entry in entries if entry) == len(own["token_ids"])


def test_openai_sdk_accumulates_a_streamed_call(tooled: LiveServer) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": f"{CALL}; {CALL}".replace("1", "2")}
    ]
    with (
        openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none") as client,
        client.chat.completions.stream(model="llama", messages=messages, tools=TOOLS) as stream,
    ):
        events = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in events
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"x": 2}, {"x": 2}]


def test_answer_of_a_tool_goes_back_to_the_model(tooled: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none") as client:
        create = client.chat.completions.create
        ask: list[ChatCompletionMessageParam] = [{"role": "user", "content": MARKED}]
        called = create(model="hermes", messages=ask, tools=TOOLS).choices[0].message
        assert called.tool_calls is not None
        tool_call_id = called.tool_calls[0].id
        answered = create(
            model="hermes",
            messages=[
                *ask,
                called.model_dump(exclude_unset=True),  # type: ignore[list-item]
                {"role": "tool", "tool_call_id": tool_call_id, "content": "It is 3."},
            ],
            tools=TOOLS,
        )
    assert answered.choices[0].message.content == "It is 3."
    assert answered.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]},
         "tools.0.function.name"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools"),
        ({"tools": TOOLS * 129}, "tools"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "put"}}}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "get"}}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
         "tool_choice.allowed_tools.tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "tool_choice": {"type": "function", "function": {"name": "get"}}},
         "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_bad_tools_are_400_and_named(tooled: LiveServer, more: dict[str, Any], param: str) -> None:
    assert refusal_of(tooled, **more)[0] == param


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "string"}, {"type": ["object", "null"]}, [], "{}",
        {"description": "a" * 65536}, json.loads('{"x": ' * 33 + "1" + "}" * 33),
    ],
)  # fmt: skip
def test_parameters_out_of_bounds_are_400_and_named(tooled: LiveServer, parameters: Any) -> None:
    function = {"name": "get", "parameters": parameters}
    param, message = refusal_of(tooled, tools=[{"type": "function", "function": function}])
    assert param == "tools.0.function.parameters"
    assert "Value error" not in message
    assert len(message) < 300


@pytest.mark.parametrize("choice", [None, "none", "auto", "required"])
def test_model_whose_template_knows_no_tools_refuses_them(
    tooled: LiveServer, choice: str | None
) -> None:
    param, message = refusal_of(tooled, "plain", tool_choice=choice)
    assert param == "tools"
    assert "template" in message


def test_model_whose_calls_cannot_be_read_has_to_be_made_to_call(tooled: LiveServer) -> None:
    assert refusal_of(tooled, "other")[0] == "tool_choice"
    assert tooled.chat("other", "hi", **ASK, tool_choice="none").status_code == 200
    text = '[{"name": "get", "arguments": {"x": 1}}]'
    choice = choice_of(tooled, "other", text, tool_choice="required")
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'


def test_forced_answer_that_is_cut_short_shows_what_there_is(tooled: LiveServer) -> None:
    text = HERMES.before + "get" + HERMES.between + '{"x": 1'
    for more in ({}, {"tool_choice": {"type": "function", "function": {"name": "get"}}}):
        choice = choice_of(tooled, "hermes", text, **{"tool_choice": "required"} | more)
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get", "arguments": '{"x": 1'}
        assert choice["finish_reason"] == "stop"  # by whatever cut it; it is no call to be made
    cut = choice_of(tooled, "hermes", text + "}", tool_choice="required", max_tokens=40)
    assert cut["finish_reason"] == "length"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"tokenize": True}, {"messages": "x"}, {"tools": "x"}, {"add_generation_prompt": False},
        {"bos_token": "x"}, {"chat_template": "x"}, {"_x": 1}, {"a b": 1}, {"mark": []},
        {"mark": {}}, {"mark": "x" * 1025}, {"unknown": 1}, {str(i): 1 for i in range(17)},
        {"raise_exception": 1},
    ],
)  # fmt: skip
def test_template_variables_that_are_not_the_clients_are_400(
    tooled: LiveServer, kwargs: dict[str, Any]
) -> None:
    assert refusal_of(tooled, chat_template_kwargs=kwargs)[0].startswith("chat_template_kwargs")


@pytest.mark.parametrize("value", ["glad", "", True, 3, 0.5, None])
def test_template_variable_reaches_the_template(tooled: LiveServer, value: object) -> None:
    body = {"tools": None, "chat_template_kwargs": {"mood": value}}
    assert choice_of(tooled, "moody", "hi", **body)["message"]["content"] == f"mood {value}"


def test_last_message_is_continued_where_it_ends(tooled: LiveServer) -> None:
    body = {
        "model": "plain",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}],
        "continue_final_message": True,
        "max_tokens": 1,
        "return_token_ids": True,
    }
    answer = tooled.client.post("/v1/chat/completions", json=body).json()
    prompt = tooled.served("plain").text.tokenizer.decode(
        answer["prompt_token_ids"], skip_special_tokens=False
    )
    assert prompt == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb "
    both = tooled.client.post("/v1/chat/completions", json=body | {"add_generation_prompt": True})
    assert both.json()["error"]["param"] == "continue_final_message"


@pytest.mark.parametrize("content", ["", " ", None])
def test_last_message_without_text_cannot_be_continued(
    tooled: LiveServer, content: str | None
) -> None:
    messages = [{"role": "assistant", "content": content}]
    body = {"model": "plain", "messages": messages, "continue_final_message": True}
    error = tooled.client.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "continue_final_message"
