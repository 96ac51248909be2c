"""Tokenizers and templates of strangers, over HTTP: what they do reaches nobody else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from tests.server.fake_engine import MAX_MODEL_LEN
from tests.server.live import LiveServer, live_server
from tests.tiny import CHATML, make_checkpoint, make_variant

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WHEN_ASKED = "{% if messages[-1].content == 'loop' %}" + ENDLESS + "{% endif %}" + CHATML


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Serves `base`, and `odd`, whose template comes to no end when it is asked to."""
    root = tmp_path_factory.mktemp("models")
    base = make_checkpoint(root / "base")
    odd = make_variant(root / "odd", base, scale=0.01)
    (odd / "chat_template.jinja").write_text(WHEN_ASKED)
    models = {"base": base, "odd": odd}
    with live_server(tmp_path_factory.mktemp("state"), models=models, root=root) as live:
        live.until_ready()
        yield live


def test_dialogue_over_which_a_template_comes_to_no_end_is_refused(server: LiveServer) -> None:
    with ThreadPoolExecutor(4) as clients:
        looping = [clients.submit(server.chat, "odd", "loop", max_tokens=1) for _ in range(3)]
        for _ in range(5):
            assert server.chat("base", max_tokens=1).status_code == 200
        for refused in looping:
            response = refused.result()
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("messages", "invalid_request_error")
    assert server.chat("odd", "hello", max_tokens=1).status_code == 200


def split_by_bomb(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def expand(folder: Path) -> None:
    file = folder / "tokenizer.json"
    record: dict[str, Any] = json.loads(file.read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000_000}
    file.write_text(json.dumps(record | {"normalizer": step}))


def loop(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(ENDLESS)


@pytest.mark.parametrize("spoil", [split_by_bomb, expand, loop])
def test_bomb_is_a_bad_checkpoint_at_once(
    server: LiveServer, spoil: Callable[[Path], None]
) -> None:
    base = server.served("base").text.path
    name = f"bomb-{spoil.__name__}".replace("_", "-")
    folder = make_variant(base.parent / name, base, scale=0.01, seed=7)
    spoil(folder)
    response = server.onboard(name, folder, wait=False)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "bad_checkpoint"
    assert server.chat("base", max_tokens=1).status_code == 200
    assert server.client.get(f"/models/{name}").status_code == 404


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_prompt_whose_length_alone_is_too_much_is_not_tokenised(
    server: LiveServer, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = server.served("base").text.tokenizer
    assert tokenizer.max_token_chars is not None
    most = tokenizer.max_token_chars * MAX_MODEL_LEN

    def refuse(*_: object, **__: object) -> list[int]:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(type(tokenizer), "encode", refuse)
    ask = server.chat if route == "chat" else server.complete
    error = ask("base", "x" * (most + 1)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if route == "chat" else "prompt")
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in error["message"]
    assert "context_length_exceeded" in error["message"]


def test_prompt_that_is_truncated_may_be_of_any_length(server: LiveServer) -> None:
    answer = server.complete("base", "x" * 300_000, truncate_prompt_tokens=7, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == 7
