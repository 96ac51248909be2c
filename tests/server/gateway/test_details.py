"""GET /models?include=…: blocks, tensors and the plans that were priced."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from linker_core.errors import NotReadyError
from linker_core.sharing.similarity import PairSums
from linker_core.weights.checkpoint import Checkpoint
from server.gateway.details import Details
from server.registry.records import ModelRecord
from server.registry.store import Registry
from server.registry.tables import ScanRow, TuningRow
from tests.server.fake_tuner import KL, KL_UPPER
from tests.server.live import LiveServer, live_server
from tests.tiny import make_variant

_UP = "model.layers.1.mlp.up_proj.weight"
_BOTH = {"include": ["blocks", "frontier"]}


@contextmanager
def tuning_server(state: Path, family: Path) -> Iterator[LiveServer]:
    with live_server(
        state, models={"base": family / "base"}, root=family,
        settings={"sharing": {"policy": "budget"}},
    ) as server:  # fmt: skip
        server.until_ready()
        server.onboard("near", family / "near").raise_for_status()
        yield server


@pytest.fixture(scope="module")
def live(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that tests ask and leave as it is."""
    with tuning_server(tmp_path_factory.mktemp("details"), family) as server:
        yield server


@pytest.fixture
def own(family: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server of one test alone."""
    with tuning_server(tmp_path, family) as server:
        yield server


def details(live: LiveServer, name: str, *include: str) -> dict[str, Any]:
    response = live.client.get(f"/models/{name}", params={"include": list(include)})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["details"]
    assert set(found) == set(include)
    return found


def test_nothing_is_added_that_nobody_asked_for(live: LiveServer) -> None:
    assert "details" not in live.client.get("/models/near").json()
    assert all("details" not in card for card in live.client.get("/models").json()["data"])


def test_blocks_are_those_of_the_scan_with_the_rungs_of_the_plan(
    live: LiveServer, family: Path
) -> None:
    planned = live.client.post("/models/plan", json={"source": str(family / "near")}).json()
    blocks = details(live, "near", "blocks")["blocks"]
    for block, dry in zip(blocks, planned["blocks"], strict=True):
        assert {key: block[key] for key in ("index", "cos", "rung")} == {
            key: dry[key] for key in ("index", "cos", "rung")
        }
        assert block["epsilon"] > 0
        assert block["unique_bytes"] == 0
    assert [block["index"] for block in blocks] == [0, 1]


def test_a_block_holds_what_its_tensors_on_own_rungs_hold(own: LiveServer, family: Path) -> None:
    mixed = make_variant(family / "own-up", family / "base", scale={_UP: 0.1})
    own.onboard("mixed", mixed, policy="exact").raise_for_status()
    with Checkpoint.open(mixed) as checkpoint:
        held = checkpoint.tensors[_UP].nbytes
    found = details(own, "mixed", "blocks", "frontier")
    assert [(b["rung"], b["unique_bytes"]) for b in found["blocks"]] == [
        ("alias", 0),
        ("own", held),
    ]
    assert found["frontier"] is None  # nothing was priced


def test_donor_is_compared_with_nothing(live: LiveServer) -> None:
    found = details(live, "base", "blocks", "frontier", "tensors")
    assert {(b["cos"], b["epsilon"], b["rung"]) for b in found["blocks"]} == {(None, None, "own")}
    assert {(t["cos"], t["rung"]) for t in found["tensors"]} == {(None, "own")}
    assert found["frontier"] is None


def test_frontier_is_the_tuners_with_the_plan_marked(live: LiveServer) -> None:
    card = live.client.get("/models/near", params=_BOTH).json()
    points = card["details"]["frontier"]
    assert [point["origin"] for point in points] == ["all blocks", "identical bytes alone"]
    assert [point["chosen"] for point in points] == [True, False]
    assert points[0]["unique_bytes"] == card["bytes"]["unique"]
    assert (points[0]["kl"], points[0]["kl_upper"]) == (KL, KL_UPPER)
    assert (points[0]["top1"], points[0]["ppl_ratio"]) == (1 - KL, 1 + KL)
    assert points[0]["rung_bytes"] == card["plan"]["rung_bytes"]
    assert points[0]["unique_bytes"] < points[1]["unique_bytes"]


def test_frontier_is_that_of_the_plans_own_goal(own: LiveServer) -> None:
    changed = own.client.patch("/models/near", params={"wait": True}, json={"budget_kl": 0.001})
    assert changed.status_code == 200, changed.text
    assert [p["chosen"] for p in details(own, "near", "frontier")["frontier"]] == [False, True]
    changed = own.client.patch("/models/near", params={"wait": True}, json={"budget_kl": 0.02})
    assert changed.status_code == 200, changed.text
    assert [p["chosen"] for p in details(own, "near", "frontier")["frontier"]] == [True, False]


def test_tensors_are_every_one_of_the_plan_with_the_scans_numbers(live: LiveServer) -> None:
    found = details(live, "near", "blocks", "tensors")
    tensors = found["tensors"]
    plan = live.services.roster.model("near").plan
    assert plan is not None
    assert {t["name"]: t["rung"] for t in tensors} == plan["rungs"]
    assert [t["block"] for t in tensors if t["section"] == "blocks"] == sorted(
        t["block"] for t in tensors if t["section"] == "blocks"
    )
    for block in found["blocks"]:
        own = [t for t in tensors if t["block"] == block["index"]]
        assert sum(t["cos"] for t in own) / len(own) == pytest.approx(block["cos"], abs=1e-12)
        assert sum(t["epsilon"] for t in own) / len(own) == pytest.approx(block["epsilon"])
    assert {t["parameter"] for t in tensors} >= {"mlp.up_proj.weight", "self_attn.q_proj.bias"}


def test_list_has_the_details_of_every_model(live: LiveServer) -> None:
    cards = live.client.get("/models", params=_BOTH).json()["data"]
    alone = [live.client.get(f"/models/{name}", params=_BOTH).json() for name in ("base", "near")]
    assert [card["details"] for card in cards] == [card["details"] for card in alone]


@pytest.mark.parametrize(
    ("path", "what", "known"),
    [
        ("/models/near", "rungs", "'blocks', 'frontier' or 'tensors'"),
        ("/models/near", "", "'blocks', 'frontier' or 'tensors'"),
        ("/models", "rungs", "'blocks' or 'frontier'"),
        ("/models", "tensors", "of one model, GET /models/{name}?include=tensors; of all"),
    ],
)
def test_what_cannot_be_included_is_refused_with_what_can(
    live: LiveServer, path: str, what: str, known: str
) -> None:
    response = live.client.get(path, params={"include": ["blocks", what]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "include"
    assert known in error["message"]


_SUMS = tuple(PairSums.__dataclass_fields__)
_DAMAGED: tuple[dict[str, Any], ...] = (
    {},
    {"blocks": 3, "chosen": 3},
    {"blocks": [{"index": 0}], "chosen": {"rungs": {}}},
    {"blocks": [{"index": 0, "cos": "x", "epsilon": 1}], "outside_blocks": [], "frontier": 1},
    {"blocks": [{"index": 0, "cos": "nan", "epsilon": 1}], "outside_blocks": {"a": {}}},
    *({"blocks": [], "outside_blocks": {_UP: dict.fromkeys(_SUMS, odd)}} for odd in ("x", -1.0)),
)


def test_damaged_rows_leave_blanks(own: LiveServer) -> None:
    registry, catalog = own.services.registry, own.services.catalog
    record = own.services.roster.model("near")
    for damaged in _DAMAGED:
        with Session(registry._engine) as session, session.begin():
            session.execute(update(ScanRow).values(report=damaged))
            session.execute(update(TuningRow).values(result=damaged))
        found = own.call(Details(registry, catalog).of(record, ["blocks", "frontier", "tensors"]))
        cells = {(b["cos"], b["epsilon"], b["rung"]) for b in found["blocks"]}
        assert cells == {(None, None, "alias")}, damaged
        assert {t["cos"] for t in found["tensors"]} == {None}, damaged
        assert found["frontier"] is None, damaged


def test_frontier_with_a_number_that_is_none_is_none(own: LiveServer) -> None:
    with Session(own.services.registry._engine) as session, session.begin():
        row = session.query(TuningRow).one()
        result = {**row.result, "frontier": [{**row.result["frontier"][0], "kl": "nan"}]}
        session.execute(update(TuningRow).values(result=result))
    assert details(own, "near", "frontier")["frontier"] is None


def test_rows_are_read_once_for_a_plan(own: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    scan, tuning = Registry.scan, Registry.newest_tuning

    def noting_scan(registry: Registry, *rest: Any) -> Any:
        reads.append("scan")
        return scan(registry, *rest)

    def noting_tuning(registry: Registry, *rest: Any, **more: Any) -> Any:
        reads.append("tuning")
        return tuning(registry, *rest, **more)

    monkeypatch.setattr(Registry, "scan", noting_scan)
    monkeypatch.setattr(Registry, "newest_tuning", noting_tuning)
    for _ in range(3):
        own.client.get("/models", params=_BOTH).raise_for_status()
    assert reads == ["scan", "tuning"]
    assert set(details(own, "near", *(["tensors"] * 100))) == {"tensors"}
    assert reads == ["scan", "tuning", "scan"]  # once, however often it was said
    assert own.client.delete("/models/near").status_code == 200
    own.client.get("/models", params=_BOTH).raise_for_status()
    assert reads == ["scan", "tuning", "scan"]


def test_those_who_ask_at_once_wait_for_one_reading(
    own: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    is_failing = True
    scan = Registry.scan

    def noting(registry: Registry, donor: str, variant: str) -> Any:
        reads.append(variant)
        if is_failing:
            raise NotReadyError("The registry cannot be used at the moment; try again later.")
        return scan(registry, donor, variant)

    monkeypatch.setattr(Registry, "scan", noting)
    details = Details(own.services.registry, own.services.catalog)
    record = own.services.roster.model("near")

    async def ask_ten() -> list[Any]:
        asked = [details.of(record, ["blocks"]) for _ in range(10)]
        found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        return found

    assert {type(found) for found in own.call(ask_ten())} == {NotReadyError}
    assert len(reads) == 1
    is_failing = False
    found = own.call(ask_ten())  # a failure is not kept
    assert len(found) == 10
    assert all(each["blocks"] == found[0]["blocks"] != [] for each in found)
    own.call(ask_ten())
    assert len(reads) == 2


def test_model_that_goes_while_details_are_read_is_listed_as_it_was(
    own: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    details_of, is_there = Details.of, True

    async def deleting(self: Details, record: ModelRecord, include: Any) -> dict[str, Any]:
        nonlocal is_there
        if is_there:
            is_there = False
            await own.services.onboarder.delete("near", rehome=False)
        return await details_of(self, record, include)

    before = own.client.get("/models", params=_BOTH).json()["data"]
    assert [card["id"] for card in before] == ["base", "near"]
    monkeypatch.setattr(Details, "of", deleting)
    during = own.client.get("/models", params=_BOTH).json()["data"]
    assert [set(card) for card in during] == [set(card) for card in before]
    assert [card["plan"] for card in during] == [card["plan"] for card in before]
    assert during[1]["details"]["blocks"] is not None
    assert [card["id"] for card in own.client.get("/models").json()["data"]] == ["base"]


def test_registry_that_cannot_be_read_is_told_and_records_are_shown_without_it(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotReadyError("The registry cannot be used at the moment; try again later.")

    monkeypatch.setattr(Registry, "scan", fail)
    refused = live.client.get("/models/near", params={"include": "tensors"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, NotReadyError.code)
    assert live.client.get("/models/near").status_code == 200
