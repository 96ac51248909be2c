"""Every parameter that shapes an answer does so on the real engine, through both routes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from tests.clients.programs.scenarios import DONOR, VARIANT
from tests.server.live import LiveServer, live_server
from tests.tiny import SPECIAL, make_checkpoint

PROMPT = "Once upon a time"
PLAIN: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
WARM: dict[str, Any] = {**PLAIN, "temperature": 1, "seed": 5}
EOS_TOKEN, A_TOKEN, B_TOKEN = 2, 67, 68


def ids(server: LiveServer, route: str, **more: Any) -> list[int]:
    """Returns an answer's tokens."""
    tokens = choice_of(server, route, return_token_ids=True, **more)["token_ids"]
    assert isinstance(tokens, list)
    return tokens


def choice_of(server: LiveServer, route: str, **more: Any) -> dict[str, Any]:
    if route == "chat":
        response = server.chat(VARIANT, PROMPT, **more)
    else:
        response = server.complete(VARIANT, PROMPT, **more)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert isinstance(choice, dict)
    return choice


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.fixture(params=["chat", "completions"])
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A model whose tokenizer begins texts with a special token, on the fake engine."""
    path = make_checkpoint(tmp_path_factory.mktemp("marked") / "model")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    with live_server(tmp_path_factory.mktemp("state"), models={DONOR: path}) as live:
        live.until_ready()
        yield live


def test_temperature_0_is_greedy_and_seeds_make_samples_repeatable(
    answering: LiveServer, route: str
) -> None:
    greedy = ids(answering, route, **PLAIN)
    assert ids(answering, route, **PLAIN) == greedy
    warm = ids(answering, route, **WARM)
    assert ids(answering, route, **WARM) == warm != greedy
    assert ids(answering, route, **(WARM | {"seed": 6})) != warm


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_top_k_top_p_and_min_p_leave_the_likeliest(
    answering: LiveServer, route: str, narrow: dict[str, Any]
) -> None:
    assert ids(answering, route, **WARM, **narrow) == ids(answering, route, **PLAIN)


@pytest.mark.parametrize(
    "penalty",
    [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 100.0}],
    ids=str,
)
def test_frequency_presence_and_repetition_penalty_bring_other_tokens(
    answering: LiveServer, route: str, penalty: dict[str, Any]
) -> None:
    allowed = {"allowed_token_ids": list(range(60, 90))}
    plain = ids(answering, route, **PLAIN, **allowed)
    varied = ids(answering, route, **PLAIN, **allowed, **penalty)
    assert len(set(varied)) > len(set(plain))


def test_logit_bias_forces_and_bans_tokens(answering: LiveServer, route: str) -> None:
    forced = ids(answering, route, **PLAIN, logit_bias={str(A_TOKEN): 100})
    assert set(forced) == {A_TOKEN}
    banned = ids(
        answering, route, **PLAIN, logit_bias={str(A_TOKEN): 100, str(B_TOKEN): 100},
        bad_words=["a"],
    )  # fmt: skip
    assert set(banned) == {B_TOKEN}


def test_allowed_token_ids_are_the_only_ones(answering: LiveServer, route: str) -> None:
    tokens = ids(answering, route, **WARM, allowed_token_ids=[A_TOKEN, B_TOKEN])
    assert set(tokens) == {A_TOKEN, B_TOKEN}


def test_stop_ends_before_its_text_and_include_stop_str_in_output_keeps_it(
    answering: LiveServer, route: str
) -> None:
    bias = {"logit_bias": {str(A_TOKEN): 100}}
    ended = choice_of(answering, route, **PLAIN, **bias, stop=["aaa"])
    assert (text_of(ended), ended["finish_reason"]) == ("", "stop")
    kept = choice_of(answering, route, **PLAIN, **bias, stop="aaa", include_stop_str_in_output=True)
    assert text_of(kept) == "aaa"


def test_stop_token_ids_wait_for_min_tokens(answering: LiveServer, route: str) -> None:
    more: dict[str, Any] = {"logit_bias": {str(A_TOKEN): 100}, "stop_token_ids": [A_TOKEN]}
    assert ids(answering, route, **PLAIN, **more) == [A_TOKEN]
    later = ids(answering, route, **PLAIN, **more, min_tokens=3)
    assert len(later) >= 3
    assert A_TOKEN not in later[:3]


def test_ignore_eos_goes_on_to_max_tokens(answering: LiveServer, route: str) -> None:
    bias = {"logit_bias": {str(EOS_TOKEN): 100}}
    ended = choice_of(answering, route, temperature=0, max_tokens=5, **bias)
    assert ended["finish_reason"] == "stop"
    on = choice_of(answering, route, **(PLAIN | {"max_tokens": 5}), **bias)
    assert (on["finish_reason"], text_of(on)) == ("length", "")
    seen = choice_of(
        answering, route, **(PLAIN | {"max_tokens": 2}), **bias, skip_special_tokens=False
    )
    assert text_of(seen) == SPECIAL[EOS_TOKEN] * 2


def test_max_completion_tokens_wins_over_max_tokens(answering: LiveServer) -> None:
    tokens = ids(answering, "chat", **PLAIN, max_completion_tokens=3)
    assert len(tokens) == 3


def test_n_choices_of_a_sample_differ_and_those_of_a_greedy_answer_do_not(
    answering: LiveServer, route: str
) -> None:
    def choices(**more: Any) -> set[str]:
        ask = answering.chat if route == "chat" else answering.complete
        answer = ask(VARIANT, PROMPT, n=3, **more).json()
        return {text_of(choice) for choice in answer["choices"]}

    assert len(choices(**WARM)) == 3
    assert len(choices(**PLAIN)) == 1


@pytest.mark.parametrize(
    ("constraint", "answers"),
    [
        ({"structured_outputs": {"choice": ["left", "right"]}}, ["left", "right"]),
        ({"structured_outputs": {"regex": "(ab){2}"}}, ["abab"]),
        ({"structured_outputs": {"json": {"const": 7}}}, ["7"]),
        ({"structured_outputs": {"grammar": 'root ::= "x" "y"'}}, ["xy"]),
    ],
    ids=str,
)
def test_structured_outputs_bind_the_answer(
    answering: LiveServer, route: str, constraint: dict[str, Any], answers: list[str]
) -> None:
    choice = choice_of(answering, route, temperature=0, max_tokens=24, **constraint)
    assert text_of(choice).strip() in answers
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("strict", [True, False, None])
def test_response_format_binds_the_answer_to_its_schema(
    answering: LiveServer, route: str, strict: bool | None
) -> None:
    schema = {"enum": ["one", "two"]}
    asked = {
        "type": "json_schema",
        "json_schema": {"name": "n", "description": "d", "schema": schema, "strict": strict},
    }
    choice = choice_of(answering, route, temperature=0, max_tokens=24, response_format=asked)
    assert json.loads(text_of(choice)) in ("one", "two")


def test_model_that_loves_white_space_still_ends_its_json(
    answering: LiveServer, route: str
) -> None:
    tokenizer = answering.served(VARIANT).text.tokenizer
    blanks = {
        token
        for text in (" ", "\n", "\t", "\r")
        for token in tokenizer.encode(text, add_special_tokens=False)
    }
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    bias = {str(token): 100 for token in blanks}
    choice = choice_of(
        answering, route, temperature=0, max_tokens=100, logit_bias=bias, response_format=asked
    )
    assert choice["finish_reason"] == "stop"
    assert json.loads(text_of(choice)).keys() == {"ok"}


def test_add_special_tokens_is_true_of_completions_and_false_of_chats(marked: LiveServer) -> None:
    def num_prompt(ask: Any, **more: Any) -> int:
        return int(ask(DONOR, "abc", max_tokens=1, **more).json()["usage"]["prompt_tokens"])

    for ask, default in ((marked.complete, True), (marked.chat, False)):
        without = num_prompt(ask, add_special_tokens=False)
        assert num_prompt(ask, add_special_tokens=True) == without + 1
        assert num_prompt(ask) == without + default


def test_add_generation_prompt_is_left_out_when_false(answering: LiveServer) -> None:
    def prompt(**more: Any) -> str:
        answer = answering.chat(VARIANT, "hi", max_tokens=1, return_token_ids=True, **more).json()
        tokenizer = answering.served(VARIANT).text.tokenizer
        return tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)

    begins = "<|im_start|>assistant\n"
    assert prompt().endswith(begins)
    assert prompt() == prompt(add_generation_prompt=False) + begins


def test_model_names_who_answers(answering: LiveServer) -> None:
    answers = [answering.chat(model, **PLAIN).json() for model in (DONOR, VARIANT)]
    assert [answer["model"] for answer in answers] == [DONOR, VARIANT]
    texts = {text_of(answer["choices"][0]) for answer in answers}
    assert len(texts) == 2


@pytest.mark.parametrize("field", ["user", "safety_identifier", "prompt_cache_key"])
def test_user_safety_identifier_and_prompt_cache_key_change_no_answer(
    answering: LiveServer, field: str
) -> None:
    routes = ["chat", "completions"] if field == "user" else ["chat"]
    for route in routes:
        assert ids(answering, route, **WARM, **{field: "ann"}) == ids(answering, route, **WARM)


def test_obfuscation_can_only_be_declined(marked: LiveServer) -> None:
    def status(include_obfuscation: bool) -> int:
        options = {"include_obfuscation": include_obfuscation}
        return marked.chat(DONOR, stream=True, stream_options=options).status_code

    assert (status(False), status(True)) == (200, 400)


def test_answer_goes_back_as_it_came(answering: LiveServer) -> None:
    """Clients send the whole message of an answer back, with all that is null in it."""
    message = answering.chat(VARIANT, PROMPT, **PLAIN).json()["choices"][0]["message"]
    nothing = {"refusal": None, "tool_calls": None, "function_call": None, "audio": None}
    dialogue = [
        {"role": "user", "content": PROMPT},
        {**nothing, **message},
        {"role": "user", "content": [{"type": "text", "text": "And then?"}], "name": "ann"},
    ]
    body = {"model": VARIANT, "messages": dialogue, **PLAIN}
    answer = answering.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    longer = answer.json()["usage"]["prompt_tokens"]
    assert longer > answering.chat(VARIANT, PROMPT, **PLAIN).json()["usage"]["prompt_tokens"]
    spoken = {**body, "messages": [*dialogue, {"role": "assistant", "audio": {"id": "a"}}]}
    assert answering.client.post("/v1/chat/completions", json=spoken).status_code == 400


@pytest.mark.parametrize(
    ("field", "neutral"),
    [("chat_template", None), ("media_io_kwargs", {}), ("mm_processor_kwargs", {})],
)
def test_tokenizer_refuses_what_it_cannot_honour(
    marked: LiveServer, field: str, neutral: object
) -> None:
    body = {"model": DONOR, "messages": [{"role": "user", "content": "hi"}]}
    assert marked.client.post("/tokenize", json={**body, field: neutral}).status_code == 200
    refused = marked.client.post("/tokenize", json={**body, field: {"a": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


def test_streams_ask_not_to_be_kept_back(marked: LiveServer) -> None:
    headers = marked.chat(DONOR, stream=True, max_tokens=2).headers
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"
    assert headers["Transfer-Encoding"] == "chunked"
    assert headers["Date"]
    assert "Content-Length" not in headers
    assert marked.chat(DONOR, max_tokens=2).headers["Content-Length"]
