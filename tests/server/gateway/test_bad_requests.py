from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from linker_core.errors import InvalidRequestError
from server.gateway.schemas.operators import ChangeBody, FitBody, LoadBody
from server.gateway.schemas.parsing import parse_request
from server.gateway.schemas.scores import ScoresBody
from server.gateway.schemas.tokenization import DetokenizeBody
from tests.server.fake_engine import MAX_MODEL_LEN, Fault
from tests.server.live import LiveServer

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def error_of(server: LiveServer, status: int, path: str = CHAT, **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert isinstance(error, dict)
    return error


def test_unknown_model_is_404(server: LiveServer) -> None:
    error = error_of(server, 404, model="nobody", messages=HI)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == (
        "The model 'nobody' does not exist. GET /v1/models lists those that do."
    )


@pytest.mark.parametrize("name", ["bose", "Base", "bas"])
def test_unknown_model_is_told_the_name_that_is_close(server: LiveServer, name: str) -> None:
    error = error_of(server, 404, model=name, messages=HI)
    assert "Is 'base' meant?" in error["message"]


@pytest.mark.parametrize("more", [{"max_tokens": MAX_MODEL_LEN}, {}])
def test_too_long_is_400_with_the_words_clients_look_for(
    server: LiveServer, more: dict[str, Any]
) -> None:
    content = "hi" if more else "x" * MAX_MODEL_LEN
    messages = [{"role": "user", "content": content}]
    error = error_of(server, 400, model="base", messages=messages, **more)
    assert error["code"] == "context_length_exceeded"
    said = f"This model's maximum context length is {MAX_MODEL_LEN} tokens"
    assert said in error["message"]
    assert "context_length_exceeded" in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_too_long_an_answer_names_the_field_that_asks_for_it(
    server: LiveServer, field: str
) -> None:
    more: dict[str, Any] = {field: MAX_MODEL_LEN}
    assert error_of(server, 400, model="base", messages=HI, **more)["param"] == field


def test_too_long_is_told_before_a_stream_begins(server: LiveServer) -> None:
    error_of(server, 400, model="base", messages=HI, max_tokens=MAX_MODEL_LEN, stream=True)


@pytest.mark.parametrize("field", ["logit_bias", "chat_template_kwargs", "structured_outputs"])
def test_objects_are_counted_before_their_entries_are_looked_at(
    server: LiveServer, field: str
) -> None:
    body: dict[str, Any] = {field: {f"x{number}": [] for number in range(2000)}}
    error = error_of(server, 400, model="base", messages=HI, **body)
    assert error["param"] == field
    assert "these are 2000" in error["message"]


def test_long_lists_are_left_at_their_first_fault() -> None:
    with pytest.raises(ValidationError) as caught:
        DetokenizeBody.model_validate({"tokens": [-1] * 1000})
    assert caught.value.error_count() == 1


_MANY: dict[str, Any] = {f"x{number}": [] for number in range(2000)}
_SCORES = {"model": "m", "variant_mode": "planned", "harness": "h"}


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChangeBody, {"pin": True, **_MANY}, "x0"),
        (LoadBody, {**_MANY, "model": "m"}, "x0"),
        (FitBody, {"models": [{"source": "s", **_MANY}], "budget_bytes": 1}, "models.0.x0"),
        (FitBody, {"models": [{}] * 2000, "budget_bytes": 1}, "models.0.source"),
        (ScoresBody, {**_SCORES, "tasks": _MANY}, "tasks"),
        (ScoresBody, {**_SCORES, "tasks": {"a": {"metrics": _MANY}}}, "tasks.a.metrics"),
        (ScoresBody, {**_SCORES, "tasks": {"a": {"metrics": {"b": 1.0}, **_MANY}}}, "tasks.a.x0"),
    ],
)
def test_objects_of_operators_are_left_at_their_first_fault(
    kind: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    with pytest.raises(ValidationError) as faults:
        kind.model_validate(body)
    assert faults.value.error_count() == 1
    with pytest.raises(InvalidRequestError) as caught:
        parse_request(kind, body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"), ("temperature", True), ("temperature", -1), ("top_p", 0),
        ("top_p", 1.5), ("top_k", -2), ("min_p", 2), ("n", 9), ("n", 0), ("max_tokens", 0),
        ("max_tokens", 1.5), ("stop", [""]), ("stop", ["a"] * 17), ("stop", 3), ("seed", 2**63),
        ("frequency_penalty", 3), ("repetition_penalty", 0), ("logit_bias", {"x": 1}),
        ("logit_bias", {"512": 1}), ("logit_bias", {"1": 101}), ("stop_token_ids", [512]),
        ("stop_token_ids", [-1]), ("top_logprobs", 21), ("stream", "yes"), ("messages", []),
        ("messages", "hi"), ("min_tokens", -1), ("model", 3), ("priority", 2**31),
        ("priority", 1.0), ("priority", True), ("cache_salt", ""), ("cache_salt", "s" * 257),
        ("cache_salt", "a\nb"), ("cache_salt", "a\x00"), ("cache_salt", "\u202e"),
        ("allowed_token_ids", []), ("allowed_token_ids", [512]), ("allowed_token_ids", [-1]),
        ("bad_words", [""]), ("bad_words", ["a"] * 257), ("bad_words", ["a" * 257]),
        ("bad_words", "a"), ("prompt_logprobs", 21), ("prompt_logprobs", -1),
        ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", MAX_MODEL_LEN + 1),
        ("truncate_prompt_tokens", -2), ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        ("response_format", {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}),
        ("structured_outputs", {}), ("structured_outputs", {"regex": "a", "choice": ["a"]}),
        ("structured_outputs", {"choice": []}), ("structured_outputs", {"choice": [""]}),
        ("structured_outputs", {"regex": ""}), ("structured_outputs", {"regex": "a" * 65537}),
        ("structured_outputs", {"regex": "a\\"}), ("structured_outputs", {"regex": "\\\\\\"}),
        ("structured_outputs", {"json": "{"}), ("structured_outputs", {"json": "[]"}),
        ("structured_outputs", {"grammar": "root ::= ("}), ("structured_outputs", {"ebnf": "a"}),
        ("structured_outputs", {"regex": "a", "disable_any_whitespace": True}),
    ],
)  # fmt: skip
def test_field_out_of_bounds_is_400_and_named(server: LiveServer, field: str, value: Any) -> None:
    error = error_of(server, 400, **{"model": "base", "messages": HI, field: value})
    assert error["code"] == "invalid_request_error"
    assert error["param"].split(".")[0] == field


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"content": "hi"}], "messages.0.role"),
        ([{"role": "user", "content": 3}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages.0.tool_calls.0.function"),
    ],
)
def test_fault_inside_a_message_is_named_by_its_path(
    server: LiveServer, messages: Any, param: str
) -> None:
    assert error_of(server, 400, model="base", messages=messages)["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]), ("function_call", {"name": "f"}), ("store", True),
        ("chat_template", "{{ 1 }}"), ("metadata", {"a": "b"}), ("modalities", ["audio"]),
        ("audio", {"voice": "a"}), ("prediction", {"type": "content"}), ("verbosity", "high"),
        ("service_tier", "priority"), ("reasoning_effort", "low"), ("web_search_options", {}),
        ("moderation", {"model": "m"}), ("documents", [{"text": "a"}]), ("echo", True),
        ("prompt_cache_retention", "24h"), ("prompt_cache_options", {"mode": "explicit"}),
        ("guided_json", {}), ("guided_regex", "a"), ("guided_choice", ["a"]),
        ("guided_grammar", "a"), ("guided_decoding_backend", "auto"), ("structural_tag", "a"),
        ("guided_whitespace_pattern", " "), ("use_beam_search", True), ("length_penalty", 2),
        ("length_penalty", True), ("early_stopping", True), ("logits_processors", ["a"]),
        ("logprob_token_ids", [1]), ("repetition_detection", {"a": 1}), ("request_id", "a"),
        ("return_prompt_text", True), ("return_tokens_as_token_ids", True),
        ("stream_interval", 2), ("truncation_side", "right"), ("include_reasoning", False),
        ("thinking_token_budget", 1), ("vllm_xargs", {"a": 1}), ("kv_transfer_params", {"a": 1}),
        ("ec_transfer_params", {"a": 1}), ("media_io_kwargs", {"a": {}}),
        ("mm_processor_kwargs", {"a": 1}), ("spaces_between_special_tokens", False),
    ],
)  # fmt: skip
def test_known_field_that_is_not_honoured_is_400(
    server: LiveServer, field: str, value: Any
) -> None:
    error = error_of(server, 400, **{"model": "base", "messages": HI, field: value})
    assert error["param"] == field


