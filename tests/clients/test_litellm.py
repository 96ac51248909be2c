"""LiteLLM reads answers and streams, and maps errors to the exceptions its users catch."""

from __future__ import annotations

import json

import pytest

from tests.clients.environments import Addresses, Findings, run_program

pytestmark = pytest.mark.client


@pytest.fixture(scope="module")
def found(addresses: Addresses) -> Findings:
    return run_program("litellm", "litellm_calls", addresses)


def test_whole_streamed_and_awaited_chats_say_the_same(found: Findings) -> None:
    chat = found["chat"]
    choices = [chat[name]["choices"][0] for name in ("whole", "rebuilt", "again")]
    assert choices[0]["message"]["content"]
    assert len({choice["message"]["content"] for choice in choices}) == 1
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    for name in ("whole", "rebuilt", "again"):
        assert chat[name]["usage"]["completion_tokens"] == 12


def test_provider_for_vllm_takes_the_same_answers(found: Findings) -> None:
    answer, whole = found["vllm_provider"], found["chat"]["whole"]
    assert answer["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]


def test_text_completion_is_the_same_streamed(found: Findings) -> None:
    completion = found["text_completion"]
    assert completion["whole"] == completion["streamed"] != ""


def test_structured_answer_follows_its_schema(found: Findings) -> None:
    assert json.loads(found["structured"])["colour"] in ("red", "green")


def test_errors_become_the_exceptions_that_users_catch(found: Findings) -> None:
    assert found["exceptions"] == {
        "unknown": "NotFoundError",
        "bad": "BadRequestError",
        "stranger": "AuthenticationError",
        "long": "ContextWindowExceededError",
        "numbers": "InternalServerError",
    }


def test_calls_are_read_whole_and_in_pieces_and_results_sent_back(found: Findings) -> None:
    tools = found["tools"]
    said = []
    for name in ("whole", "rebuilt"):
        choice = tools[name]["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        calls = choice["message"]["tool_calls"]
        said.append([call["function"]["arguments"] for call in calls])
    assert said[0] == said[1] != []
    assert all(json.loads(arguments)["city"] in ("Oslo", "Rome") for arguments in said[0])
    assert tools["last"]
