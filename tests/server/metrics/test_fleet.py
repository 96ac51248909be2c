"""The gauges of models and memory, of reports that are made up."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from linker_core.engine.messages import ModelBytes, ModelLoad, Snapshot
from server.metrics.fleet import FleetSeries
from server.metrics.view import View
from server.registry.records import ModelRecord, ModelState

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def record(name: str, **more: Any) -> ModelRecord:
    fields = {"state": ModelState.READY, **more}
    return ModelRecord(name=name, source="", request={}, position=0, created_at=0.0, **fields)


def report(**more: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "models": {}, "load": {}, "device": "cpu", "device_weight_bytes": 300,
        "device_kv_bytes": 50, "device_free_bytes": 500, "reserved_bytes": 120,
        "kv_usage_ratio": 0.0, "num_preemptions": 0,
    }  # fmt: skip
    return Snapshot(**{**fields, **more})


def view(*models: ModelRecord, snapshot: Snapshot | None, **more: Any) -> View:
    return View(models=models, snapshot=snapshot, engine_up=True, engine_restarts=0, **more)


def text(fleet: FleetSeries, seen: View) -> str:
    return "".join(fleet.render(seen))


def values(said: str) -> Values:
    """The samples, as a Prometheus reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(said)
        for sample in family.samples
    }


def of(found: Values, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_all_states_of_the_devices_memory_add_up_to_the_budget() -> None:
    found = values(text(FleetSeries(), view(snapshot=report(arriving_bytes=30))))
    memory = {
        state: of(found, "linker_device_memory_bytes", device="cpu", state=state)
        for state in ("weights", "kv", "free", "other")
    }
    assert memory == {"weights": 300, "kv": 50, "free": 500, "other": 120 + 30}


def test_twin_is_its_models_load_and_its_familys_memory() -> None:
    snapshot = report(
        models={
            "base": ModelBytes(logical=100, unique=100, shared=0),
            "near": ModelBytes(logical=100, unique=7, shared=93),
            "near (unshared)": ModelBytes(logical=100, unique=60, shared=40),
        },
        load={
            "near": ModelLoad(running=2, waiting=1),
            "near (unshared)": ModelLoad(running=3, waiting=4),
        },
    )
    models = (record("base"), record("near", donor="base", family="base"))
    twins = {"near (unshared)": "near"}
    said = text(FleetSeries(), view(*models, snapshot=snapshot, twins=twins))
    found = values(said)
    labels = {"family": "base", "model": "near"}
    held = [
        of(found, "linker_model_weight_bytes", kind=kind, **labels)
        for kind in ("logical", "unique", "shared")
    ]
    assert held == [100, 7, 93]
    assert of(found, "linker_family_weight_bytes", family="base") == 100 + 7 + 60
    assert of(found, "linker_num_requests_running", model="near") == 5
    assert of(found, "linker_num_requests_waiting", model="near") == 5
    assert "unshared" not in said


@pytest.mark.parametrize("snapshot", [None, report()])
def test_model_that_is_not_resident_holds_nothing(snapshot: Snapshot | None) -> None:
    models = (record("gone", state=ModelState.UNLOADED),)
    found = values(text(FleetSeries(), view(*models, snapshot=snapshot)))
    labels = {"family": "gone", "model": "gone"}
    for kind in ("logical", "unique", "shared"):
        assert of(found, "linker_model_weight_bytes", kind=kind, **labels) == 0
    assert of(found, "linker_num_requests_running", model="gone") == 0
    states = {
        state: of(found, "linker_model_state", model="gone", state=state) for state in ModelState
    }
    assert states == {state: float(state is ModelState.UNLOADED) for state in ModelState}


def test_without_an_engine_nothing_is_said_of_a_device() -> None:
    assert "linker_device_memory_bytes{" not in text(FleetSeries(), view(snapshot=None))


def test_series_come_move_and_go_with_the_model() -> None:
    fleet = FleetSeries()
    near = record("near", donor="base", family="base")
    assert 'family="base",kind="unique",model="near"' in text(fleet, view(near, snapshot=None))
    moved = text(fleet, view(record("near"), snapshot=None))
    assert 'family="near",kind="unique",model="near"' in moved
    assert 'family="base"' not in moved
    assert "near" not in text(fleet, view(snapshot=None))
