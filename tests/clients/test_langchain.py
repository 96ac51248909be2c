"""LangChain reads answers, streams, usage and structure, and raises the SDK's errors."""

from __future__ import annotations

import pytest

from tests.clients.environments import Addresses, Findings, run_program
from tests.clients.programs.scenarios import DONOR, VARIANT

pytestmark = pytest.mark.client


@pytest.fixture(scope="module")
def found(addresses: Addresses) -> Findings:
    return run_program("langchain", "langchain_chat", addresses)


def test_answer_has_text_usage_and_where_it_came_from(found: Findings) -> None:
    answer = found["invoke"]
    assert answer["text"]
    assert answer["usage"]["output_tokens"] == 12
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + 12
    assert (answer["about"]["model_name"], answer["about"]["finish_reason"]) == (VARIANT, "length")


def test_streams_say_what_the_whole_answer_says(found: Findings) -> None:
    whole, streamed = found["invoke"], found["stream"]
    assert streamed["text"] == streamed["again"] == whole["text"]
    for count in ("input_tokens", "output_tokens", "total_tokens"):
        assert streamed["usage"][count] == whole["usage"][count]
    assert streamed["reason"] == "length"


def test_batch_keeps_its_order(found: Findings) -> None:
    first, other, third = found["batch"]
    assert first == third == found["invoke"]["text"] != other


def test_logprobs_come_with_every_token(found: Findings) -> None:
    assert all(len(token["top_logprobs"]) == 2 for token in found["logprobs"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_has_its_type(found: Findings, method: str) -> None:
    verdict = found["structured"][method]
    assert verdict["colour"] in ("red", "green")
    assert isinstance(verdict["is_warm"], bool)


def test_text_completion_is_the_same_streamed(found: Findings) -> None:
    completion = found["completion"]
    assert completion["whole"] == completion["streamed"] != ""


def test_errors_are_recognised_for_what_they_are(found: Findings) -> None:
    assert found["errors"] == {
        "unknown": {"class": "OpenAIModelNotFoundError", "code": "model_not_found"},
        "long": {"class": "OpenAIContextOverflowError", "code": "context_length_exceeded"},
    }


def test_every_model_answers_under_its_own_name(found: Findings) -> None:
    assert found["both_models"] == {DONOR: DONOR, VARIANT: VARIANT}


def test_agent_calls_and_reads_results(found: Findings) -> None:
    loop = found["tools"]
    assert loop["calls"]
    for call in (*loop["calls"], *loop["streamed"]):
        assert call["city"] in ("Oslo", "Rome")
        assert call["days"] in (1, 2)
    assert loop["streamed"] == loop["calls"]
    assert loop["reason"] == "tool_calls"
    expected = [f"{call['days']} drops in {call['city']}" for call in loop["calls"]]
    assert loop["results"] == expected
    assert loop["last"]


def test_call_among_text_is_found_and_its_result_sent_back(found: Findings) -> None:
    auto = found["auto"]
    assert auto["calls"] == [{"city": "Oslo", "days": 2}]
    assert auto["text"].strip() == "So"
    assert auto["last"] == "2 drops in Oslo"