def test_known_field_at_its_neutral_value_is_accepted(server: LiveServer) -> None:
    neutral: dict[str, Any] = {
        "response_format": {"type": "text"}, "bad_words": [],
        "parallel_tool_calls": True, "user": "u", "variant_mode": "planned", "top_k": -1,
        "store": False, "metadata": {}, "service_tier": "auto", "modalities": ["text"],
        "verbosity": "medium", "functions": [], "function_call": "auto", "length_penalty": 1.0,
        "prompt_cache_retention": "in_memory", "prompt_cache_options": {"mode": "implicit"},
        "safety_identifier": "s", "prompt_cache_key": "k", "reasoning_effort": None,
        "tool_choice": "none", "tools": [], "chat_template_kwargs": {}, "logits_processors": [],
        "spaces_between_special_tokens": True, "include_reasoning": True, "truncation_side": "left",
    }  # fmt: skip
    assert server.chat("base", **neutral).status_code == 200


@pytest.mark.parametrize(("field", "value"), [("suffix", "x"), ("best_of", 2)])
def test_completion_field_that_is_not_honoured_is_400(
    server: LiveServer, field: str, value: Any
) -> None:
    body = {"model": "base", "prompt": "a", field: value}
    assert error_of(server, 400, "/v1/completions", **body)["param"] == field


