"""How often models left the device, and why."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter

from server.metrics.families import FAMILIES


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
        left = FAMILIES["linker_evictions_total"]
        self._evictions = Counter(left.name, left.help, left.labels, registry=registry)
        for reason in EvictionReason:
            self._evictions.labels(reason.value)

    def evicted(self, reason: EvictionReason) -> None:
        """Counts a model that has left."""
        self._evictions.labels(reason.value).inc()
