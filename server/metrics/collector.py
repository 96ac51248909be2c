"""Gauges computed at the scrape from the engine's last report and the known models.

A scrape asks the engine nothing and covers models that are not resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from linker_core.engine.messages import Snapshot
from server.registry.records import ModelRecord, ModelState

_KINDS = ("logical", "unique", "shared")


class FleetCollector(Collector):
    """Memory, state and load of every known model.

    Args:
        models: Returns the known models, each with its state as shown to clients.
        twins: Returns the model of every twin, whose memory is its family's, and its load the
            model's.
        snapshot: Returns the engine's last report, or None.
    """

    def __init__(
        self,
        *,
        models: Callable[[], Sequence[ModelRecord]],
        twins: Callable[[], Mapping[str, str]],
        snapshot: Callable[[], Snapshot | None],
    ) -> None:
        self._models = models
        self._twins = twins
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Says nothing in advance; registering would otherwise collect once."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yields every family of gauges."""
        models, snapshot = self._models(), self._snapshot()
        twins = {owner: twin for twin, owner in self._twins().items()}
        yield from _memory(models, snapshot, twins)
        yield from _states(models)
        yield from _load(models, snapshot, twins)


def _memory(
    models: Sequence[ModelRecord], snapshot: Snapshot | None, twins: Mapping[str, str]
) -> Iterator[Metric]:
    weights = GaugeMetricFamily(
        "linker_model_weight_bytes",
        "Weights of a model: what a separate copy would hold, only it holds, the donor holds.",
        labels=["model", "family", "kind"],
    )
    families = GaugeMetricFamily(
        "linker_family_weight_bytes", "Weights that a family holds.", labels=["family"]
    )
    resident: dict[str, int] = {}
    for model in models:
        family = model.family or model.name
        held = None if snapshot is None else snapshot.models.get(model.name)
        resident.setdefault(family, 0)
        for kind in _KINDS:
            weights.add_metric(
                [model.name, family, kind], 0 if held is None else getattr(held, kind)
            )
        if held is not None:
            resident[family] += held.unique
        if snapshot is not None and (twin := snapshot.models.get(twins.get(model.name, ""))):
            resident[family] += twin.unique
    for family, held_bytes in resident.items():
        families.add_metric([family], held_bytes)
    yield from (weights, families)
    device = GaugeMetricFamily(
        "linker_device_memory_bytes", "Memory of the device by use.", labels=["device", "state"]
    )
    if snapshot is not None:
        device.add_metric([snapshot.device, "weights"], snapshot.device_weight_bytes)
        device.add_metric([snapshot.device, "kv"], snapshot.device_kv_bytes)
        device.add_metric([snapshot.device, "free"], snapshot.device_free_bytes)
        # Set aside for other processes, or for what is being loaded.
        others = snapshot.reserved_bytes + snapshot.arriving_bytes
        device.add_metric([snapshot.device, "other"], others)
    yield device


def _states(models: Sequence[ModelRecord]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "linker_model_state", "1 for the state a model is in.", labels=["model", "state"]
    )
    for model in models:
        for state in ModelState:
            states.add_metric([model.name, state.value], float(model.state is state))
    yield states


def _load(
    models: Sequence[ModelRecord], snapshot: Snapshot | None, twins: Mapping[str, str]
) -> Iterator[Metric]:
    for state in ("running", "waiting"):
        gauge = GaugeMetricFamily(
            f"linker_num_requests_{state}", f"Sequences {state} in the engine.", labels=["model"]
        )
        for model in models:
            loads = {} if snapshot is None else snapshot.load
            both = (loads.get(model.name), loads.get(twins.get(model.name, "")))
            total = sum(getattr(load, state) for load in both if load is not None)
            gauge.add_metric([model.name], total)
        yield gauge
    yield GaugeMetricFamily(
        "linker_kv_cache_usage_ratio",
        "KV pages in use, of all.",
        value=0.0 if snapshot is None else snapshot.kv_usage_ratio,
    )
    yield from _totals(snapshot)


def _totals(snapshot: Snapshot | None) -> Iterator[Metric]:
    """Yields what the engine has counted since its start."""
    yield CounterMetricFamily(
        "linker_num_preemptions",
        "Sequences put back to make room since the engine's start.",
        value=0.0 if snapshot is None else snapshot.num_preemptions,
    )
    yield CounterMetricFamily(
        "linker_prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache since the engine's start.",
        value=0.0 if snapshot is None else snapshot.prefix_queries,
    )
    yield CounterMetricFamily(
        "linker_prefix_cache_hits",
        "Prompt tokens found in the prefix cache since the engine's start.",
        value=0.0 if snapshot is None else snapshot.prefix_hits,
    )
