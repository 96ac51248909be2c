"""The openai SDK, both major versions: what its users read, raise and retry."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.environments import Addresses, Findings, run_program
from tests.clients.programs.scenarios import DONOR, VARIANT
from tests.server.live import LiveServer

pytestmark = pytest.mark.client
VERSIONS = ["openai2", "openai3"]


@pytest.fixture(scope="module", params=VERSIONS)
def answers(request: pytest.FixtureRequest, addresses: Addresses) -> Findings:
    return run_program(request.param, "openai_answers", addresses)


@pytest.fixture(scope="module", params=VERSIONS)
def faults(request: pytest.FixtureRequest, addresses: Addresses) -> Findings:
    return run_program(request.param, "openai_faults", addresses)


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(
        choice["delta"]["content"] or "" for chunk in chunks for choice in chunk["choices"]
    )


def test_models_are_listed_donor_first_and_found_by_an_id_with_a_slash(answers: Findings) -> None:
    found = answers["models"]
    assert [model["id"] for model in found["listed"]] == [DONOR, VARIANT]
    assert found["one"] == found["listed"][1]
    assert found["one"]["parent"] == found["one"]["root"] == DONOR
    assert found["one"]["max_model_len"] == 4096
    assert found["request_id"]


def test_whole_and_streamed_chats_say_the_same(answers: Findings) -> None:
    found = answers["chat"]
    whole, chunks = found["whole"], found["chunks"]
    choice = whole["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert text_of(chunks) == choice["message"]["content"] != ""
    assert choice["finish_reason"] == chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[0]["choices"][0]["delta"]["content"] == ""
    assert chunks[-1]["choices"] == []
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    usage = [whole["usage"], chunks[-1]["usage"]]
    assert [one["completion_tokens"] for one in usage] == [12, 12]
    assert usage[0]["prompt_tokens"] == usage[1]["prompt_tokens"] > 0
    assert usage[0]["total_tokens"] == usage[0]["prompt_tokens"] + 12
    assert found["request_id"]


def test_stream_helper_rebuilds_the_answer(answers: Findings) -> None:
    found = answers["chat_helper"]
    choice = found["final"]["choices"][0]
    assert "".join(found["deltas"]) == choice["message"]["content"]
    assert choice["message"]["content"] in ("yes", "no")
    assert choice["finish_reason"] == "stop"
    assert {"chunk", "content.delta", "content.done"} <= set(found["kinds"])


def test_async_client_reads_streams_and_models_side_by_side(answers: Findings) -> None:
    found, whole = answers["chat_async"], answers["chat"]["whole"]
    assert found["streamed"] == found["variant"] == whole["choices"][0]["message"]["content"]
    assert found["donor"]


def test_choices_carry_logprobs_of_every_token(answers: Findings) -> None:
    found = answers["chat_details"]
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for choice in found["choices"]:
        tokens = choice["logprobs"]["content"]
        assert len(tokens) == 6
        for token in tokens:
            assert len(token["top_logprobs"]) == 3
            assert token["logprob"] <= token["top_logprobs"][0]["logprob"]
    assert found["usage"]["completion_tokens"] == 12


def test_completions_take_texts_and_ids_and_echo_them(answers: Findings) -> None:
    found = answers["completions"]
    for choice, prompt in zip(found["whole"]["choices"], ["One", "Two"], strict=True):
        assert choice["text"].startswith(prompt)
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert "".join(logprobs["tokens"][:3]) == prompt
        assert len(logprobs["tokens"]) == len(prompt) + 12
    streamed = "".join(chunk["choices"][0]["text"] for chunk in found["chunks"])
    assert streamed == found["ids"]["choices"][0]["text"]
    assert found["ids"]["usage"]["prompt_tokens"] == 3


def test_parsed_answers_have_the_type_that_was_asked_for(answers: Findings) -> None:
    found = answers["parsed"]
    assert len(found) == 2
    for verdict in found:
        assert verdict["colour"] in ("red", "green", "blue")
        assert isinstance(verdict["is_warm"], bool)
        assert verdict["shade"] in (1, 2, 3)


def test_json_object_is_json_unless_it_is_cut(answers: Findings) -> None:
    found = answers["json_object"]
    if found["reason"] == "stop":
        assert isinstance(json.loads(found["text"]), dict)
    else:
        assert found["text"].lstrip().startswith("{")


def test_vllm_constraint_through_the_extra_body(answers: Findings) -> None:
    assert answers["structured_choice"] in ("yes", "no")


def test_errors_are_the_classes_that_users_catch(faults: Findings) -> None:
    found = faults["errors"]
    said = {name: (error["class"], error["status"]) for name, error in found.items()}
    assert said == {
        "bad": ("BadRequestError", 400),
        "long": ("BadRequestError", 400),
        "unknown": ("NotFoundError", 404),
        "in_use": ("ConflictError", 409),
        "absent": ("NotFoundError", 404),
        "numbers": ("InternalServerError", 500),
    }
    assert (found["bad"]["param"], found["bad"]["type"]) == ("temperature", "invalid_request_error")
    assert found["long"]["code"] == "context_length_exceeded"
    assert "maximum context length is 200 tokens" in found["long"]["message"]
    assert (found["unknown"]["code"], found["unknown"]["param"]) == ("model_not_found", "model")
    assert found["numbers"]["code"] == "numerical_error"
    assert all(error["request_id"] for error in found.values())


def test_conflict_is_not_tried_again(faults: Findings) -> None:
    assert faults["conflict_is_final"] == {"class": "ConflictError", "tries": []}


def test_model_is_deleted_and_then_unknown(faults: Findings) -> None:
    found = faults["deleting"]
    assert (found["onboarded"], found["found"]) == (201, "acme/spare")
    assert found["deleted"] == {"id": "acme/spare", "object": "model", "deleted": True}
    assert (found["then"]["class"], found["then"]["code"]) == ("NotFoundError", "model_not_found")


def test_full_server_is_tried_again_when_it_says(faults: Findings) -> None:
    found = faults["full_server"]
    assert (found["refused"]["class"], found["refused"]["code"]) == ("RateLimitError", "queue_full")
    wait = found["refused"]["headers"]["retry-after"]
    assert f" in {int(wait):f} seconds" in found["tries"][0]
    assert found["answer"] == "hi"


def test_dead_engine_breaks_its_stream_and_is_back_for_who_tries_again(faults: Findings) -> None:
    found = faults["dead_engine"]
    assert found["seen"]
    assert (found["broken"]["class"], found["broken"]["code"]) == ("APIError", "engine_failure")
    assert (found["refused"]["class"], found["refused"]["status"]) == ("InternalServerError", 503)
    wait = int(found["refused"]["headers"]["retry-after"])
    assert f" in {wait:f} seconds" in found["tries"][0]
    assert found["answer"] == "hi"


def test_client_that_gives_up_leaves_nothing_running(faults: Findings, echoing: LiveServer) -> None:
    assert faults["impatience"]["class"] == "APITimeoutError"
    line = f'linker_num_requests_running{{model="{DONOR}"}}'
    echoing.until(lambda: echoing.metric(line) == 0)


def test_headers_name_the_request_and_the_stream(faults: Findings) -> None:
    found = faults["headers"]
    assert found["text"] == "hi"
    assert found["whole"]["x-request-id"] == "mine-1"
    assert found["whole"]["content-type"] == "application/json"
    assert found["stream"]["content-type"].startswith("text/event-stream")
    assert found["last_lines"] == ["", "data: [DONE]", ""]


def test_keys_open_what_they_are_for(faults: Findings) -> None:
    found = faults["keys"]
    assert found["good"] == "hi"
    said = {
        name: (found[name]["class"], found[name]["status"], found[name]["code"])
        for name in ("stranger", "not_for_clients", "too_fast")
    }
    assert said == {
        "stranger": ("AuthenticationError", 401, "invalid_api_key"),
        "not_for_clients": ("PermissionDeniedError", 403, "permission_denied"),
        "too_fast": ("RateLimitError", 429, "rate_limit_exceeded"),
    }
    assert 1 <= int(found["too_fast"]["headers"]["retry-after"]) <= 120
    assert found["stranger"]["headers"]["www-authenticate"] == "Bearer"
