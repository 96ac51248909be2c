"""The gauges of the device's memory, of a report that is made up."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from linker_core.engine.messages import Snapshot
from server.metrics.collector import FleetCollector


def test_all_states_of_the_devices_memory_add_up_to_the_budget() -> None:
    report = Snapshot(
        models={},
        load={},
        device="cpu",
        device_weight_bytes=300,
        device_kv_bytes=50,
        device_free_bytes=500,
        reserved_bytes=120,
        arriving_bytes=30,
        kv_usage_ratio=0.0,
        num_preemptions=0,
    )
    registry = CollectorRegistry()
    registry.register(FleetCollector(models=list, twins=dict, snapshot=lambda: report))
    found = {
        state: registry.get_sample_value(
            "linker_device_memory_bytes", {"device": "cpu", "state": state}
        )
        for state in ("weights", "kv", "free", "other")
    }
    assert found == {"weights": 300, "kv": 50, "free": 500, "other": 120 + 30}