def test_prompt_alone_without_echo_is_400(server: LiveServer) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 0}
    assert error_of(server, 400, "/v1/completions", **body)["param"] == "max_tokens"


def test_prompt_logprobs_in_a_stream_is_400(server: LiveServer) -> None:
    error = error_of(server, 400, model="base", messages=HI, stream=True, prompt_logprobs=1)
    assert error["param"] == "prompt_logprobs"


def test_two_constraints_of_one_answer_is_400(server: LiveServer) -> None:
    both: dict[str, Any] = {
        "response_format": {"type": "json_object"},
        "structured_outputs": {"regex": "a"},
    }
    error = error_of(server, 400, model="base", messages=HI, **both)
    assert error["param"] == "structured_outputs"


@pytest.mark.parametrize(
    ("outputs", "param"),
    [
        ({"choice": ["a" * 1024] * 65}, "structured_outputs.choice"),
        ({"json": {"enum": ["a" * 65536]}}, "structured_outputs.json"),
        ({"json": '{"a": 1, "a": 2}'}, "structured_outputs.json"),
        ({"json": {"x": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}},
         "structured_outputs.json"),
        ({"grammar": "root ::= " + "(" * 30_000}, "structured_outputs.grammar"),
    ],
)  # fmt: skip
def test_constraint_too_large_or_deep_is_400_before_it_is_compiled(
    server: LiveServer, outputs: dict[str, Any], param: str
) -> None:
    error = error_of(server, 400, model="base", messages=HI, structured_outputs=outputs)
    assert error["param"] == param
    assert len(error["message"]) < 400


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [512], [[1], "a"], [-1], {"a": 1}, None])
def test_bad_prompt_is_400(server: LiveServer, prompt: Any) -> None:
    error = error_of(server, 400, "/v1/completions", model="base", prompt=prompt)
    assert error["param"].split(".")[0] == "prompt"


@pytest.mark.parametrize("more", [{}, {"stream": False}, {"stream": None}])
def test_stream_options_without_a_stream_is_400(server: LiveServer, more: dict[str, Any]) -> None:
    options = {"include_usage": True}
    error = error_of(server, 400, model="base", messages=HI, stream_options=options, **more)
    assert error["param"] == "stream_options"
    body = {"model": "base", "prompt": "a", "stream_options": options, **more}
    assert error_of(server, 400, "/v1/completions", **body)["param"] == "stream_options"
    assert server.chat("base", stream_options=None).status_code == 200


def test_min_tokens_above_max_tokens_is_400(server: LiveServer) -> None:
    error = error_of(server, 400, model="base", messages=HI, min_tokens=5, max_tokens=4)
    assert error["param"] == "min_tokens"


