"""GET /analysis, over a whole server; the last test has a real worker, too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.registry.records import Role
from tests.server.keyed import Keyed, give_key
from tests.server.live import LiveServer, live_server
from tests.server.studies.copies import ENABLED, NAMES, card, copied, studying
from tests.server.studies.fake_worker import TENSORS, Behaviour, record_of, requests
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture(scope="module")
def done(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose study is made, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("done")
    with studying(copied(family, folder), folder / "state") as server:
        server.until(lambda: card(server)["state"] == "done")
        yield server


def test_finished_study_is_shown_with_its_age(done: LiveServer) -> None:
    found = card(done)
    assert found["summary"] == {"base": "base", "variants": {"near": {}, "far": {}}}
    assert (found["object"], found["family"], found["base"]) == ("analysis", "base", "base")
    assert found["variants"] == ["near", "far"]
    assert found["is_current"]
    assert found["error"] is found["reason"] is found["progress"] is None
    assert found["started_at"] <= found["finished_at"]
    assert found["age_s"] >= 0.0
    assert "tensors" not in found


def test_tensors_come_in_the_order_of_blocks_if_asked_for(done: LiveServer) -> None:
    assert card(done, include="tensors")["tensors"] == [record_of(name) for name in TENSORS]


def test_families_are_listed_with_why_they_wait(live: LiveServer, root: Path) -> None:
    live.until(lambda: card(live)["state"] == "done")
    make_checkpoint(root / "other", hidden=64, layers=1, seed=3)
    assert live.onboard("acme/other", root / "other").status_code == 201
    listed = live.client.get("/analysis").json()
    assert listed["object"] == "list"
    base, other = listed["data"]
    assert base["family"] == "base"
    assert (other["family"], other["state"], other["left_out"]) == ("acme/other", "waiting", {})
    assert "needs 2 variants" in other["reason"]
    assert card(live, "acme/other") == other | {"summary": None}
    assert card(live, "acme/other", include="tensors") == other | {"summary": None, "tensors": []}


def test_list_has_all_of_a_study_but_what_it_found(done: LiveServer) -> None:
    [listed] = done.client.get("/analysis").json()["data"]
    whole = card(done)
    assert listed["finished_at"] == whole["finished_at"]  # tells of another study
    assert whole.keys() - listed.keys() == {"summary"}


def test_variant_whose_files_are_gone_is_left_out_and_named(live: LiveServer, root: Path) -> None:
    live.until(lambda: card(live)["state"] == "done")
    shutil.rmtree(root / "far")
    make_variant(root / "third", root / "base", scale=0.1, seed=5)
    assert live.onboard("third", root / "third").status_code == 201
    live.until(lambda: card(live)["is_current"] and card(live)["variants"] == ["near", "third"])
    found = card(live)
    assert (found["state"], found["error"], found["reason"]) == ("done", None, None)
    assert list(found["summary"]["variants"]) == ["near", "third"]
    [(name, error)] = found["left_out"].items()
    assert (name, error["code"], error["param"]) == ("far", "bad_checkpoint", None)
    assert error["message"].startswith("far: ")
    assert str(root) not in error["message"]
    [listed] = live.client.get("/analysis").json()["data"]
    assert listed["left_out"] == found["left_out"]


def test_family_with_too_few_that_can_be_read_has_failed(live: LiveServer, root: Path) -> None:
    live.until(lambda: card(live)["state"] == "done")
    shutil.rmtree(root / "far")
    assert live.client.delete("/models/near").status_code == 200
    make_variant(root / "third", root / "base", scale=0.1, seed=5)
    assert live.onboard("third", root / "third").status_code == 201
    live.until(lambda: card(live)["state"] == "failed")
    found = card(live)
    assert found["error"] == found["left_out"]["far"]
    assert "there is 1 that can be read; those left out are tried again" in found["reason"]
    assert (found["variants"], found["summary"]) == (["third"], None)


def test_progress_is_shown_while_a_worker_works(live: LiveServer, root: Path) -> None:
    live.until(lambda: card(live)["state"] == "done")
    Behaviour(records=3, end="wait").tell(root / "base")
    make_variant(root / "third", root / "base", scale=0.1, seed=5)
    assert live.onboard("third", root / "third").status_code == 201
    running = {"done_tensors": 3, "total_tensors": len(TENSORS)}
    live.until(lambda: card(live)["progress"] == running)
    found = card(live)
    assert (found["state"], found["is_current"]) == ("running", False)
    assert found["variants"] == ["near", "far", "third"]
    assert list(found["summary"]["variants"]) == ["near", "far"]  # what there is until then


def test_failure_is_shown_with_its_reason(live: LiveServer, root: Path) -> None:
    live.until(lambda: card(live)["state"] == "done")
    Behaviour(records=1, end="error").tell(root / "base")
    make_variant(root / "third", root / "base", scale=0.1, seed=5)
    assert live.onboard("third", root / "third").status_code == 201
    live.until(lambda: card(live)["state"] == "failed")
    found = card(live)
    assert found["error"] == {"code": "bad_checkpoint", "message": "That is why.", "param": None}
    assert found["reason"].startswith("It is tried again in ")
    assert found["reason"].endswith(" s, or when the family's models have changed.")
    assert live.client.delete("/models/third").status_code == 200
    # The study of what is left is still there.
    live.until(lambda: card(live)["state"] == "done")
    assert card(live)["error"] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody", "no family 'nobody'. GET /analysis lists"),
        ("near", "'near' is of the family 'base'"),
        ("", "no family ''"),
        ("a/b/c", "no family 'a/b/c'"),
    ],
)
def test_unknown_family_is_404(done: LiveServer, name: str, words: str) -> None:
    response = done.client.get(f"/analysis/{name}")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "family",
    )
    assert words in error["message"]


def test_what_cannot_be_included_is_400(done: LiveServer) -> None:
    response = done.client.get("/analysis/base", params={"include": "weights"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "include")


def test_stop_of_the_server_ends_the_worker(root: Path, tmp_path: Path) -> None:
    Behaviour(records=1, end="wait").tell(root / "base")
    with studying(root, tmp_path / "state") as live:
        live.until(lambda: (p := card(live)["progress"]) is not None and p["done_tensors"] == 1)
        pid = requests(root / "base")[0]["pid"]
    assert not Path(f"/proc/{pid}").exists()
    Behaviour().tell(root / "base")
    with studying(root, tmp_path / "state") as live:
        live.until(lambda: card(live)["state"] == "done")
    assert [record["name"] for record in requests(root / "base")[-1]["done"]] == [TENSORS[0]]


def test_watchers_see_studies_and_clients_do_not(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    keys = {role: give_key(state, role).key for role in Role}
    with live_server(state, models={"base": root / "base"}, root=root) as live:
        live.until_ready()
        keyed = Keyed(live, keys, state, "")
        for role, status in [
            (None, 401),
            (Role.CLIENT, 403),
            (Role.METRICS, 200),
            (Role.ADMIN, 200),
        ]:
            for path in ("/analysis", "/analysis/base", "/analysis/base?include=tensors"):
                with keyed.client(role) as client:
                    assert client.get(path).status_code == status


def test_studies_are_off_where_the_settings_say_so(root: Path, tmp_path: Path) -> None:
    models = {name: root / name for name in NAMES}
    with live_server(tmp_path / "state", models=models, root=root) as live:
        live.until_ready()
        found = card(live)
    assert (found["state"], found["summary"]) == ("waiting", None)
    assert found["reason"] == "The setting analysis.enabled is false."


def test_real_study_of_three_variants_is_made_and_shown(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "models" / "base")
    models = {"base": base}
    for seed, name in enumerate(("one", "two", "three"), start=1):
        folder = tmp_path / "models" / name
        models[name] = make_variant(folder, base, scale=0.1 * seed, seed=seed)
    arguments: dict[str, Any] = {"models": models, "settings": ENABLED}
    with live_server(tmp_path / "state", **arguments) as live:
        live.until_ready()
        live.until(lambda: card(live)["state"] in ("done", "failed"))
        found = card(live, include="tensors")
        assert found["state"] == "done", found
        assert len(found["tensors"]) == found["summary"]["num_tensors"] == 14
        layers = [record["layer"] for record in found["tensors"]]
        assert layers == sorted(layers)
        components = found["summary"]["components"]
        # Noise of unlike sizes: the largest carries PC1, and the null knows it.
        assert components["all"]["pc1_centred"] > 0.5
        assert components["all"]["significant_share_centred"] == 0.0
        norms = [found["summary"]["variants"][n]["delta_norm"] for n in ("one", "two", "three")]
        assert norms == sorted(norms)
        stored = found["summary"]
    with live_server(tmp_path / "state", **arguments) as live:
        live.until_ready()
        assert card(live)["summary"] == stored
        assert card(live)["state"] == "done"
