"""How the server is at this moment: what the page and the terminal show of it between two scrapes.

Counts nothing itself: everything here is the engine's last report or what requests were counted as.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from linker_core.engine.messages import ModelLoad, Snapshot
from server.gateway.services import Services

_APART_S = 1.0  # between two statuses
# After which the same is told again: a follower that hears nothing for longer has lost the server.
SILENT_S = 15.0
_IDLE = ModelLoad(running=0, waiting=0)


class Status:
    """How the server is, looked up once a second for all who follow it.

    Args:
        services: The server's parts.
        clock: Monotonic seconds.
    """

    def __init__(self, services: Services, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._services = services
        self.clock = clock
        self._card: dict[str, Any] | None = None
        self._looked_at = 0.0

    def look(self, *, afresh: bool) -> tuple[dict[str, Any], float]:
        """Returns the status and when it was so, less than a second ago; or now, if afresh."""
        now = self.clock()
        if self._card is None or afresh or now - self._looked_at >= _APART_S:
            self._card, self._looked_at = status_card(self._services), now
        return self._card, self._looked_at


class StatusNews:
    """Says to one follower how the server is, whenever that is news.

    It is news while something changes, at most once a second, and once more when nothing has
    changed since, so that what grows per second is seen to grow no more; and every `SILENT_S`.

    Args:
        status: Which all followers share.
    """

    def __init__(self, status: Status) -> None:
        self._status = status
        self._told: dict[str, Any] | None = None
        self._was_moving = False
        self._looked_at = 0.0
        self._told_at = 0.0

    def take(self) -> dict[str, Any] | None:
        """Returns the status if it is news now, and None if not."""
        now, is_first = self._status.clock(), self._told is None
        if not is_first and now - self._looked_at < _APART_S:
            return None
        self._looked_at = now
        # Another one each time: what is shared is younger than the last look of each follower.
        status, looked_at = self._status.look(afresh=is_first)
        is_moving = status != self._told
        if not is_moving and not self._was_moving and now - self._told_at < SILENT_S:
            return None
        self._told, self._told_at = status, now
        self._was_moving = is_moving and not is_first
        return {"type": "status", **status, "time": looked_at}


def status_card(services: Services) -> dict[str, Any]:
    """Returns engine, readiness, memory, load and totals."""
    snapshot, total = services.engine.snapshot, services.metrics.total
    not_ready = services.why_not_ready()
    models = _models(services, snapshot)
    return {
        "engine": services.engine.state.value,
        "ready": not_ready is None,
        "reason": not_ready or services.why_degraded(),
        "device": None if snapshot is None else _device(snapshot),
        "kv_usage_ratio": 0.0 if snapshot is None else snapshot.kv_usage_ratio,
        "running": sum(model["running"] for model in models.values()),
        "waiting": sum(model["waiting"] for model in models.values()),
        "totals": {
            "prompt_tokens": total.prompt_tokens,
            "generation_tokens": total.generation_tokens,
            "requests": total.requests,
            "preemptions": 0 if snapshot is None else snapshot.num_preemptions,
            "prefix_queries": 0 if snapshot is None else snapshot.prefix_queries,
            "prefix_hits": 0 if snapshot is None else snapshot.prefix_hits,
        },
        "models": models,
    }


def _device(snapshot: Snapshot) -> dict[str, Any]:
    parts = {
        "weights": snapshot.device_weight_bytes,
        "kv": snapshot.device_kv_bytes,
        "free": snapshot.device_free_bytes,
        # Set aside for other processes, or for what is being loaded.
        "other": snapshot.reserved_bytes + snapshot.arriving_bytes,
    }
    return {"name": snapshot.device, **parts, "budget": sum(parts.values())}


def _models(services: Services, snapshot: Snapshot | None) -> dict[str, Any]:
    """Returns the load of every known model; a twin's is its owner's."""
    loads: Mapping[str, ModelLoad] = {} if snapshot is None else snapshot.load
    twins = {owner: twin for twin, owner in services.twin_rows.owners().items()}
    shown: dict[str, Any] = {}
    for model in services.roster.models():
        both = (loads.get(model.name, _IDLE), loads.get(twins.get(model.name, ""), _IDLE))
        shown[model.name] = {
            "running": sum(load.running for load in both),
            "waiting": sum(load.waiting for load in both),
            "generation_tokens": services.metrics.counted(model.name).generation_tokens,
        }
    return shown
