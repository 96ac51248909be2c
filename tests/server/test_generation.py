"""What requests ask of an answer, over HTTP, with the real engine."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

PROMPT = "Once upon a time there was"
IDS = [80, 101, 102, 70, 35, 88, 83, 270, 301, 44]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["é", "b"]}},
    "required": ["sure", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real")
    make_checkpoint(root / "base", tie=False)
    make_variant(root / "near", root / "base", scale=0.01)
    return root


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    models = {name: root / name for name in ("base", "near")}
    state = tmp_path_factory.mktemp("state")
    with live_server(state, models=models, root=root, engine_command=None) as live:
        live.until_ready()
        yield live


def choices(server: LiveServer, prompt: object = PROMPT, **more: Any) -> list[Any]:
    response = server.complete("base", prompt, **{**GREEDY, **more})
    assert response.status_code == 200, response.text
    found = response.json()["choices"]
    assert isinstance(found, list)
    return found


def text(server: LiveServer, **more: Any) -> str:
    return str(choices(server, **more)[0]["text"])


def reference(path: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens after each of `ids`, from transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits, dim=-1)


def test_log_likelihoods_as_evaluations_ask_for_them(server: LiveServer, root: Path) -> None:
    more: dict[str, Any] = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234, "stop": []}
    found = choices(server, [IDS, IDS[:4]], **more, ignore_eos=False)
    for choice, ids in zip(found, (IDS, IDS[:4]), strict=True):
        record, expected = choice["logprobs"], reference(root / "base", ids)
        assert len(record["tokens"]) == len(ids) + 1
        assert record["token_logprobs"][0] is None
        assert record["top_logprobs"][0] is None
        for place in range(1, len(ids)):
            row = expected[place - 1]
            said, top = record["token_logprobs"][place], record["top_logprobs"][place]
            assert said == pytest.approx(row[ids[place]].item(), abs=1e-3)
            assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-3)
            assert record["tokens"][place] in top
            assert (said == max(top.values())) == (row.argmax().item() == ids[place])
        assert record["token_logprobs"][-1] == pytest.approx(expected[-1].max().item(), abs=1e-3)


def test_echo_without_an_answer_says_the_same_of_the_prompt(server: LiveServer) -> None:
    more: dict[str, Any] = {"logprobs": 1, "echo": True}
    (alone,) = choices(server, IDS, **more, max_tokens=0)
    (whole,) = choices(server, IDS, **more, max_tokens=1)
    for name, values in alone["logprobs"].items():
        assert values == whole["logprobs"][name][:-1]
    assert whole["text"].startswith(alone["text"])


def test_prompt_logprobs_have_the_ranks_of_the_reference(server: LiveServer, root: Path) -> None:
    (choice,) = choices(server, IDS, max_tokens=1, prompt_logprobs=3)
    expected = reference(root / "base", IDS)
    assert choice["prompt_logprobs"][0] is None
    for place, entry in enumerate(choice["prompt_logprobs"][1:], start=1):
        row = expected[place - 1]
        said = entry[str(IDS[place])]
        assert said["logprob"] == pytest.approx(row[IDS[place]].item(), abs=1e-3)
        assert said["rank"] == 1 + int((row > row[IDS[place]]).sum())
        assert sorted(one["rank"] for one in entry.values())[:3] == [1, 2, 3]


def test_allowed_ids_and_bad_words_bound_the_answer(server: LiveServer) -> None:
    (allowed,) = choices(server, allowed_token_ids=[70, 71], return_token_ids=True)
    assert set(allowed["token_ids"]) <= {70, 71}
    (free,) = choices(server, return_token_ids=True)
    tokenizer = server.served("base").text.tokenizer
    texts = [tokenizer.token_text(token) for token in free["token_ids"]]
    word = next(one for one in texts if one.strip() and "\ufffd" not in one)
    assert word in text(server)
    (banned,) = choices(server, bad_words=[word], return_token_ids=True)
    start = tokenizer.encode(word.lstrip(), add_special_tokens=False)
    taken = banned["token_ids"]
    assert all(taken[at : at + len(start)] != start for at in range(len(taken)))
    assert banned["token_ids"] != free["token_ids"]


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[ab]{3}/é{1,3}x"}, "[ab]{3}/é{1,3}x"),
        ({"choice": ["yes", 'say "no"\n', "😀"]}, '(yes|say "no"\n|😀)'),
        ({"grammar": 'start: "x" "y" "z"'}, "xyz"),
        ({"grammar": 'root ::= "x" [0-9] "z"'}, "x[0-9]z"),
        ({"json": {"type": "boolean"}}, "(true|false)"),
        ({"json": '{"const": "a"}'}, '"a"'),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_answer_follows_its_structure(
    server: LiveServer, outputs: dict[str, Any], pattern: str, temperature: float
) -> None:
    more: dict[str, Any] = {"max_tokens": 60, "temperature": temperature, "seed": 3}
    (choice,) = choices(server, structured_outputs=outputs, ignore_eos=False, **more)
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(pattern, choice["text"])


def test_json_schema_through_the_openai_client(server: LiveServer) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(
                model="near",
                messages=[{"role": "user", "content": "hi"}],
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "reply", "strict": True, "schema": SCHEMA},
                },
                temperature=1,
                seed=5,
                max_tokens=200,
            )
        return answer.choices[0].message.content or ""

    record = json.loads(asyncio.run(ask()))
    assert isinstance(record["sure"], bool)
    assert record["kind"] in ("é", "b")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": 'start: "a'}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"type": "strin"}}}, "structured_outputs.json"),
        (
            {"response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"not": {}}},
            }},
            "response_format.json_schema.schema",
        ),
    ],
)  # fmt: skip
def test_constraint_that_is_none_is_400_and_names_its_field(
    server: LiveServer, asked: dict[str, Any], param: str, stream: bool
) -> None:
    before = text(server)
    response = server.complete("base", PROMPT, stream=stream, **asked)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert text(server) == before


def test_second_prompt_is_found_in_the_cache_under_its_own_salt(server: LiveServer) -> None:
    prompt = "a long prompt that fills pages, " * 3

    def cached(**more: Any) -> int:
        usage = server.complete("base", prompt, **GREEDY, **more).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(cache_salt="one") == 0
    found = cached(cache_salt="one")
    assert 0 < found < len(prompt)
    assert cached(cache_salt="two") == 0
    assert cached(cache_salt="three", n=4) == 0


def test_priority_changes_no_answer(server: LiveServer) -> None:
    assert text(server, priority=-5) == text(server, priority=5) == text(server)


def test_pages_are_free_soon_after_a_client_left(server: LiveServer) -> None:
    body = {"model": "base", "prompt": PROMPT, **GREEDY, "max_tokens": 200, "stream": True}
    left = 'linker_request_success_total{finished_reason="abort",model="base"}'
    before = server.metric(left)
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert next(response.iter_lines()).startswith("data: {")
    server.until(lambda: server.metric(left) == before + 1)
    server.until(lambda: server.metric('linker_num_requests_running{model="base"}') == 0)
    server.until(lambda: server.metric("linker_kv_cache_usage_ratio") == 0)
