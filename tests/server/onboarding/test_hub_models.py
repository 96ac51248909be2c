"""Models that come from the hub: onboarded, served, kept over restarts, cancelled and deleted."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.lora import make_adapter
from tests.server.live import LiveServer, live_server
from tests.server.onboarding import fake_hub
from tests.server.onboarding.conftest import LIMITS
from tests.server.onboarding.fake_hub import FakeHub
from tests.server.onboarding.family import delta_folders, open_registry, residual, until_job
from tests.server.onboarding.test_hub import workers
from tests.tiny import make_variant

NEAR = Path("hub:acme/near@main")
WEIGHTS = "model.safetensors"
Serving = Callable[..., Any]


@pytest.fixture
def hub(models: dict[str, Path]) -> Iterator[FakeHub]:
    with FakeHub().running() as found:
        for name, path in models.items():
            found.add(f"acme/{name}", path)
        yield found


@pytest.fixture
def serving(tmp_path: Path, models: dict[str, Path], hub: FakeHub) -> Serving:
    """Starts a server whose donor is a directory, over one state directory."""

    def serve(startup: Mapping[str, Path] | None = None, **more: Any) -> Any:
        settings = {"hub": {"endpoint": hub.endpoint, "keep_free_bytes": 0, **more}}
        return live_server(
            tmp_path / "state",
            models={"base": models["base"]} if startup is None else startup,
            root=tmp_path,
            limits=LIMITS,
            settings=settings,
        )

    return serve


def stored(state: Path) -> set[str]:
    """Returns the files of downloads, whole or not."""
    files = {path for path in (state / "hub").rglob("*") if path.is_file()}
    return {path.name for path in files} - {"revisions.json"}


def pinned(hub: FakeHub, repo: str) -> str:
    return f"hub:{repo}@{hub.repositories[repo].commit}"


def source_of(server: LiveServer, name: str) -> str:
    return server.services.roster.model(name).source


def commit_of(server: LiveServer, name: str) -> str:
    return source_of(server, name).rpartition("@")[2]


def begin_held(server: LiveServer, hub: FakeHub, name: str = "near") -> dict[str, Any]:
    """Begins to onboard a model whose weights come half way; returns the job."""
    reached = threading.Event()
    hub.faults[WEIGHTS] = [fake_hub.held_after(5_000, reached)]
    answer = server.onboard(name, NEAR, wait=False)
    assert answer.status_code == 202, answer.text
    assert reached.wait(60)
    job: dict[str, Any] = answer.json()
    return job


def test_model_is_downloaded_served_and_deleted_with_its_files(
    serving: Serving, hub: FakeHub, tmp_path: Path
) -> None:
    with serving() as server:
        server.until_ready()
        answer = server.onboard("near", NEAR)
        assert answer.status_code == 201, answer.text
        assert answer.json()["donor"] == "base"
        assert answer.json()["source"] == pinned(hub, "acme/near")
        assert server.client.get("/models/base").json()["source"] is None
        assert server.chat("near").status_code == 200
        assert WEIGHTS in stored(tmp_path / "state")
        assert server.client.delete("/models/near").status_code == 200
        assert stored(tmp_path / "state") == set()
        assert str(tmp_path) not in answer.text


def test_restart_needs_no_hub(serving: Serving, hub: FakeHub) -> None:
    with serving() as server:
        server.until_ready()
        assert server.onboard("near", NEAR).status_code == 201
    asked = len(hub.asked)
    with serving() as server:
        server.until_ready()
        server.until(lambda: server.chat("near").status_code == 200)
    assert len(hub.asked) == asked


def test_model_whose_download_was_gone_comes_back_behind_the_others(
    serving: Serving, hub: FakeHub, tmp_path: Path
) -> None:
    with serving() as server:
        server.until_ready()
        assert server.onboard("near", NEAR).status_code == 201
    shutil.rmtree(tmp_path / "state" / "hub")
    reached = threading.Event()
    hub.faults[WEIGHTS] = [fake_hub.held_after(5_000, reached)]
    with serving() as server:
        assert reached.wait(60)
        server.until(lambda: server.chat("base").status_code == 200)
        assert server.chat("near").status_code == 503
        hub.released.set()
        server.until(lambda: server.chat("near").status_code == 200)


def test_moved_branch_is_other_content_under_the_same_name(
    serving: Serving, hub: FakeHub, models: dict[str, Path], tmp_path: Path
) -> None:
    with serving() as server:
        server.until_ready()
        assert server.onboard("near", NEAR).status_code == 201
        again = server.onboard("near", NEAR)
        assert again.status_code == 201  # the same commit
        assert len(hub.asked_for(WEIGHTS)) == 1
        hub.add("acme/near", make_variant(tmp_path / "next", models["base"], scale=0.02))
        moved = server.onboard("near", NEAR)
        assert moved.status_code == 409
        assert server.onboard("near-next", NEAR).status_code == 201
        assert commit_of(server, "near") != commit_of(server, "near-next")


def test_cancelled_download_leaves_nothing(serving: Serving, hub: FakeHub, tmp_path: Path) -> None:
    with serving() as server:
        server.until_ready()
        job = begin_held(server, hub)
        shown = server.client.get(f"/models/jobs/{job['id']}").json()
        assert (shown["status"], shown["stage"]) == ("running", "validating")
        answer = server.client.post(f"/models/jobs/{job['id']}/cancel")
        assert answer.status_code == 200, answer.text
        assert workers() == []
        assert server.client.get("/models/near").status_code == 404
        assert stored(tmp_path / "state") == set()
        assert server.onboard("near", NEAR).status_code == 201


def test_download_blocks_no_other_job(
    serving: Serving, hub: FakeHub, models: dict[str, Path]
) -> None:
    with serving() as server:
        server.until_ready()
        job = begin_held(server, hub)
        assert server.onboard("local", models["near"]).status_code == 201
        assert server.chat("local").status_code == 200
        hub.released.set()
        until_job(server, job["id"], "succeeded")


def test_b8_stop_in_the_middle_is_taken_up_where_it_was(
    serving: Serving, hub: FakeHub, tmp_path: Path
) -> None:
    part = f"{WEIGHTS}.part"
    with serving() as server:
        server.until_ready()
        job = begin_held(server, hub)
    assert workers() == []
    assert part in stored(tmp_path / "state")
    with serving() as server:
        until_job(server, job["id"], "succeeded")
        assert server.chat("near").status_code == 200
    assert part not in stored(tmp_path / "state")


def test_b8_unfinished_download_without_a_row_is_swept_at_the_start(
    serving: Serving, hub: FakeHub, tmp_path: Path
) -> None:
    with serving() as server:
        server.until_ready()
        begin_held(server, hub)
    assert stored(tmp_path / "state") != set()
    registry = open_registry(tmp_path / "state")
    registry.delete_model("near")
    registry.close()
    with serving() as server:
        server.until_ready()
        assert stored(tmp_path / "state") == set()


@pytest.fixture(scope="module")
def standing(
    family: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, FakeHub]]:
    """A server and a hub for tests that leave both as they were."""
    state = tmp_path_factory.mktemp("state")
    with FakeHub().running() as hub:
        hub.add("acme/near", family / "near")
        hub.add("acme/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
        settings = {"hub": {"endpoint": hub.endpoint, "keep_free_bytes": 0}}
        models = {"base": family / "base"}
        with live_server(state, models=models, root=family, settings=settings) as server:
            server.until_ready()
            yield server, hub


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (fake_hub.zeros, 400, "bad_checkpoint"),
        (fake_hub.gzip_bomb, 400, "bad_checkpoint"),
        (fake_hub.redirect("http://evil.example/"), 400, "bad_checkpoint"),
        (fake_hub.status(404), 400, "invalid_request_error"),
        (fake_hub.status(429, {"retry-after": 1000}), 503, "not_ready"),
    ],
)
def test_failed_download_fails_the_job_with_its_reason(
    standing: tuple[LiveServer, FakeHub],
    fault: fake_hub.Fault,
    status: int,
    code: str,
    tmp_path: Path,
) -> None:
    server, hub = standing
    hub.faults[WEIGHTS] = [fault] * 9
    answer = server.onboard("failing", NEAR)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    for secret in (str(tmp_path.parent), hub.endpoint, "Traceback", "httpx"):
        assert secret not in answer.text
    assert server.client.get("/models/failing").json()["state"] == "failed"
    hub.faults.clear()
    assert server.client.delete("/models/failing").status_code == 200


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("hub:acme/none", 400, "invalid_request_error"),
        ("hub:acme/near@v9", 400, "invalid_request_error"),
        ("hub:../near", 400, "invalid_request_error"),
        ("hub:https://evil.example/x", 400, "invalid_request_error"),
        ("hub:acme/pickles", 400, "unsupported_format"),
    ],
)
def test_what_can_be_known_is_said_before_the_reply(
    standing: tuple[LiveServer, FakeHub], source: str, status: int, code: str
) -> None:
    server, _ = standing
    answer = server.onboard("x", Path(source), wait=False)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert server.client.get("/models/x").status_code == 404


def test_b7_disk_below_its_mark_is_507_before_the_reply(serving: Serving) -> None:
    with serving(keep_free_bytes="4096T") as server:
        server.until_ready()
        answer = server.onboard("near", NEAR, wait=False)
        assert answer.status_code == 507, answer.text
        assert answer.json()["error"]["code"] == "insufficient_capacity"
        assert server.chat("base").status_code == 200


def test_adapter_of_the_hub_goes_on_its_base(
    serving: Serving, hub: FakeHub, models: dict[str, Path], tmp_path: Path
) -> None:
    hub.add("acme/adapter", make_adapter(tmp_path / "adapter", models["base"]))
    with serving() as server:
        server.until_ready()
        body = {"policy": "budget"}
        refused = server.onboard("tuned", Path("hub:acme/adapter"), wait=False, **body)
        assert refused.status_code == 400  # it brings its own plan
        answer = server.onboard("tuned", Path("hub:acme/adapter"))
        assert answer.status_code == 201, answer.text
        assert answer.json()["plan"]["policy"] == "adapter"
        assert server.chat("tuned").status_code == 200
    with serving() as server:
        server.until(lambda: server.chat("tuned").status_code == 200)


def test_delta_of_the_hub_goes_on_its_base(
    serving: Serving, hub: FakeHub, models: dict[str, Path], tmp_path: Path
) -> None:
    near = residual(models["near"], {"0.004": "int4:64"})
    with serving() as server:
        server.until_ready()
        assert server.onboard("near", near, policy="budget").status_code == 201
        (folder,) = delta_folders(tmp_path / "state")
        hub.add("acme/delta", folder)
        answer = server.onboard("shipped", Path("hub:acme/delta"))
        assert answer.status_code == 201, answer.text
        assert answer.json()["plan"]["policy"] == "delta"
        assert server.chat("shipped").status_code == 200
        assert "delta.safetensors" in stored(tmp_path / "state")
        assert server.client.delete("/models/shipped").status_code == 200
        assert stored(tmp_path / "state") == set()


def test_dry_run_downloads_and_keeps_nothing(serving: Serving, tmp_path: Path) -> None:
    with serving() as server:
        server.until_ready()
        body = {"name": "near", "source": str(NEAR)}
        answer = server.client.post("/models/plan", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["donor"] == "base"
        server.until(lambda: stored(tmp_path / "state") == set())


# --- models of the start ----------------------------------------------------------------------


def test_start_up_models_of_the_hub_stay_at_their_commits(
    serving: Serving, hub: FakeHub, models: dict[str, Path], tmp_path: Path
) -> None:
    startup = {"base": Path("hub:acme/base"), "near": NEAR}
    commits = {pinned(hub, "acme/base"), pinned(hub, "acme/near")}
    with serving(startup) as server:
        server.until_ready()
        assert server.chat("near").status_code == 200
    hub.add("acme/near", make_variant(tmp_path / "next", models["base"], scale=0.02))
    asked = len(hub.asked)
    with serving(startup) as server:
        server.until_ready()
        assert {source_of(server, name) for name in startup} == commits
        assert len(hub.asked) == asked
        # Somebody else's look at the branch moves no start-up model.
        assert server.onboard("near", NEAR).status_code == 409
        asked = len(hub.asked)
    with serving(startup) as server:
        server.until_ready()
        assert {source_of(server, name) for name in startup} == commits
        assert len(hub.asked) == asked
    with serving({**startup, "near": Path(pinned(hub, "acme/near"))}) as server:
        server.until_ready()
        assert commit_of(server, "near") == hub.repositories["acme/near"].commit


def test_start_up_model_of_a_hub_that_is_away_fails_alone(
    serving: Serving, hub: FakeHub, models: dict[str, Path]
) -> None:
    hub.api_fault = fake_hub.status(503, {"retry-after": 1000})
    with serving({"base": models["base"], "near": NEAR}) as server:
        server.until(lambda: server.client.get("/models/near").json()["state"] == "failed")
        card = server.client.get("/models/near").json()
        assert card["error"]["code"] == "not_ready"
        assert server.chat("base").status_code == 200
        hub.api_fault = None
        assert server.onboard("near", NEAR).status_code == 201
