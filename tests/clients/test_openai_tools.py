"""Functions through the openai SDK, both major versions: calls, their pieces and results."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.environments import Addresses, Findings, run_program
from tests.clients.test_openai import VERSIONS

pytestmark = pytest.mark.client


@pytest.fixture(scope="module", params=VERSIONS)
def found(request: pytest.FixtureRequest, addresses: Addresses) -> Findings:
    return run_program(request.param, "openai_tools", addresses)


def message_of(answer: dict[str, Any]) -> dict[str, Any]:
    message = answer["choices"][0]["message"]
    assert isinstance(message, dict)
    return message


def check_arguments(text: str) -> None:
    arguments = json.loads(text)
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Oslo", "Rome")
    assert arguments["days"] in (1, 2)


def check_calls(answer: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    calls = message_of(answer)["tool_calls"]
    assert calls
    for call in calls:
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert call["function"]["name"] in names
        check_arguments(call["function"]["arguments"])
    assert len({call["id"] for call in calls}) == len(calls)
    assert isinstance(calls, list)
    return calls


def test_required_calls_follow_their_schemas_and_results_are_read(found: Findings) -> None:
    loop = found["required"]
    check_calls(loop["answer"], "warmth", "rain")
    assert loop["answer"]["choices"][0]["finish_reason"] == "tool_calls"
    assert not message_of(loop["last"])["tool_calls"]
    assert message_of(loop["last"])["content"]
    tokens = [answer["usage"]["prompt_tokens"] for answer in (loop["answer"], loop["last"])]
    assert tokens[1] > tokens[0]


def test_named_function_is_the_one_called(found: Findings) -> None:
    check_calls(found["named"], "rain")


def test_calls_come_one_at_a_time_where_parallel_tool_calls_is_false(found: Findings) -> None:
    assert len(check_calls(found["one_call"], "warmth", "rain")) == 1


def test_streamed_calls_add_up(found: Findings) -> None:
    streamed = found["streamed"]
    whole = message_of(found["required"]["answer"])["tool_calls"]
    pieces = streamed["pieces"]
    for call in pieces["calls"].values():
        assert call["id"].startswith("call_")
        check_arguments(call["arguments"])
    said = [call["function"] for call in whole]
    joined = [
        {"name": call["name"], "arguments": call["arguments"]} for call in pieces["calls"].values()
    ]
    assert joined == [{key: one[key] for key in ("name", "arguments")} for one in said]
    assert pieces["reasons"] == ["tool_calls"]
    first = pieces["pieces"][0]
    assert (first["index"], first["type"]) == (0, "function")
    assert first["function"]["name"]


def test_stream_helper_knows_calls(found: Findings) -> None:
    streamed = found["streamed"]
    check_calls(streamed["final"], "warmth", "rain")
    assert "tool_calls.function.arguments.done" in streamed["kinds"]


def test_parsed_calls_have_their_type(found: Findings) -> None:
    assert found["parsed"]
    for arguments in found["parsed"]:
        assert arguments["city"] in ("Oslo", "Rome")
        assert isinstance(arguments["by_night"], bool)


def test_auto_finds_a_call_among_text_and_the_result_is_sent_back(found: Findings) -> None:
    auto = found["auto"]
    [call] = check_calls(auto["answer"], "rain")
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": 2}
    assert message_of(auto["answer"])["content"].strip() == "So"
    assert auto["answer"]["choices"][0]["finish_reason"] == "tool_calls"
    assert message_of(auto["last"])["content"] == "mild"
    assert auto["last"]["choices"][0]["finish_reason"] == "stop"
    streamed = auto["streamed"]
    assert streamed["content"].strip() == "So"
    [piece] = streamed["calls"].values()
    assert piece["name"] == "rain"
    assert piece["arguments"] == call["function"]["arguments"]
    assert streamed["reasons"] == ["tool_calls"]


def test_none_leaves_the_text_as_it_is(found: Findings) -> None:
    message = message_of(found["auto"]["none"])
    assert not message["tool_calls"]
    assert "<tool_call>" in message["content"]
