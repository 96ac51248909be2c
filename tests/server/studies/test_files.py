from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from linker_core.errors import BadCheckpointError, LinkerError
from server.studies.files import Places
from tests.server.live import LiveServer
from tests.server.studies.copies import card
from tests.server.studies.fake_worker import requests


@pytest.fixture
def live(live: LiveServer) -> LiveServer:
    live.until(lambda: card(live)["state"] == "done")
    return live


def find(live: LiveServer) -> Places:
    studies = live.services.studies
    return live.call(studies._files.find(studies.families()["base"]))


def test_resident_models_are_read_where_they_were_validated(live: LiveServer, root: Path) -> None:
    found = find(live)
    assert found.base.path == root / "base"
    assert {name: place.path for name, place in found.variants.items()} == {
        "near": root / "near",
        "far": root / "far",
    }
    assert found.base.identity == live.served("base").text.identity


@pytest.mark.parametrize("remembered", [True, False])
def test_unloaded_models_are_found_too(live: LiveServer, remembered: bool) -> None:
    before = find(live)
    assert live.client.post("/models/unload", json={"model": "far"}).status_code == 200
    if not remembered:
        live.services.catalog._dormant.clear()
    assert find(live) == before
    assert live.services.catalog.get("far") is None  # nothing was loaded for it


def test_files_that_were_replaced_are_refused_by_the_models_name(
    live: LiveServer, root: Path
) -> None:
    assert live.client.post("/models/unload", json={"model": "far"}).status_code == 200
    live.services.catalog._dormant.clear()
    shutil.copy(root / "near" / "model.safetensors", root / "far" / "model.safetensors")
    with pytest.raises(BadCheckpointError, match=r"^far: its files are not the ones"):
        find(live)
    shutil.rmtree(root / "far")
    with pytest.raises(LinkerError, match=r"^far: ") as caught:
        find(live)
    assert str(root) not in caught.value.message


def test_family_that_was_taken_over_is_compared_with_what_it_shares(
    live: LiveServer, root: Path
) -> None:
    response = live.client.delete("/models/base", params={"rehome": True})
    assert response.status_code == 200, response.text
    [family] = [one["family"] for one in live.client.get("/analysis").json()["data"]]
    assert family in ("near", "far")
    live.until(lambda: card(live, family)["state"] == "done")
    found = card(live, family)
    assert found["base"] is None
    assert sorted(found["variants"]) == ["far", "near"]
    last = requests(root / "base")[-1]
    assert last["base"] == {"name": None, "path": str(root / "base")}
    assert live.client.get("/analysis/base").status_code == 404
