from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from linker_core.errors import BadCheckpointError, LinkerError
from server.studies.families import Member
from server.studies.files import Places, Stamp, UnfitError
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


def unfit(live: LiveServer) -> Mapping[str, LinkerError]:
    with pytest.raises(UnfitError) as caught:
        find(live)
    return caught.value.errors


def stamp(live: LiveServer, name: str) -> Stamp:
    return live.call(live.services.studies._files.stamp(Member(name=name, fingerprint="")))


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
    assert unfit(live)["far"].message.startswith("far: its files are not the ones")
    shutil.rmtree(root / "far")
    [(name, error)] = unfit(live).items()
    assert (name, error.code) == ("far", "bad_checkpoint")
    assert error.message.startswith("far: ")
    assert str(root) not in error.message


def test_all_variants_with_other_files_are_named_at_once(live: LiveServer, root: Path) -> None:
    shutil.rmtree(root / "near")  # resident: its files were open once, and are not any more
    weights = root / "far" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert sorted(unfit(live)) == ["far", "near"]


def test_base_with_other_files_is_refused(live: LiveServer, root: Path) -> None:
    shutil.copy(root / "near" / "model.safetensors", root / "base" / "model.safetensors")
    with pytest.raises(BadCheckpointError, match=r"^base: its files are not the ones"):
        find(live)


def test_files_that_were_put_back_are_found_again(live: LiveServer, root: Path) -> None:
    before = find(live)
    (root / "far").rename(root / "away")
    assert list(unfit(live)) == ["far"]
    shutil.copytree(root / "away", root / "far")  # to the system, these are others
    found = find(live)
    assert found.variants["near"] == before.variants["near"]
    assert found.variants["far"].identity != before.variants["far"].identity


def test_stamp_follows_the_files_of_a_variant(live: LiveServer, root: Path) -> None:
    first = stamp(live, "far")
    assert first == stamp(live, "far") != stamp(live, "near")
    (root / "far" / "config.json").touch()
    second = stamp(live, "far")
    assert second != first
    shutil.rmtree(root / "far")
    assert stamp(live, "far") == stamp(live, "nobody") == ()


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