def test_unknown_field_is_ignored_with_a_warning_that_names_only_it(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert server.chat("base", "s3cret", api_base="http://s3cret").status_code == 200
    assert "api_base" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"model": NaN}', b'{"a": Infinity}', b'{"a": 1e400}',
        b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b'{"\\ud800": 1}', b"\xef\xbb\xbf{}", b"\xff{}",
        b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", b'{"a": ' + b"[" * 100_000, b"{'a': 1}",
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: str(body[:16]),
)  # fmt: skip
def test_body_that_is_not_plain_json_is_400(server: LiveServer, body: bytes) -> None:
    response = server.client.post(CHAT, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request_error"


def test_body_nested_up_to_the_limit_is_read(server: LiveServer) -> None:
    body = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    response = server.client.post(CHAT, content=body)
    assert response.json()["error"]["param"] == "model"


def test_large_body_is_413_whether_declared_or_not(server: LiveServer) -> None:
    body = b" " * (2 * 1024**2 + 1)
    declared = server.client.post(CHAT, content=body)
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "request_too_large"
    assert "At most 2097152 bytes" in declared.json()["error"]["message"]
    chunked = server.client.post(CHAT, content=iter([body]))
    assert chunked.status_code == 413
    assert chunked.json() == declared.json()


def test_compressed_body_is_415(server: LiveServer) -> None:
    response = server.client.post(CHAT, content=b"x", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("PUT", "/models", 405, "method_not_allowed"),
        ("GET", "/models/jobs/nothing", 404, "job_not_found"),
        ("POST", "/models/jobs/nothing/cancel", 404, "job_not_found"),
        ("GET", "/models/nobody", 404, "model_not_found"),
        ("GET", "/v1/models/no/body", 404, "model_not_found"),
        ("DELETE", "/models/nobody", 404, "model_not_found"),
        ("GET", "/analysis/no/body", 404, "model_not_found"),
        ("POST", "/analysis/base", 405, "method_not_allowed"),
    ],
)
def test_path_and_method_errors_have_the_same_shape(
    server: LiveServer, method: str, path: str, status: int, code: str
) -> None:
    response = server.client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/v1/models/base", "DELETE, GET"),
        ("PUT", "/models/a/b", "DELETE, GET, PATCH"),
        ("DELETE", "/models", "GET, POST"),
        # A model may not have the name, the path may.
        ("POST", "/models/jobs", "DELETE, GET, PATCH"),
        ("POST", "/models/events", "DELETE, GET, PATCH"),
        ("PUT", "/models/load", "DELETE, GET, PATCH, POST"),
        ("PUT", "/models/unload", "DELETE, GET, PATCH, POST"),
        ("PUT", "/models/jobs/x/cancel", "DELETE, GET, PATCH, POST"),
        ("POST", "/analysis", "GET"),
        ("DELETE", "/analysis/base", "GET"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
def test_wrong_method_is_told_every_method_of_the_path(
    server: LiveServer, method: str, path: str, allowed: str
) -> None:
    response = server.client.request(method, path)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)
    assert response.json()["error"]["message"].endswith(f" It takes {allowed}.")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nothing", "/openapi.json"),
        ("/v1/responses", "POST /v1/chat/completions"),
        ("/m/base/v1/responses", "POST /v1/chat/completions"),
        ("/v1/embeddings", "no embeddings"),
    ],
)
def test_unknown_path_is_told_what_there_is(server: LiveServer, path: str, words: str) -> None:
    assert words in error_of(server, 404, path)["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
def test_probes_answer_head_like_get(server: LiveServer, path: str) -> None:
    got, head = server.client.get(path), server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


def test_numerical_error_of_a_sequence_is_500(server: LiveServer) -> None:
    body = {"model": "base", "prompt": [Fault.FAIL]}
    assert error_of(server, 500, "/v1/completions", **body)["code"] == "numerical_error"


def test_failure_before_the_first_token_of_a_stream_has_its_status(server: LiveServer) -> None:
    body = {"model": "base", "prompt": [Fault.FAIL], "stream": True}
    assert error_of(server, 500, "/v1/completions", **body)["code"] == "numerical_error"


def test_rejections_are_counted_by_reason(server: LiveServer) -> None:
    line = 'linker_rejections_total{reason="model_not_found"}'
    before = server.metric(line)
    server.chat("nobody")
    assert server.metric(line) == before + 1


@pytest.mark.parametrize("role", ["asistant", "", 5, None])
def test_role_that_nobody_has_is_400(server: LiveServer, role: object) -> None:
    error = error_of(server, 400, model="base", messages=[{"role": role, "content": "hi"}])
    assert error["param"] == "messages.0.role"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", [{"role": "nobody"}] * 60_000),
        ("messages", HI * 60_000),
        ("messages", [{"role": "user", "content": [{"type": "x"}] * 60_000}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": ""}] * 60_000}]),
        ("allowed_token_ids", [-1] * 200_000),
    ],
)
def test_many_faults_are_told_as_one(server: LiveServer, field: str, value: Any) -> None:
    error = error_of(server, 400, **{"model": "base", "messages": HI, field: value})
    assert error["param"].split(".")[0] == field
    assert len(error["message"]) < 200


@pytest.mark.parametrize("prompt", [[-1] * 300_000, [[]] * 300_000, [[-1] * 1000] * 256])
def test_many_faults_of_a_prompt_are_told_as_one(server: LiveServer, prompt: Any) -> None:
    error = error_of(server, 400, "/v1/completions", model="base", prompt=prompt)
    assert error["param"].split(".")[0] == "prompt"
    assert len(error["message"]) < 200


def test_large_dialogue_is_read(server: LiveServer) -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "tool_calls": [call] * 8}] * 600
    error = error_of(server, 400, model="base", messages=messages)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "more", [{"stream_options": 3}, {"messages": [3]}, {"tools": [3]}, {"logit_bias": 3}]
)
def test_fault_is_told_without_names_of_the_servers_own(
    server: LiveServer, more: dict[str, Any]
) -> None:
    error = error_of(server, 400, **{"model": "base", "messages": HI, **more})
    assert error["message"] == f"{error['param']}: this has to be an object."


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {}, "model: this has to be given."),
        (CHAT, {"model": "base", "messages": []},
         "messages: at least 1 have to be given, and these are 0."),
        (CHAT, {"model": "base", "messages": HI * 5000},
         "messages: at most 2048 are taken, and these are more."),
        (CHAT, {"model": "base", "messages": HI, "n": "2"}, "n: this has to be a whole number."),
        (CHAT, {"model": "base", "messages": HI, "n": 9}, "n: this has to be at most 8."),
        (CHAT, {"model": "base", "messages": HI, "stream": 1},
         "stream: this has to be true or false."),
        (CHAT, {"model": "base", "messages": HI, "structured_outputs": {"ebnf": "a"}},
         "structured_outputs.ebnf: there is no such parameter here."),
        (CHAT, {"model": "base", "messages": HI, "response_format": {"type": "yaml"}},
         "response_format.type: this has to be 'text', 'json_object' or 'json_schema'."),
        ("/models?wait=perhaps", {}, "wait: this has to be true or false."),
    ],
)  # fmt: skip
def test_fault_is_told_in_words_of_our_own(
    server: LiveServer, path: str, body: dict[str, Any], message: str
) -> None:
    assert error_of(server, 400, path, **body)["message"] == message


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"type": "json_schema"}, "needs json_schema: an object with name and schema"),
        ({"type": "json_schema", "json_schema": None}, "needs json_schema"),
        ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "takes no json_schema"),
    ],
)
def test_format_and_its_schema_come_together(
    server: LiveServer, asked: dict[str, Any], words: str
) -> None:
    error = error_of(server, 400, model="base", messages=HI, response_format=asked)
    assert error["param"] == "response_format.json_schema"
    assert words in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "tool", "content": "3"}, "messages.0.tool_call_id"),
        ({"role": "tool", "content": "3", "tool_call_id": None}, "messages.0.tool_call_id"),
    ],
)
def test_message_without_what_its_role_needs_is_400(
    server: LiveServer, message: dict[str, Any], param: str
) -> None:
    error = error_of(server, 400, model="base", messages=[message])
    assert error["param"] == param
    assert error["message"] == f"{param}: a message of role {message['role']} needs it."
