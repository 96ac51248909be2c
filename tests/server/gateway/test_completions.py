from __future__ import annotations

import json
from typing import Any

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
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


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
