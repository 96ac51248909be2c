from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import MAX_MODEL_LEN
from tests.server.live import LiveServer, live_server
from tests.templates import compiled, rendered
from tests.tiny import CHATML

HELLO = [{"role": "user", "content": "Hello"}]


def tokenized(server: LiveServer, path: str = "/tokenize", **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert response.status_code == 200, response.text
    record: dict[str, Any] = response.json()
    return record


def error(response: httpx.Response) -> dict[str, Any]:
    record: dict[str, Any] = response.json()["error"]
    return record


def test_tokens_of_a_text_are_the_models(server: LiveServer) -> None:
    ids = server.served("near").text.tokenizer.encode("Hello there", add_special_tokens=True)
    assert tokenized(server, model="near", prompt="Hello there") == {
        "count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None,
    }  # fmt: skip


def test_token_texts_are_as_the_vocabulary_spells_them(server: LiveServer) -> None:
    answer = tokenized(server, prompt="a b<|im_end|>", return_token_strs=True)
    assert "".join(answer["token_strs"]) == "aĠb<|im_end|>"
    assert len(answer["token_strs"]) == answer["count"]


def test_tokens_of_a_dialogue_are_those_of_its_rendering(server: LiveServer) -> None:
    tokenizer = server.served("base").text.tokenizer
    for prompt in (True, False):
        text = rendered(compiled(CHATML), HELLO, prompt=prompt)
        answer = tokenized(server, model="base", messages=HELLO, add_generation_prompt=prompt)
        assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=False)


def test_tokens_of_a_dialogue_are_those_that_chat_counts(server: LiveServer) -> None:
    usage = server.chat("base", "How many?", max_tokens=1).json()["usage"]
    messages = [{"role": "user", "content": "How many?"}]
    assert tokenized(server, messages=messages)["count"] == usage["prompt_tokens"]


def test_detokenize_is_the_way_back(server: LiveServer) -> None:
    text = "Ünïcödé 🌍 <|im_start|>user"
    ids = tokenized(server, prompt=text)["tokens"]
    assert tokenized(server, "/detokenize", tokens=ids) == {"prompt": text}
    assert tokenized(server, "/detokenize", tokens=[]) == {"prompt": ""}


def test_without_a_model_the_first_of_the_list_is_meant(server: LiveServer) -> None:
    first = server.client.get("/v1/models").json()["data"][0]["id"]
    assert server.client.get("/tokenizer_info").json()["model"] == first


def test_tokenizer_info_is_what_prompts_are_built_from(server: LiveServer) -> None:
    info = server.client.get("/m/near/tokenizer_info").json()
    assert info == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model": "near", "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": None, "unk_token": None,
        "model_max_length": MAX_MODEL_LEN, "max_model_len": MAX_MODEL_LEN,
        "chat_template": CHATML,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [2**31]}, "tokens"),
        ("/detokenize", {"tokens": [10**18]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0"),
    ],
)
def test_bad_bodies_are_refused_by_field(
    server: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    response = server.client.post(path, json=body)
    assert (response.status_code, error(response)["param"]) == (400, param), response.text


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_unknown_model_is_not_found(server: LiveServer, path: str) -> None:
    body = {"model": "nobody", "prompt": "a", "tokens": [1]}
    response = server.client.post(path, json=body)
    assert (response.status_code, error(response)["code"]) == (404, "model_not_found")


def test_unloaded_model_is_loaded_only_if_its_tokenizer_is_forgotten(
    family: Path, tmp_path: Path
) -> None:
    models = {"base": family / "base", "near": family / "near"}
    with live_server(tmp_path, models=models, root=family) as live:
        live.until_ready()
        expected = tokenized(live, model="near", prompt="Hello there")
        assert live.client.post("/models/unload", json={"model": "near"}).status_code == 200
        assert tokenized(live, model="near", prompt="Hello there") == expected
        assert live.services.catalog.get("near") is None
        live.services.catalog.retract("near")
        assert tokenized(live, model="near", prompt="Hello there") == expected
        assert live.services.catalog.get("near") is not None
