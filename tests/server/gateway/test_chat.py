from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from tests.server.fake_engine import MAX_MODEL_LEN, Fault
from tests.server.live import LiveServer

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def events(server: LiveServer, **body: Any) -> list[Any]:
    response = server.chat("base", stream=True, **body)
    assert response.status_code == 200
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    records = [block.removeprefix("data: ") for block in blocks]
    return [record if record == "[DONE]" else json.loads(record) for record in records]


def test_chat_answers_with_text_usage_and_finish_reason(server: LiveServer) -> None:
    answer = server.chat("base").json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "base"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "user\nhi", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    # <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n, answered up to <|im_end|>.
    assert answer["usage"] == {
        "prompt_tokens": 21, "completion_tokens": 9, "total_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 10},
    }  # fmt: skip


def test_chat_stops_at_max_tokens_with_length(server: LiveServer) -> None:
    choice = server.chat("base", max_tokens=4).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("use", "length")


def test_chat_takes_content_as_text_parts(server: LiveServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "base", "messages": [{"role": "user", "content": parts}]}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "user\na\nb"


def test_chat_default_length_is_what_is_left_of_the_context(server: LiveServer) -> None:
    answer = server.chat("base", ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_string_ends_the_answer_before_it(server: LiveServer) -> None:
    choice = server.chat("base", "hello world", stop=["o w"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("user\nhell", "stop")


def test_stop_string_is_kept_when_asked_for(server: LiveServer) -> None:
    more = {"stop": "lo", "include_stop_str_in_output": True}
    choice = server.chat("base", "hello", **more).json()["choices"][0]
    assert choice["message"]["content"] == "user\nhello"


def test_stop_string_aborts_the_sequence_in_the_engine(server: LiveServer) -> None:
    server.chat("base", "xyz", stop="xy", ignore_eos=True)
    line = 'linker_num_requests_running{model="base"}'
    server.until(lambda: server.metric(line) == 0)


def test_several_choices_have_their_index(server: LiveServer) -> None:
    answer = server.chat("base", n=3).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"user\nhi"}
    assert answer["usage"] == {
        "prompt_tokens": 21, "completion_tokens": 27, "total_tokens": 48,
        "prompt_tokens_details": {"cached_tokens": 10},
    }  # fmt: skip


def test_stream_has_the_documented_order_byte_for_byte(server: LiveServer) -> None:
    response = server.chat(
        "base", stream=True, max_tokens=3, stream_options={"include_usage": True}
    )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    head = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    prefix = (
        f'data: {{"id":"{head["id"]}","object":"chat.completion.chunk",'
        f'"created":{head["created"]},"model":"base","choices":['
    )
    quiet = '"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    assert response.text == (
        prefix + '{"index":0,"delta":{"role":"assistant","content":""},' + quiet
        + prefix + '{"index":0,"delta":{"content":"u"},' + quiet
        + prefix + '{"index":0,"delta":{"content":"s"},'
        + '"logprobs":null,"finish_reason":"length"}],"usage":null}\n\n'
        + prefix + '],"usage":{"prompt_tokens":21,"completion_tokens":3,"total_tokens":24,'
        + '"prompt_tokens_details":{"cached_tokens":10}}}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", head["id"])


def test_stream_without_usage_says_nothing_of_it(server: LiveServer) -> None:
    chunks = events(server)
    assert chunks[-1] == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_stream_of_several_choices_ends_each_with_its_reason(server: LiveServer) -> None:
    chunks = [chunk for chunk in events(server, n=2) if chunk != "[DONE]"]
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == "user\nhi"
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
        assert own[-1]["finish_reason"] == "stop"


def test_continuous_usage_grows_with_every_chunk(server: LiveServer) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    chunks = [c for c in events(server, max_tokens=3, stream_options=options) if c != "[DONE]"]
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]


@pytest.mark.parametrize("include", [None, False])
def test_continuous_usage_needs_usage(server: LiveServer, include: bool | None) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include}
    chunks = [c for c in events(server, max_tokens=3, stream_options=options) if c != "[DONE]"]
    assert len(chunks) == 3
    assert all("usage" not in chunk for chunk in chunks)


