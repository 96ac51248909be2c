from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from linker_core.weights.checkpoint import Checkpoint
from server.onboarding import acceptance
from server.onboarding.adapters import Source
from server.onboarding.prepare import read_source
from tests.server.fake_engine import MUTE_ENGINE, TOO_BIG
from tests.server.live import LiveServer, live_server
from tests.server.onboarding.family import held_up_scans
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture(scope="module")
def live(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with `base` resident for tests that add models, each under a name of its own."""
    state = tmp_path_factory.mktemp("managed")
    with live_server(state, models={"base": family / "base"}, root=family) as server:
        server.until_ready()
        yield server


def failure(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert isinstance(error, dict)
    return error


def test_listing_has_the_donor_first_and_the_fields_of_clients(server: LiveServer) -> None:
    data = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == ["base", "near"]
    assert [model["parent"] for model in data] == [None, "base"]
    assert [model["root"] for model in data] == ["base", "base"]
    assert {model["status"] for model in data} == {"ready"}
    assert data[1] == server.client.get("/v1/models/near").json()


def test_card_of_a_variant_has_what_tools_rely_on(server: LiveServer) -> None:
    card = server.client.get("/models/near").json()
    assert (card["id"], card["state"], card["donor"], card["family"]) == (
        "near", "ready", "base", "base",
    )  # fmt: skip
    held = card["bytes"]
    assert held["logical"] == held["unique"] + held["shared"] == held["checkpoint"]
    assert held["saved"] == held["shared"] > 0
    assert card["blocks"] == {"alias": 2, "residual": 0, "own": 0, "total": 2}
    plan = card["plan"]
    assert plan["policy"] == "thresholds"
    assert plan["region"] == "aligned"
    assert 0.999 < plan["mean_cos"] < 1
    assert plan["mean_epsilon"] == pytest.approx(0.01, rel=0.1)


def test_card_of_a_donor_has_its_own_plan(server: LiveServer) -> None:
    card = server.client.get("/models/base").json()
    assert (card["donor"], card["family"], card["plan"]["policy"]) == (None, "base", "donor")
    assert card["bytes"]["unique"] == card["bytes"]["logical"]
    assert card["bytes"]["shared"] == 0


def test_onboarding_answers_202_with_a_job_that_succeeds(live: LiveServer, family: Path) -> None:
    response = live.onboard("acme/near", family / "near", wait=False)
    assert response.status_code == 202
    assert response.headers["Retry-After"] == "1"
    job = response.json()
    where = response.headers["Location"]
    assert where == f"/models/jobs/{job['id']}"
    assert (job["object"], job["model"]) == ("model.job", "acme/near")
    live.until(lambda: live.client.get(where).json()["status"] == "succeeded")
    done = live.client.get(where).json()
    assert done["stage"] == "loading"
    assert done["progress"]["done_bytes"] == done["progress"]["total_bytes"] > 0
    assert done["error"] is None
    assert done["result"]["id"] == "acme/near"
    assert live.chat("acme/near").status_code == 200


def test_waiting_onboarding_answers_201_with_the_model(live: LiveServer, family: Path) -> None:
    response = live.onboard("near", family / "near")
    assert response.status_code == 201
    assert response.json() == live.client.get("/models/near").json()
    assert response.json()["donor"] == "base"


def test_automatic_donor_of_another_shape_is_its_own_family(live: LiveServer, family: Path) -> None:
    card = live.onboard("other", family / "other").json()
    assert (card["donor"], card["family"]) == (None, "other")


def test_donor_and_variant_posted_together_find_each_other(family: Path, tmp_path: Path) -> None:
    with live_server(tmp_path / "state", root=family) as server:
        for name in ("base", "near"):
            assert server.onboard(name, family / name, wait=False).status_code == 202
        server.until(lambda: server.client.get("/models/near").json()["state"] == "ready")
        assert server.client.get("/models/near").json()["donor"] == "base"


def test_variant_of_a_donor_that_is_still_on_its_way_waits_for_it(
    family: Path, tmp_path: Path
) -> None:
    with live_server(tmp_path / "state", root=family) as server:
        server.onboard("base", family / "base", wait=False)
        assert server.onboard("near", family / "near", donor="base").status_code == 201


def test_identical_repetition_gives_the_same_job(live: LiveServer, family: Path) -> None:
    live.onboard("again", family / "near")
    jobs = live.client.get("/models/jobs").json()["data"]
    again = live.onboard("again", family / "near", wait=False)
    assert again.status_code == 202
    assert again.json() == jobs[0]
    assert live.client.get("/models/jobs").json()["data"] == jobs


def test_same_name_with_other_content_is_409_and_not_to_be_retried(
    live: LiveServer, family: Path
) -> None:
    live.onboard("taken", family / "near")
    for more in ({"source": str(family / "far")}, {"tau_cos": 0.9, "tau_frob": 0.5}):
        body = {"name": "taken", "source": str(family / "near"), **more}
        response = live.client.post("/models", json=body)
        assert failure(response, 409)["code"] == "conflict"
        assert response.headers["x-should-retry"] == "false"


def test_exact_policy_and_thresholds_are_taken_from_the_body(
    live: LiveServer, family: Path
) -> None:
    exact = live.onboard("exact", family / "near", policy="exact").json()
    assert exact["plan"]["policy"] == "exact"
    assert exact["blocks"]["alias"] == 0
    loose = live.onboard("loose", family / "far", donor="base", tau_cos=0.5, tau_frob=0.9).json()
    assert (loose["plan"]["tau_cos"], loose["blocks"]["alias"]) == (0.5, 2)


def test_second_admission_of_a_pair_scans_nothing(
    live: LiveServer, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.onboard("one", family / "near")
    fresh = make_variant(family / "fresh", family / "base", scale=0.02, seed=8)
    scans: list[tuple[bool, bool]] = []
    scanner = live.services.onboarder._jobs._arrivals._planner._scanner
    run = scanner.run

    async def counting(*args: Any, **kwargs: Any) -> Any:
        scans.append((kwargs.get("donor") is not None, kwargs.get("hashed", True)))
        return await run(*args, **kwargs)

    monkeypatch.setattr(scanner, "run", counting)
    assert live.onboard("two", family / "near").status_code == 201
    assert scans == []  # nor does it hash what it has hashed
    assert live.onboard("three", fresh).status_code == 201
    assert scans == [(False, True), (True, False)]  # the scan hashes nothing again


@pytest.mark.parametrize(
    "name", ["../x", "", "a/b/c", ".hidden", "a b", "x" * 97, "jobs", "plan", "load/x", "ä", "a\n"]
)
def test_bad_name_is_400(server: LiveServer, family: Path, name: str) -> None:
    error = failure(server.onboard(name, family / "near"), 400)
    assert error["param"] == "name"


@pytest.mark.parametrize("source", ["/etc", "../..", "/", "{root}/../elsewhere", "link"])
def test_source_outside_the_roots_is_403_without_its_path(
    server: LiveServer, family: Path, source: str
) -> None:
    link = family / "link"
    if not link.is_symlink():
        link.symlink_to("/usr")
    source = source.format(root=family)
    error = failure(server.onboard("outside", Path(source)), 403)
    assert error["code"] == "forbidden_source"
    assert source not in error["message"].split()
    assert str(family) not in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"policy": "auto"}, {"policy": "guess"}, {"tau_cos": 0.9}, {"tau_frob": 0.1},
        {"tau_cos": 2, "tau_frob": 0.1}, {"surprise": 1}, {"pin": "yes"}, {"name": 3},
        {"keep_alive": "soon"}, {"keep_alive": True}, {"revision": "main"},
        {"policy": "exact", "tier": "conservative"}, {"policy": "exact", "budget_kl": 0.1},
        {"policy": "budget", "tau_cos": 0.9, "tau_frob": 0.1}, {"policy": "bytes"},
        {"policy": "budget", "max_bytes": 1}, {"policy": "bytes", "max_bytes": -1},
        {"budget_kl": -0.1}, {"budget_kl": "1"}, {"max_bytes": 1.5}, {"max_bytes": 1, "tier": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_onboarding_option_is_400(
    server: LiveServer, family: Path, more: dict[str, Any]
) -> None:
    body = {"name": "odd", "source": str(family / "near"), **more}
    error = failure(server.client.post("/models", json=body), 400)
    assert error["code"] == "invalid_request_error"
    assert error["param"]


@pytest.mark.parametrize("more", [{"tier": "nonsense"}, {"tau_cos": 0.9, "tau_frob": 0.5}])
def test_unknown_or_contradicted_tier_is_400_before_a_job_exists(
    server: LiveServer, family: Path, more: dict[str, Any]
) -> None:
    body = {"tier": "conservative", **more}
    error = failure(server.onboard("odd", family / "near", wait=False, **body), 400)
    assert error["param"] == "tier"
    assert server.client.get("/models/odd").status_code == 404


def test_unknown_donor_is_404_and_named(server: LiveServer, family: Path) -> None:
    error = failure(server.onboard("x", family / "near", donor="nobody"), 404)
    assert error["param"] == "donor"


def test_variant_as_donor_is_409(server: LiveServer, family: Path) -> None:
    assert failure(server.onboard("x", family / "far", donor="near"), 409)["param"] == "donor"


def test_other_shapes_than_the_named_donor_are_400_at_once(
    server: LiveServer, family: Path
) -> None:
    response = server.onboard("x", family / "other", donor="base", wait=False)
    error = failure(response, 400)
    assert error["code"] == "bad_checkpoint"
    assert "hidden_size" in error["message"]


def damaged(root: Path, how: str) -> Path:
    path = root / how
    if path.exists():
        return path
    shutil.copytree(root / "near", path)
    weights = path / "model.safetensors"
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "lying":
            weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        case "pickle":
            weights.rename(path / "pytorch_model.bin")
        case "architecture":
            config = path / "config.json"
            config.write_text(config.read_text().replace("Qwen2ForCausalLM", "GPT2LMHeadModel"))
        case "no-tokenizer":
            (path / "tokenizer.json").unlink()
        case "empty":
            shutil.rmtree(path)
            path.mkdir()
    return path


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("truncated", "bad_checkpoint"),
        ("lying", "bad_checkpoint"),
        ("pickle", "unsupported_format"),
        ("architecture", "unsupported_format"),
        ("no-tokenizer", "bad_checkpoint"),
        ("missing", "bad_checkpoint"),
    ],
)
def test_bad_checkpoint_is_400_before_a_job_exists(
    server: LiveServer, family: Path, how: str, code: str
) -> None:
    path = family / "nowhere" if how == "missing" else damaged(family, how)
    error = failure(server.onboard("broken", path, wait=False), 400)
    assert error["code"] == code
    assert str(family) not in error["message"]
    assert server.client.get("/models/broken").status_code == 404


def not_finite(root: Path) -> Path:
    path = root / "not-finite"
    if not path.exists():
        shutil.copytree(root / "other", path)
        weights = path / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-2:] = b"\x80\x7f"  # infinity in bfloat16, little-endian
        weights.write_bytes(data)
    return path


def test_weights_that_are_not_finite_fail_the_job(live: LiveServer, family: Path) -> None:
    error = failure(live.onboard("broken", not_finite(family)), 400)
    assert error["code"] == "bad_checkpoint"
    card = live.client.get("/models/broken").json()
    assert (card["state"], card["error"]["code"]) == ("failed", "bad_checkpoint")


@contextmanager
def memory_left(server: LiveServer, nbytes: int) -> Iterator[None]:
    """Has the server find so many free bytes, and nobody who could leave."""
    room = server.services.room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_free_bytes", lambda _client: nbytes)
        patch.setattr(room, "_holders", lambda _snapshot, _keep: [])
        patch.setattr(room, "_later_bytes", lambda *_: 0)
        yield


def test_too_little_memory_is_507_before_a_job_exists(live: LiveServer, family: Path) -> None:
    with memory_left(live, 1000):
        error = failure(live.onboard("large", family / "tall", wait=False), 507)
    assert "1000 are free" in error["message"]
    assert error["code"] == "insufficient_capacity"


def test_capacity_counts_the_kv_cache_of_a_donor_and_the_head_of_a_variant(
    live: LiveServer, family: Path
) -> None:
    with Checkpoint.open(family / "tall") as checkpoint:
        model, weights = checkpoint.config, checkpoint.nbytes
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 16_384 * 4
    outside = (model.vocab_size + 1) * model.hidden_size * 2  # a tied embedding, a norm; bfloat16

    def answer(free_bytes: int, name: str, **more: Any) -> httpx.Response:
        with held_up_scans(live), memory_left(live, free_bytes):  # the job finds all of it again
            return live.onboard(f"{name}-{free_bytes}", family / name, wait=False, **more)

    assert f"{weights + kv} bytes" in failure(answer(weights + kv - 1, "tall"), 507)["message"]
    assert f"{outside} bytes" in failure(answer(outside - 1, "near"), 507)["message"]
    assert answer(outside, "near").status_code == 202
    live.until(lambda: live.client.get(f"/models/near-{outside}").json()["state"] == "ready")
    assert answer(0, "near", policy="exact").status_code == 202
    live.until(lambda: live.client.get("/models/near-0").json()["state"] == "ready")
    assert answer(weights + kv, "tall").status_code == 202


def test_validation_of_one_source_holds_up_nobody(
    live: LiveServer, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def read(path: Path) -> Source:
        if path.name == "far":
            begun.set()
            assert go_on.wait(60)
        return read_source(path)

    monkeypatch.setattr(acceptance, "read_source", read)
    answers: list[httpx.Response] = []
    slow = threading.Thread(target=lambda: answers.append(live.onboard("slow", family / "far")))
    slow.start()
    assert begun.wait(30)
    assert live.onboard("quick", family / "near").status_code == 201
    assert live.client.delete("/models/quick").status_code == 200
    go_on.set()
    slow.join(60)
    assert answers[0].status_code == 201


def test_engine_that_refuses_a_model_fails_the_job_with_its_status(
    live: LiveServer, family: Path
) -> None:
    assert failure(live.onboard(TOO_BIG, family / "near"), 507)["code"] == "insufficient_capacity"
    job = live.client.get("/models/jobs").json()["data"][0]
    assert (job["status"], job["error"]["code"]) == ("failed", "insufficient_capacity")
    assert failure(live.chat(TOO_BIG), 503)["code"] == "not_ready"
    assert live.chat("base").status_code == 200


def test_failed_model_can_be_onboarded_again(live: LiveServer, family: Path) -> None:
    failure(live.onboard("retried", not_finite(family)), 400)
    assert live.onboard("retried", family / "near").status_code == 201


def test_full_onboarding_queue_is_429(family: Path, tmp_path: Path) -> None:
    with live_server(
        tmp_path, root=family, settings={"models": {"onboarding_queue": 1, "root": family}},
        engine_command=MUTE_ENGINE,
    ) as server:  # fmt: skip
        assert server.onboard("one", family / "base", wait=False).status_code == 202
        response = server.onboard("two", family / "near", wait=False)
        assert failure(response, 429)["code"] == "queue_full"
        assert response.headers["Retry-After"] == "1"
        assert failure(server.chat("one"), 503)["code"] == "not_ready"
        assert failure(server.client.delete("/models/one"), 409)["code"] == "conflict"


def test_deleted_model_is_gone_from_every_list(live: LiveServer, family: Path) -> None:
    live.onboard("gone", family / "near")
    reply = live.client.delete("/models/gone")
    assert reply.json() == {"id": "gone", "object": "model", "deleted": True}
    assert failure(live.chat("gone"), 404)["code"] == "model_not_found"
    assert "gone" not in [m["id"] for m in live.client.get("/v1/models").json()["data"]]
    assert 'model="gone"' not in live.client.get("/metrics").text
    assert live.services.registry.model("gone") is None


def test_donor_in_use_is_409_with_its_dependants(server: LiveServer) -> None:
    error = failure(server.client.delete("/v1/models/base"), 409)
    assert "near" in error["message"]


def test_model_of_a_family_root_may_not_exist_twice(live: LiveServer, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "elsewhere")
    assert failure(live.onboard("base", tmp_path / "elsewhere"), 403)["code"] == "forbidden_source"
