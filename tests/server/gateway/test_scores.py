"""What benchmarks say of models: stored, shown beside the plan, and gone with what it holds for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

HARNESS = "lm-eval 0.4.13"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scores")
    base = make_checkpoint(root / "base")
    make_variant(root / "near", base, scale=0.01)
    return root


@pytest.fixture(scope="module")
def live(state: Path) -> Iterator[LiveServer]:
    with live_server(state / "state", models={"base": state / "base"}, root=state) as server:
        server.until_ready()
        assert server.onboard("near", state / "near", donor="base").status_code == 201
        yield server


def post(live: LiveServer, mode: str, accuracies: dict[str, float], **more: Any) -> httpx.Response:
    records = {
        task: {"metrics": {"acc": value}, "num_samples": 50, "num_fewshot": 0}
        for task, value in accuracies.items()
    }
    body = {"model": "near", "variant_mode": mode, "harness": HARNESS, "tasks": records, **more}
    return live.client.post("/models/scores", json=body)


def scores(live: LiveServer) -> Any:
    return live.client.get("/models/near").json()["scores"]


def test_scores_of_both_weights_are_shown_with_what_is_retained(live: LiveServer) -> None:
    assert live.client.get("/models/base").json()["scores"] is None
    assert post(live, "unshared", {"piqa": 0.8, "mmlu": 0.5}).status_code == 200
    shown = post(live, "planned", {"piqa": 0.6}).json()["scores"]
    assert shown == scores(live)
    assert shown["planned"]["piqa"]["metrics"] == {"acc": 0.6}
    assert shown["planned"]["piqa"]["harness"] == HARNESS
    assert shown["retention"] == {"piqa": {"acc": pytest.approx(0.75)}}


def test_score_of_other_samples_is_compared_with_none(live: LiveServer) -> None:
    post(live, "unshared", {"arc": 0.8})
    partial = {"arc": {"metrics": {"acc": 0.5}, "num_samples": 10, "is_partial": True}}
    post(live, "planned", {}, tasks=partial)
    assert "arc" not in scores(live)["retention"]


def test_scores_of_a_plan_go_with_it_and_those_of_the_weights_stay(live: LiveServer) -> None:
    post(live, "unshared", {"piqa": 0.8})
    digest = post(live, "planned", {"piqa": 0.6}).json()["plan"]["digest"]
    changed = live.client.patch("/models/near", params={"wait": True}, json={"policy": "exact"})
    assert changed.status_code == 200, changed.text
    assert changed.json()["plan"]["digest"] != digest
    shown = scores(live)
    assert shown["planned"] == {}
    assert shown["unshared"]["piqa"]["metrics"] == {"acc": 0.8}
    late = post(live, "planned", {"piqa": 0.6}, plan=digest)
    assert late.status_code == 409


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": "no/such"}, "model"),
        ({"variant_mode": "shared"}, "variant_mode"),
        ({"harness": "a\nb"}, "harness"),
        ({"tasks": {}}, "tasks"),
        ({"tasks": {"../x": {"metrics": {"acc": 1.0}}}}, "tasks.../x"),
        ({"tasks": {"t": {"metrics": {}}}}, "tasks.t.metrics"),
        ({"tasks": {"t": {"metrics": {"acc": "1"}}}}, "tasks.t.metrics.acc"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_body_that_is_none_is_refused_and_changes_nothing(
    live: LiveServer, more: dict[str, Any], param: str
) -> None:
    before = scores(live)
    refused = post(live, "planned", {"piqa": 0.6}, **more)
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == param
    assert scores(live) == before


def test_scores_outlive_the_server_and_a_change_of_options(tmp_path: Path, state: Path) -> None:
    with live_server(tmp_path, root=state) as live:
        live.until(lambda: live.client.get("/health").is_success)
        assert live.onboard("base", state / "base").status_code == 201
        assert live.onboard("near", state / "near", donor="base").status_code == 201
        post(live, "planned", {"piqa": 0.6})
        live.client.patch("/models/near", json={"keep_alive": 60})
        before = scores(live)
    with live_server(tmp_path, root=state) as live:
        live.until_ready()
        assert scores(live) == before
        assert before["planned"]["piqa"]["metrics"] == {"acc": 0.6}
