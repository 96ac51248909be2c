"""Variants in few bits through the real encoder and engine; only the tuner's choice is given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from server.bridge.process import ENGINE_COMMAND
from tests.lora import make_adapter
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.family import delta_folders, residual, until_job
from tests.tiny import make_checkpoint, make_variant

PROMPT = "Once upon a time there was a delta"
RUNGS = {"0.001": "int4:64", "0.02": "rank2:8+signs:64"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("residual")
    base = make_checkpoint(root / "base", hidden=128, intermediate=128)
    residual(make_variant(root / "near", base, scale=0.05), RUNGS)
    make_adapter(root / "adapter", base)
    return root


def serving(root: Path) -> AbstractContextManager[LiveServer]:
    return live_server(
        root / "state",
        models={"base": root / "base"},
        root=root,
        engine_command=ENGINE_COMMAND,
        settings={"engine": {"kv_cache_tokens": 2048}, "sharing": {"policy": "budget"}},
    )


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    with serving(root) as live:
        live.until_ready()
        assert live.onboard("near", root / "near").status_code == 201
        assert live.onboard("whole", root / "near", policy="exact").status_code == 201
        yield live


def scores(server: LiveServer, model: str) -> list[float]:
    """Returns the log-probability of every token of the prompt but the first."""
    response = server.complete(model, PROMPT, echo=True, logprobs=0, max_tokens=0)
    assert response.status_code == 200, response.text
    found: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    return found[1:]


def distance(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def unique_bytes(server: LiveServer, model: str) -> float:
    line = f'linker_model_weight_bytes{{family="base",kind="unique",model="{model}"}}'
    return server.metric(line)


def test_compressed_variant_is_near_its_whole_self_in_the_planned_bytes(
    server: LiveServer,
) -> None:
    near, whole, base = (scores(server, model) for model in ("near", "whole", "base"))
    assert 0 < distance(near, whole) < 0.25 * distance(base, whole)
    row = server.services.roster.model("near")
    assert row.plan is not None
    assert unique_bytes(server, "near") == row.plan["unique_bytes"]
    assert unique_bytes(server, "near") < 0.5 * unique_bytes(server, "whole")


def test_shipped_delta_answers_as_the_variant_it_was_made_of(
    server: LiveServer, root: Path
) -> None:
    [folder] = delta_folders(root / "state")
    shutil.copytree(folder, root / "shipped")
    assert server.onboard("imported", root / "shipped").status_code == 201
    assert scores(server, "imported") == scores(server, "near")


def test_adapter_changes_its_base(server: LiveServer, root: Path) -> None:
    assert server.onboard("tuned", root / "adapter").status_code == 201
    assert distance(scores(server, "tuned"), scores(server, "base")) > 0.01
    row = server.services.roster.model("tuned")
    assert row.plan is not None
    assert unique_bytes(server, "tuned") == row.plan["unique_bytes"]


def test_other_plan_comes_without_breaking_a_stream_and_frees_the_old_bytes(
    server: LiveServer, root: Path
) -> None:
    assert server.onboard("changing", root / "near").status_code == 201
    before, whole = scores(server, "changing"), scores(server, "whole")
    held = unique_bytes(server, "changing")
    body = {"model": "changing", "prompt": PROMPT, "stream": True, "max_tokens": 150,
            "temperature": 0, "ignore_eos": True}  # fmt: skip
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        job = server.client.patch("/models/changing", json={"budget_kl": 0.05}).json()
        until_job(server, job["id"], "succeeded")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
    server.until(lambda: unique_bytes(server, "changing") < held)
    row = server.services.roster.model("changing")
    assert row.plan is not None
    assert unique_bytes(server, "changing") == row.plan["unique_bytes"]
    after = scores(server, "changing")  # nothing is left in the cache of the old plan
    assert distance(after, whole) > distance(before, whole)


def test_restart_brings_compressed_models_back_with_the_same_answers(
    root: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("state"))
    models = ("near", "tuned")
    with serving(copy) as server:
        server.until_ready()
        assert server.onboard("near", copy / "near").status_code == 201
        assert server.onboard("tuned", copy / "adapter").status_code == 201
        before = [scores(server, model) for model in models]
    with serving(copy) as server:
        server.until_ready()
        assert [scores(server, model) for model in models] == before
