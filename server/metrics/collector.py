"""Gauges computed at the scrape from the engine's last report and the registry's rows.

A scrape asks the engine nothing and covers models that are not resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from linker_core.engine.messages import Snapshot
from server.registry.records import Json, ModelRecord, ModelState
from server.registry.store import Registry

_KINDS = ("logical", "unique", "shared")
_RUNGS = ("alias", "residual", "own")
# cos and ε of every block of one variant, in order.
BlockScores = Sequence[tuple[float, float]]


class FleetCollector(Collector):
    """Memory, state, sharing and load of every known model.

    Args:
        models: Returns the known models, each with its state as shown to clients.
        snapshot: Returns the engine's last report, or None.
        registry: Where the scans are.
    """

    def __init__(
        self,
        *,
        models: Callable[[], Sequence[ModelRecord]],
        snapshot: Callable[[], Snapshot | None],
        registry: Registry,
    ) -> None:
        self._models = models
        self._snapshot = snapshot
        self._registry = registry
        self._scores: dict[tuple[str, str], BlockScores] = {}

    def describe(self) -> Iterable[Metric]:
        """Says nothing in advance; registering would otherwise collect once."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yields every family of gauges."""
        models, snapshot = self._models(), self._snapshot()
        yield from _memory(models, snapshot)
        yield from _states(models)
        yield from _load(models, snapshot)
        yield from self._sharing(models)

    def _sharing(self, models: Sequence[ModelRecord]) -> Iterator[Metric]:
        blocks = GaugeMetricFamily(
            "linker_model_blocks",
            "Blocks by the rung they are stored at.",
            labels=["model", "rung"],
        )
        cosine = GaugeMetricFamily(
            "linker_block_cosine", "Cosine of a block and the donor's.", labels=["model", "block"]
        )
        epsilon = GaugeMetricFamily(
            "linker_block_epsilon",
            "Relative Frobenius distance of a block from the donor's.",
            labels=["model", "block"],
        )
        for model in models:
            if model.plan is None:
                continue
            for rung in _RUNGS:
                blocks.add_metric([model.name, rung], model.plan["blocks"][rung])
            for index, (cos, eps) in enumerate(self._block_scores(model.plan)):
                cosine.add_metric([model.name, str(index)], cos)
                epsilon.add_metric([model.name, str(index)], eps)
        yield from (blocks, cosine, epsilon)

    def _block_scores(self, plan: Json) -> BlockScores:
        donor, variant = plan["donor_fingerprint"], plan["variant_fingerprint"]
        if donor is None:
            return ()
        if (donor, variant) not in self._scores:
            report = self._registry.scan(donor, variant)
            rows = () if report is None else report["blocks"]
            self._scores[donor, variant] = [(row["cos"], row["epsilon"]) for row in rows]
        return self._scores[donor, variant]


def _memory(models: Sequence[ModelRecord], snapshot: Snapshot | None) -> Iterator[Metric]:
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
    yield device


def _states(models: Sequence[ModelRecord]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "linker_model_state", "1 for the state a model is in.", labels=["model", "state"]
    )
    for model in models:
        for state in ModelState:
            states.add_metric([model.name, state.value], float(model.state is state))
    yield states


def _load(models: Sequence[ModelRecord], snapshot: Snapshot | None) -> Iterator[Metric]:
    for state in ("running", "waiting"):
        gauge = GaugeMetricFamily(
            f"linker_num_requests_{state}", f"Sequences {state} in the engine.", labels=["model"]
        )
        for model in models:
            load = None if snapshot is None else snapshot.load.get(model.name)
            gauge.add_metric([model.name], 0 if load is None else getattr(load, state))
        yield gauge
    yield GaugeMetricFamily(
        "linker_kv_cache_usage_ratio",
        "KV pages in use, of all.",
        value=0.0 if snapshot is None else snapshot.kv_usage_ratio,
    )
    yield CounterMetricFamily(
        "linker_num_preemptions",
        "Sequences put back to make room since the engine's start.",
        value=0.0 if snapshot is None else snapshot.num_preemptions,
    )
