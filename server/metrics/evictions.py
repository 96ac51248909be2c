"""How often models left the device, and why."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter


class EvictionReason(StrEnum):
    """Why a model left the device, while its row stayed."""

    CAPACITY = "capacity"  # another needed the room
    IDLE = "idle"  # nobody asked for it for as long as it was to be kept
    REQUEST = "request"  # an operator said so


class EvictionMetrics:
    """Counts evictions.

    Args:
        registry: Where the metric is exposed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._evictions = Counter(
            "linker_evictions", "Models that left the device, by why.", ["reason"],
            registry=registry,
        )  # fmt: skip
        for reason in EvictionReason:
            self._evictions.labels(reason.value)

    def evicted(self, reason: EvictionReason) -> None:
        """Counts a model that has left."""
        self._evictions.labels(reason.value).inc()
