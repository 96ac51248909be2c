"""POST /models/plan: the answers of an onboarding that does not happen."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from linker_core.weights.checkpoint import Checkpoint
from tests.server.fake_engine import MUTE_ENGINE
from tests.server.fake_tuner import BLOCKER, KL, KL_UPPER
from tests.server.live import LiveServer, live_server
from tests.tiny import make_variant

BUDGET: dict[str, object] = {"policy": "budget"}


@pytest.fixture(scope="module")
def live(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(
        tmp_path_factory.mktemp("plans"), models={"base": family / "base"}, root=family,
        settings={"sharing": BUDGET},
    ) as server:  # fmt: skip
        server.until_ready()
        yield server


@pytest.fixture(scope="module")
def shape(family: Path) -> Path:
    """A directory with a config.json and nothing else."""
    folder = family / "shape"
    folder.mkdir()
    shutil.copy(family / "near" / "config.json", folder)
    return folder


def planned(live: LiveServer, source: Path, **more: Any) -> dict[str, Any]:
    response = live.client.post("/models/plan", json={"source": str(source), **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(live: LiveServer, status: int, **body: Any) -> dict[str, Any]:
    response = live.client.post("/models/plan", json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_dry_run_says_what_onboarding_would_do_and_leaves_no_model(
    live: LiveServer, family: Path
) -> None:
    before = live.client.get("/models").json()
    answer = planned(live, family / "near")
    assert live.client.get("/models").json() == before
    assert live.client.get("/models/jobs").json()["data"][0]["model"] == "base"
    card = live.onboard("near", family / "near").json()
    assert answer["bytes"] == {kind: card["bytes"][kind] for kind in answer["bytes"]}
    for field in ("policy", "price", "budget_kl", "region", "mean_cos", "mean_epsilon"):
        assert answer[field] == card["plan"][field], field
    assert (answer["object"], answer["donor"], answer["would_evict"]) == ("model.plan", "base", [])
    assert answer["fits"] is True
    live.client.delete("/models/near")


def test_dry_run_shows_every_block_and_the_frontier(live: LiveServer, family: Path) -> None:
    answer = planned(live, family / "near")
    assert [block["index"] for block in answer["blocks"]] == [0, 1]
    for block in answer["blocks"]:
        assert block["rung"] == "alias"
        assert set(block["rungs"].values()) == {"alias"}
        assert "self_attn.q_proj.bias" in block["rungs"]
        assert block["cos"] > 0.999
    points = answer["frontier"]
    assert [point["origin"] for point in points] == ["all blocks", "identical bytes alone"]
    assert (points[0]["kl"], points[0]["kl_upper"]) == (KL, KL_UPPER)
    assert points[0]["blocks"] == {"alias": 2, "residual": 0, "own": 0, "total": 2}
    assert all("rungs" not in point for point in points)


def test_block_takes_the_rung_of_its_dearest_matrix(live: LiveServer, family: Path) -> None:
    up = "model.layers.1.mlp.up_proj.weight"
    norm = "model.layers.0.input_layernorm.weight"
    mixed = make_variant(family / "mixed", family / "base", scale={up: 0.1, norm: 0.1})
    answer = planned(live, mixed, policy="exact")
    assert [block["rung"] for block in answer["blocks"]] == ["alias", "own"]
    assert answer["blocks"][0]["rungs"]["input_layernorm.weight"] == "own"
    assert (answer["price"], answer["budget_kl"], answer["frontier"]) == (None, None, None)


def test_model_without_a_donor_is_planned_as_one(live: LiveServer, family: Path) -> None:
    answer = planned(live, family / "other")
    assert (answer["donor"], answer["policy"], answer["price"]) == (None, "donor", None)
    with Checkpoint.open(family / "other") as checkpoint:
        assert answer["bytes"]["unique"] == answer["bytes"]["logical"] == checkpoint.nbytes
    assert [block["rung"] for block in answer["blocks"]] == ["own"]
    assert answer["seconds"]["hash"] > 0
    assert planned(live, family / "other")["seconds"]["hash"] == 0  # neither hashed nor read again


def test_shape_alone_gives_the_bytes_of_sharing_every_block(
    live: LiveServer, family: Path, shape: Path
) -> None:
    answer = planned(live, shape, donor="base")
    with Checkpoint.open(family / "near") as checkpoint:
        outside = sum(
            tensor.nbytes for name, tensor in checkpoint.tensors.items() if ".layers." not in name
        )
        total = checkpoint.nbytes
    assert answer["bytes"] == {
        "logical": total, "unique": outside, "shared": total - outside, "checkpoint": total,
    }  # fmt: skip
    assert [answer[field] for field in ("blocks", "price", "region", "frontier")] == [None] * 4
    assert answer["fits"] is True


def test_shape_of_a_donor_fits_with_its_kv_cache_or_not(
    family: Path, tmp_path: Path, shape: Path
) -> None:
    body = {"source": str(shape)}
    with live_server(
        tmp_path, root=family, settings={"engine": {"memory_budget": 200_000}}
    ) as server:
        server.until(lambda: server.client.post("/models/plan", json=body).status_code != 503)
        answer = planned(server, shape)
        assert answer["bytes"]["unique"] < answer["free_bytes"] == 200_000
        assert answer["fits"] is False


def test_dry_run_without_an_engine_is_503(family: Path, tmp_path: Path) -> None:
    with live_server(tmp_path, root=family, engine_command=MUTE_ENGINE) as server:
        assert refused(server, 503, source=str(family / "near"))["code"] == "not_ready"


def test_rows_that_are_the_donors_are_not_held_again(live: LiveServer, family: Path) -> None:
    grown = make_variant(family / "grown", family / "base", scale={}, added_tokens=("<|tool|>",))
    with Checkpoint.open(grown) as checkpoint:
        row_bytes = checkpoint.config.hidden_size * 2 + 8  # bfloat16, and where the row belongs
    answer = planned(live, grown)
    assert answer["bytes"]["unique"] == row_bytes
    assert (answer["price"]["kl"], answer["price"]["tokens"]) == (0.0, 0)
    card = live.onboard("grown", grown).json()
    assert card["bytes"]["unique"] == row_bytes
    assert card["blocks"] == {"alias": 2, "residual": 0, "own": 0, "total": 2}
    assert live.metric('linker_model_blocks{model="grown",rung="alias"}') == 2
    live.client.delete("/models/grown")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"source": "{root}/near", "policy": "bytes"}, 400, "max_bytes"),
        ({"source": "{root}/near", "surprise": 1}, 400, "surprise"),
        ({"source": "{root}/near", "name": "jobs"}, 400, "name"),
        ({"source": "{root}/near", "donor": "nobody"}, 404, "donor"),
        ({"source": "/etc"}, 403, "source"),
        ({"source": "{root}/nothing"}, 400, None),
        ({}, 400, "source"),
    ],
)
def test_what_onboarding_refuses_is_refused(
    live: LiveServer, family: Path, body: dict[str, Any], status: int, param: str | None
) -> None:
    if "source" in body:
        body = {**body, "source": body["source"].format(root=family)}
    assert refused(live, status, **body)["param"] == param


def test_price_beyond_the_budget_is_told_with_what_it_would_be(
    live: LiveServer, family: Path
) -> None:
    thresholds = {"tau_cos": 0.9, "tau_frob": 0.1}
    answer = planned(live, family / "near", **thresholds, budget_kl=0.005)
    assert (answer["within_budget"], answer["budget_kl"]) == (False, 0.005)
    assert (answer["price"]["kl_upper"], answer["policy"]) == (KL_UPPER, "thresholds")
    assert planned(live, family / "near", **thresholds, budget_kl=KL_UPPER)["within_budget"] is True
    assert planned(live, family / "near", **thresholds)["within_budget"] is None


def test_model_larger_than_its_size_without_a_donor_is_refused(
    live: LiveServer, family: Path
) -> None:
    error = refused(live, 400, source=str(family / "other"), max_bytes=1)
    assert error["param"] == "max_bytes"
    onboarding = live.onboard("other", family / "other", max_bytes=1)
    assert (onboarding.status_code, onboarding.json()["error"]["param"]) == (400, "max_bytes")
    with Checkpoint.open(family / "other") as checkpoint:
        size = checkpoint.nbytes
    assert planned(live, family / "other", max_bytes=size)["bytes"]["unique"] == size


def num_tuners() -> int:
    count = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            count += "tests.server.fake_tuner" in child.cmdline()
    return count


def test_client_that_leaves_ends_the_tuner(live: LiveServer, family: Path) -> None:
    lone = make_variant(family / "lone", family / "base", scale=0.01, seed=9)
    planned(live, lone, policy="exact")  # scanned from here on
    (lone / BLOCKER).touch()
    body = json.dumps({"source": str(lone)}).encode()
    head = f"POST /models/plan HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        live.until(lambda: num_tuners() == 1)
    live.until(lambda: num_tuners() == 0)
    (lone / BLOCKER).unlink()
    assert planned(live, lone)["price"]["kl"] == KL


def test_dry_runs_take_turns_and_places_in_the_queue(family: Path, tmp_path: Path) -> None:
    slow = make_variant(family / "slow", family / "base", scale=0.01, seed=10)
    (slow / BLOCKER).touch()
    settings: dict[str, dict[str, object]] = {"sharing": BUDGET, "models": {"onboarding_queue": 2}}
    with live_server(
        tmp_path / "s", models={"base": family / "base"}, root=family, settings=settings
    ) as server:
        server.until_ready()
        # The donor's job still tidies up when the donor serves, and holds its place until then.
        server.until(lambda: server.services.onboarder._limit._jobs.num_live == 0)
        answers: list[dict[str, Any]] = []
        asking = [
            threading.Thread(target=lambda: answers.append(planned(server, slow))) for _ in range(2)
        ]
        for thread in asking:
            thread.start()
        server.until(lambda: server.services.onboarder._limit.num_rehearsing == 2)
        assert refused(server, 429, source=str(family / "near"))["code"] == "queue_full"
        refusal = server.onboard("near", family / "near", wait=False)
        assert refusal.status_code == 429
        server.until(lambda: num_tuners() == 1)
        (slow / BLOCKER).unlink()
        for thread in asking:
            thread.join(60)
    assert [answer["price"]["kl"] for answer in answers] == [KL, KL]
    tuned = [answer["seconds"]["tune"] > 0 for answer in answers]
    assert sorted(tuned) == [False, True]  # the second found what the first had measured
