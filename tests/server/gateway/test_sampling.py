"""What a request becomes before it reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.gateway.formats import spaced
from server.gateway.generation import SequenceSpec
from server.gateway.prompts import Lengths, Reports, completion_prompts, sequences, truncated
from server.gateway.schemas.generation import COMPLETION_NEUTRAL, CompletionRequest
from server.gateway.schemas.parsing import parse_request
from tests.server.live import LiveServer


def specs_of(server: LiveServer, **body: Any) -> list[SequenceSpec]:
    given = {"model": "base", "prompt": "ab", **body}
    request = parse_request(CompletionRequest, given, neutral=COMPLETION_NEUTRAL)
    model = server.served("base")
    prompts = [
        truncated(prompt, request, model, max_tokens=None)
        for prompt in completion_prompts(request, model)
    ]
    return sequences(
        request,
        model,
        prompts,
        request_id="r",
        lengths=Lengths(asked=None, default=4),
        reports=Reports(logprobs=None, prompt_logprobs=request.prompt_logprobs),
    )


def test_every_choice_carries_what_schedules_it(server: LiveServer) -> None:
    specs = specs_of(server, n=2, seed=5, priority=-7, cache_salt="tenant")
    assert [(spec.priority, spec.cache_salt) for spec in specs] == [(-7, "tenant")] * 2
    assert [spec.sampling.seed for spec in specs] == [5, 6]


def test_nothing_is_constrained_unless_asked(server: LiveServer) -> None:
    neutral: dict[str, Any] = {
        "bad_words": [],
        "response_format": {"type": "text"},
        "structured_outputs": None,
    }
    for body in ({}, neutral):
        (spec,) = specs_of(server, **body)
        sampling = spec.sampling
        assert sampling.allowed_token_ids is None
        assert sampling.grammar is None
        assert sampling.prompt_logprobs is None
        assert (sampling.bad_words, spec.priority, spec.cache_salt) == ((), 0, "")


def test_model_that_does_not_sample_is_greedy_unless_asked(server: LiveServer) -> None:
    # The file of `tests.tiny` says `do_sample: false` and no more.
    assert server.served("base").text.generation == {"temperature": 0.0}
    (spec,) = specs_of(server)
    (asked,) = specs_of(server, temperature=0.5)
    assert (spec.sampling.temperature, asked.sampling.temperature) == (0.0, 0.5)


def test_allowed_ids_and_prompt_logprobs_reach_the_engine(server: LiveServer) -> None:
    (spec,) = specs_of(server, allowed_token_ids=[3, 4, 4], prompt_logprobs=2)
    assert spec.sampling.allowed_token_ids == frozenset({3, 4})
    assert spec.sampling.prompt_logprobs == 2


@pytest.mark.parametrize("word", ["the", " the"])
def test_bad_word_is_banned_at_the_beginning_and_after_a_space(
    server: LiveServer, word: str
) -> None:
    encode = server.served("base").text.tokenizer.encode
    start = tuple(encode("the", add_special_tokens=False))
    inside = tuple(encode(" the", add_special_tokens=False))
    (spec,) = specs_of(server, bad_words=[word])
    expected = (start,) if inside[-len(start) :] == start else (start, inside)
    assert spec.sampling.bad_words == expected


def test_bad_word_that_is_a_space_is_banned(server: LiveServer) -> None:
    (spec,) = specs_of(server, bad_words=[" "])
    space = tuple(server.served("base").text.tokenizer.encode(" ", add_special_tokens=False))
    assert space in spec.sampling.bad_words


@pytest.mark.parametrize(
    ("body", "param", "schema"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", {"type": "object"}),
        (
            {"response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "strict": True, "schema": {"type": "array"}},
            }},
            "response_format.json_schema.schema", {"type": "array"},
        ),
        ({"structured_outputs": {"json": {"const": None}}}, "structured_outputs.json",
         {"const": None}),
        ({"structured_outputs": {"json": '{"const": null}', "regex": None}},
         "structured_outputs.json", {"const": None}),
    ],
)  # fmt: skip
def test_schemas_become_grammars_that_know_their_field(
    server: LiveServer, body: dict[str, Any], param: str, schema: dict[str, Any]
) -> None:
    (spec,) = specs_of(server, **body)
    assert spec.grammar_param == param
    assert spec.sampling.grammar is not None
    compiled = json.loads(spec.sampling.grammar)["grammars"][0]["json_schema"]
    assert compiled == spaced(schema)


def test_blank_lines_of_a_grammar_go_before_anything_looks_for_its_kind(
    server: LiveServer,
) -> None:
    grammar = "start: a" + "\n \n" * 20_000 + 'a: "x"'
    (spec,) = specs_of(server, structured_outputs={"grammar": grammar})
    assert spec.sampling.grammar == 'start: a\na: "x"'


def test_a_prompt_is_reported_with_its_first_choice_alone(server: LiveServer) -> None:
    specs = specs_of(server, prompt=["ab", "cd"], n=3, prompt_logprobs=2)
    assert [spec.sampling.prompt_logprobs for spec in specs] == [2, None, None] * 2
