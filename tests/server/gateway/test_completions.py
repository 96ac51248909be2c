from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.fake_engine import MAX_MODEL_LEN
from tests.server.live import LiveServer


def text_of(server: LiveServer, prompt: object, **more: Any) -> list[str]:
    response = server.complete("base", prompt, **more)
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def test_completion_of_a_text(server: LiveServer) -> None:
    answer = server.complete("base", "abc", max_tokens=5).json()
    assert answer["object"] == "text_completion"
    choice = {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    assert answer["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip


def test_completion_has_sixteen_tokens_when_nothing_is_said(server: LiveServer) -> None:
    assert text_of(server, "a") == ["a" * 16]


def test_completion_default_length_is_cut_to_the_context(server: LiveServer) -> None:
    answer = server.complete("base", "a" * (MAX_MODEL_LEN - 4)).json()
    assert answer["usage"]["completion_tokens"] == 4


def test_choices_are_prompt_major(server: LiveServer) -> None:
    assert text_of(server, ["ab", "cd"], n=2, max_tokens=2) == ["ab", "ab", "cd", "cd"]


def test_prompt_as_token_ids(server: LiveServer) -> None:
    ids = server.services.catalog.models()[0].text.tokenizer.encode("xy", add_special_tokens=False)
    assert text_of(server, ids, max_tokens=2) == ["xy"]
    assert text_of(server, [ids, ids[::-1]], max_tokens=2) == ["xy", "yx"]


def test_stop_token_ids_end_the_answer_without_their_text(server: LiveServer) -> None:
    ids = server.services.catalog.models()[0].text.tokenizer.encode("xyz", add_special_tokens=False)
    answer = server.complete("base", ids, stop_token_ids=[ids[2]]).json()
    assert answer["choices"][0]["text"] == "xy"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_end_of_sequence_ends_unless_ignored(server: LiveServer) -> None:
    assert text_of(server, [50, 2], max_tokens=3, ignore_eos=False) == [text_of(server, [50])[0][0]]
    ignored = server.complete("base", [50, 2], max_tokens=3, ignore_eos=True).json()
    assert ignored["choices"][0]["finish_reason"] == "length"


def test_special_tokens_appear_when_asked_for(server: LiveServer) -> None:
    more = {"max_tokens": 2, "ignore_eos": True}
    assert text_of(server, [1, 2], **more) == [""]
    assert text_of(server, [1, 2], skip_special_tokens=False, **more) == ["<|im_start|><|im_end|>"]


def test_logprobs_have_tokens_offsets_and_the_chosen_token(server: LiveServer) -> None:
    answer = server.complete("base", "ab", max_tokens=3, logprobs=1).json()
    record = answer["choices"][0]["logprobs"]
    assert record["tokens"] == ["a", "b", "a"]
    assert record["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert record["text_offset"] == [0, 1, 2]
    assert record["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}, {"a": -0.5}]


def test_stream_pieces_add_up_and_end_with_done(server: LiveServer) -> None:
    more = {"stream": True, "max_tokens": 6, "stream_options": {"include_usage": True}}
    blocks = server.complete("base", "äö", **more).text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "äöä"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_stop_as_empty_list_is_accepted(server: LiveServer) -> None:
    assert text_of(server, "ab", stop=[], max_tokens=2) == ["ab"]


def test_token_ids_are_returned_on_request(server: LiveServer) -> None:
    ids = server.services.catalog.models()[0].text.tokenizer.encode("xyz", add_special_tokens=False)
    more = {"max_tokens": 3, "stop_token_ids": [ids[2]], "return_token_ids": True}
    choice = server.complete("base", ids, **more).json()["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("xy", ids)
    assert choice["prompt_token_ids"] == ids
    stream = server.complete("base", ids, stream=True, **more).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in stream if line.startswith("data: {")]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == ids
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [ids, None, None]


def test_echo_puts_the_prompt_before_every_choice(server: LiveServer) -> None:
    assert text_of(server, ["ab", "cd"], n=2, max_tokens=1, echo=True) == [
        "aba", "aba", "cdc", "cdc",
    ]  # fmt: skip
    assert text_of(server, [67, 68], max_tokens=1, echo=True) == ["aba"]


def test_echo_of_token_ids_shows_special_tokens_when_asked_for(server: LiveServer) -> None:
    more: dict[str, Any] = {"max_tokens": 1, "echo": True, "ignore_eos": True}
    assert text_of(server, [67, 1], **more) == ["aa"]
    assert text_of(server, [67, 1], skip_special_tokens=False, **more) == ["a<|im_start|>a"]


def test_echo_with_logprobs_has_the_prompt_and_the_answer(server: LiveServer) -> None:
    answer = server.complete("base", [67, 68, 69], max_tokens=1, logprobs=1, echo=True).json()
    record = answer["choices"][0]["logprobs"]
    seventh = server.services.catalog.models()[0].text.tokenizer.token_text(7)
    assert record == {
        "tokens": ["a", "b", "c", "a"],
        "token_logprobs": [None, -1.0, -2.0, -0.5],
        "top_logprobs": [None, {seventh: -0.5, "b": -1.0}, {seventh: -0.5, "c": -2.0}, {"a": -0.5}],
        "text_offset": [0, 1, 2, 3],
    }


def test_echo_ends_with_the_generated_token_even_if_it_ends_the_answer(server: LiveServer) -> None:
    answer = server.complete("base", [2, 67], max_tokens=1, logprobs=1, echo=True).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["<|im_end|>", "a", "<|im_end|>"]


def test_echo_without_an_answer_returns_the_prompt_alone(server: LiveServer) -> None:
    answer = server.complete("base", "abc", max_tokens=0, logprobs=0, echo=True).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert answer["usage"]["completion_tokens"] == 0
    assert text_of(server, "abc", max_tokens=0, echo=True) == ["abc"]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_stream_with_echo_says_what_the_whole_answer_says(
    server: LiveServer, max_tokens: int
) -> None:
    more: dict[str, Any] = {"max_tokens": max_tokens, "echo": True, "logprobs": 1, "n": 2}
    whole = server.complete("base", "äbc", **more).json()["choices"]
    events = server.complete("base", "äbc", stream=True, **more).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in events if line.startswith("data: {")]
    for choice in whole:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for chunk in mine for v in chunk["logprobs"][name]] == values
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_prompt_logprobs_have_ranks_and_texts(server: LiveServer) -> None:
    answer = server.complete("base", [67, 68], max_tokens=1, prompt_logprobs=1).json()
    choice = answer["choices"][0]
    assert choice["text"] == "a"
    assert choice["logprobs"] is None
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["68"] == {"logprob": -1.0, "rank": 2, "decoded_token": "b"}
    assert second["7"]["rank"] == 1
    assert list(second) == ["68", "7"]


def test_prompt_logprobs_and_echo_report_as_many_as_each_asks_for(server: LiveServer) -> None:
    more: dict[str, Any] = {"prompt_logprobs": 0, "logprobs": 1, "echo": True, "max_tokens": 1}
    choice = server.complete("base", [67, 68], **more).json()["choices"][0]
    assert list(choice["prompt_logprobs"][1]) == ["68"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2


def test_prompt_is_truncated_to_its_end(server: LiveServer) -> None:
    more: dict[str, Any] = {"max_tokens": 2, "echo": True}
    assert text_of(server, "abcdef", truncate_prompt_tokens=2, **more) == ["efef"]
    assert text_of(server, "ab", truncate_prompt_tokens=9, **more) == ["abab"]
    fitting = server.complete("base", "a" * 500, truncate_prompt_tokens=-1, max_tokens=3).json()
    assert fitting["usage"]["total_tokens"] == MAX_MODEL_LEN
    fitting = server.complete("base", "a" * 500, truncate_prompt_tokens=-1).json()
    assert fitting["usage"]["completion_tokens"] == 16


def test_usage_counts_cached_tokens_once_per_prompt(server: LiveServer) -> None:
    usage = server.complete("base", ["abcd", "ab"], n=3, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == 6
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