def test_logprobs_report_token_and_alternatives(server: LiveServer) -> None:
    answer = server.chat("base", max_tokens=2, logprobs=True, top_logprobs=2).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    assert content[1]["token"] == "u"
    assert content[1]["logprob"] == -0.5
    assert content[1]["bytes"] == [117]
    assert [top["logprob"] for top in content[1]["top_logprobs"]] == [-0.5, -1.5]


def test_logprobs_of_a_stream_cover_every_token(server: LiveServer) -> None:
    chunks = [c for c in events(server, logprobs=True) if c != "[DONE]"]
    entries = [c["choices"][0]["logprobs"] for c in chunks]
    assert sum(len(entry["content"]) for entry in entries if entry) == 9


def test_top_logprobs_without_logprobs_is_refused(server: LiveServer) -> None:
    response = server.chat("base", top_logprobs=2)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "top_logprobs"


def test_no_top_logprobs_need_no_logprobs(server: LiveServer) -> None:
    answer = server.chat("base", logprobs=False, top_logprobs=0)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["logprobs"] is None


def test_openai_sdk_reads_an_answer(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(model="near", messages=HI)
    assert answer.choices[0].message.content == "user\nhi"
    assert answer.choices[0].finish_reason == "stop"


def test_openai_sdk_reads_a_stream(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="near",
            messages=HI,
            stream=True,
        )
        chunks = [chunk for chunk in stream if isinstance(chunk, ChatCompletionChunk)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "user\nhi"


def test_async_openai_sdk_reads_an_answer_and_a_stream(server: LiveServer) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            create = client.chat.completions.create
            answer = await create(model="near", messages=HI)
            parts = [
                chunk.choices[0].delta.content or ""
                async for chunk in await create(model="near", messages=HI, stream=True)
            ]
        return answer.choices[0].message.content, "".join(parts)

    assert asyncio.run(ask()) == ("user\nhi", "user\nhi")


def test_async_openai_sdk_leaves_a_stream(server: LiveServer) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.completions.create(
                model="near", prompt=[Fault.MUTE, 50], max_tokens=50, stream=True
            )
            await anext(aiter(stream))
            await stream.close()

    aborted = 'linker_request_success_total{finished_reason="abort",model="near"}'
    before = server.metric(aborted)
    asyncio.run(leave())
    server.until(lambda: server.metric(aborted) == before + 1)


def test_openai_sdk_raises_its_error_for_an_unknown_model(server: LiveServer) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError) as caught,
    ):
        client.chat.completions.create(model="nobody", messages=HI)
    assert caught.value.code == "model_not_found"


def test_token_ids_are_returned_on_request(server: LiveServer) -> None:
    answer = server.chat("base", max_tokens=2, return_token_ids=True).json()
    assert len(answer["choices"][0]["token_ids"]) == 2
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    stream = server.chat("base", max_tokens=2, return_token_ids=True, stream=True).text
    chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert ids == answer["choices"][0]["token_ids"]
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])


def test_prompt_logprobs_stand_beside_the_choices(server: LiveServer) -> None:
    answer = server.chat("base", n=3, max_tokens=1, prompt_logprobs=0).json()
    assert len(answer["choices"]) == 3
    entries = answer["prompt_logprobs"]
    assert len(entries) == 21
    assert entries[:2] == [None, {"87": {"logprob": -1.0, "rank": 2, "decoded_token": "u"}}]


def test_chat_prompt_is_truncated_to_its_end(server: LiveServer) -> None:
    whole = server.chat("base", max_tokens=1, return_token_ids=True).json()["prompt_token_ids"]
    cut = server.chat("base", max_tokens=1, return_token_ids=True, truncate_prompt_tokens=4)
    assert cut.json()["prompt_token_ids"] == whole[-4:]
