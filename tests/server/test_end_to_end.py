"""The server with the real engine: several models at once, and bad input beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

PROMPT = "Once upon a time"
ADDED = ("<|tool|>", "<|end_tool|>")
NAMES = ("base", "near", "far", "wide")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real")
    base = make_checkpoint(root / "base", tie=False)  # a tied random model repeats one token
    make_variant(root / "near", base, scale=0.01)
    make_variant(root / "far", base, scale=0.2, seed=2)
    make_variant(root / "wide", base, scale=0.01, seed=3, added_tokens=ADDED)
    make_checkpoint(root / "shapes", hidden=64)
    make_checkpoint(root / "layers", layers=3)
    for name in ("truncated", "missing-tensor", "pickle", "architecture"):
        shutil.copytree(root / "near", root / name)
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    config = root / "missing-tensor" / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    (root / "pickle" / "model.safetensors").rename(root / "pickle" / "pytorch_model.bin")
    config = root / "architecture" / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "GPT2LMHeadModel"))
    return root


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    models = {name: root / name for name in NAMES}
    with live_server(
        tmp_path_factory.mktemp("state"),
        models=models,
        root=root,
        engine_command=None,
        settings={"engine": {"kv_cache_tokens": 2048}},
    ) as live:
        live.until_ready()
        yield live


def answer(server: LiveServer, model: str) -> str:
    more = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    response = server.complete(model, PROMPT, **more)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def answers(server: LiveServer) -> dict[str, str]:
    return {name: answer(server, name) for name in NAMES}


def test_models_answer_in_one_batch_as_they_do_alone(server: LiveServer) -> None:
    alone = answers(server)
    assert len(set(alone.values())) > 1
    assert len(set(alone["base"])) > 1
    with ThreadPoolExecutor(len(NAMES) * 3) as pool:
        mixed = [pool.submit(answer, server, name) for name in NAMES * 3]
        assert [future.result() for future in mixed] == [alone[name] for name in NAMES * 3]


def test_stream_says_what_the_whole_answer_says(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.completions.create(
            model="near", prompt=PROMPT, max_tokens=24, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert streamed == answer(server, "near")


def test_added_tokens_belong_to_their_own_model(server: LiveServer) -> None:
    asked = {"prompt": ADDED[0], "max_tokens": 1}
    wide = server.client.post("/v1/completions", json={"model": "wide", **asked}).json()
    base = server.client.post("/v1/completions", json={"model": "base", **asked}).json()
    assert wide["usage"]["prompt_tokens"] == 1
    assert base["usage"]["prompt_tokens"] == len(ADDED[0])
    beyond = {"model": "base", "prompt": [512], "max_tokens": 1}
    assert server.client.post("/v1/completions", json=beyond).status_code == 400
    assert server.complete("wide", [513], max_tokens=1).status_code == 200


def test_logprobs_of_a_greedy_answer_are_the_highest(server: LiveServer) -> None:
    response = server.complete("base", PROMPT, temperature=0, max_tokens=4, logprobs=2)
    record = response.json()["choices"][0]["logprobs"]
    for logprob, top in zip(record["token_logprobs"], record["top_logprobs"], strict=True):
        assert logprob == max(top.values())


def test_seed_makes_a_sampled_answer_repeatable(server: LiveServer) -> None:
    more = {"temperature": 1.0, "seed": 7, "max_tokens": 16, "ignore_eos": True}
    first, second = (server.complete("base", PROMPT, **more).json() for _ in range(2))
    assert first["choices"] == second["choices"]


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("architecture", 400, "unsupported_format"),
        ("shapes", 400, "bad_checkpoint"),
        ("layers", 400, "bad_checkpoint"),
        ("truncated", 400, "bad_checkpoint"),
        ("missing-tensor", 400, "bad_checkpoint"),
        ("pickle", 400, "unsupported_format"),
        ("/etc", 403, "forbidden_source"),
    ],
)
def test_bad_checkpoint_is_refused_and_residents_answer_as_before(
    server: LiveServer, root: Path, source: str, status: int, code: str
) -> None:
    before = answers(server)
    response = server.onboard("bad", root / source, donor="base")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert answers(server) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'{"model": "nobody", "prompt": "a"}', 404), (b'{"model": "base", "prompt', 400)],
)
def test_bad_request_is_refused_and_residents_answer_as_before(
    server: LiveServer, body: bytes, status: int
) -> None:
    before = answers(server)
    assert server.client.post("/v1/completions", content=body).status_code == status
    assert answers(server) == before


def test_onboarding_and_deleting_leave_the_others_as_they_were(
    server: LiveServer, root: Path
) -> None:
    before = answers(server)
    held = server.client.get("/models/near").json()["bytes"]
    response = server.onboard("twin", root / "near", policy="exact")
    assert response.status_code == 201
    assert answer(server, "twin")
    assert server.client.delete("/models/twin").status_code == 200
    assert answers(server) == before
    assert server.client.get("/models/near").json()["bytes"] == held


def test_engine_killed_from_outside_comes_back_with_every_model(server: LiveServer) -> None:
    before = answers(server)
    first = server.services.engine.pid
    server.services.engine.kill()
    server.until(lambda: server.services.engine.pid not in (first, None))
    server.until_ready()
    assert answers(server) == before


def test_models_that_do_not_fit_today_come_back_when_they_fit_again(
    root: Path, tmp_path: Path
) -> None:
    models = {"base": root / "base", "far": root / "far"}
    with live_server(tmp_path, models=models, root=root, engine_command=None) as live:
        live.until_ready()
        before = live.client.get("/models/far").json()["plan"]
    small = {"engine": {"memory_budget": 1000}}
    with live_server(tmp_path, root=root, engine_command=None, settings=small) as live:
        live.until(lambda: live.client.get("/models/far").json()["state"] == "unloaded")
        assert live.complete("far", PROMPT, max_tokens=2).status_code == 507
    with live_server(tmp_path, root=root, engine_command=None) as live:
        live.until_ready()
        assert live.client.get("/models/far").json()["plan"] == before
        assert live.complete("far", PROMPT, max_tokens=2).status_code == 200


def test_context_length_shown_is_that_of_todays_settings(root: Path, tmp_path: Path) -> None:
    with live_server(tmp_path, models={"base": root / "base"}, engine_command=None) as live:
        live.until_ready()
        assert live.client.get("/models/base").json()["max_model_len"] == 256
    shorter = {"engine": {"max_model_len": 64}}
    with live_server(tmp_path, root=root, engine_command=None, settings=shorter) as live:
        live.until_ready()
        shown = {live.client.get(path).json()["max_model_len"] for path in (
            "/models/base", "/v1/models/base",
        )}  # fmt: skip
        assert shown == {64}
