"""What a server says of its models, jobs and itself, as far as a terminal shows it.

Knows no HTTP and draws nothing. Texts are shown as they are read here, so nothing that a terminal
would obey is left in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]

_SHOWN_CHARS = 300


def shown_text(text: str) -> str:
    """Returns a text of a server's with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:_SHOWN_CHARS])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a model, in bytes as it is, or would be, resident."""

    logical: int  # what a separate copy would hold
    unique: int
    shared: int

    @classmethod
    def of_json(cls, said: Json) -> Sizes:
        """Reads the `bytes` of a model's card."""
        return cls(logical=said["logical"], unique=said["unique"], shared=said["shared"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model as operators see it."""

    name: str
    state: str
    family: str
    donor: str | None  # None: it is one itself
    sizes: Sizes | None  # None: not planned yet
    rungs: Mapping[str, int]  # blocks by rung; none before it is planned
    kl_upper: float | None  # nats per token
    budget_kl: float | None
    is_pinned: bool
    last_used_at: float | None  # seconds since the epoch
    error: str | None

    @classmethod
    def of_json(cls, card: Json) -> Model:
        """Reads a model's card."""
        plan, blocks, sizes = card["plan"] or {}, card["blocks"] or {}, card["bytes"]
        price, error = plan.get("price"), card["error"]
        return cls(
            name=shown_text(card["id"]),
            state=shown_text(card["state"]),
            family=shown_text(card["family"] or ""),
            donor=None if card["donor"] is None else shown_text(card["donor"]),
            sizes=None if sizes is None else Sizes.of_json(sizes),
            rungs={rung: blocks[rung] for rung in ("alias", "residual", "own") if rung in blocks},
            kl_upper=None if price is None else float(price["kl_upper"]),
            budget_kl=plan.get("budget_kl"),
            is_pinned=bool(card["pinned"]),
            last_used_at=card["last_used_at"],
            error=None if error is None else shown_text(error["message"]),
        )

    @property
    def is_resident(self) -> bool:
        """Whether its weights are on the device."""
        return self.state == "ready"

    @property
    def is_over_budget(self) -> bool:
        """Whether what it costs is more than it was allowed to."""
        if self.kl_upper is None or self.budget_kl is None:
            return False
        return self.kl_upper > self.budget_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One onboarding, or another change of a model."""

    id: str
    model: str
    status: str
    stage: str
    done_bytes: int
    total_bytes: int
    bytes_per_second: float | None
    remaining_s: float | None
    error: str | None

    @classmethod
    def of_json(cls, card: Json) -> Job:
        """Reads a job's card."""
        progress, error = card["progress"], card["error"]
        return cls(
            id=shown_text(card["id"]),
            model=shown_text(card["model"]),
            status=shown_text(card["status"]),
            stage=shown_text(card["stage"]),
            done_bytes=progress["done_bytes"],
            total_bytes=progress["total_bytes"],
            bytes_per_second=progress["bytes_per_second"],
            remaining_s=progress["remaining_seconds"],
            error=None if error is None else shown_text(error["message"]),
        )

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.status == "failed"

    @property
    def is_live(self) -> bool:
        """Whether it is still to end."""
        return self.status in ("queued", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the memory that the engine works in holds, in bytes."""

    name: str
    weights: int
    kv: int
    free: int
    other: int

    @classmethod
    def of_json(cls, said: Json) -> Device:
        """Reads the `device` of a status."""
        return cls(
            name=shown_text(said["name"]),
            weights=said["weights"],
            kv=said["kv"],
            free=said["free"],
            other=said["other"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What runs on one model, or on all of them, and what it has written since the start."""

    running: int
    waiting: int
    generation_tokens: int

    @classmethod
    def of_json(cls, said: Json) -> Load:
        """Reads an entry of a status's `models`."""
        return cls(
            running=said["running"],
            waiting=said["waiting"],
            generation_tokens=said["generation_tokens"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How the server itself does."""

    engine: str
    is_ready: bool
    reason: str | None  # why it is not, or what it cannot do
    device: Device | None
    kv_usage_ratio: float | None
    running: int
    waiting: int
    totals: Mapping[str, int]
    models: Mapping[str, Load]
    at_s: float  # of the server's monotonic clock

    @classmethod
    def of_json(cls, said: Json) -> Status:
        """Reads a `status` event."""
        device, reason = said["device"], said["reason"]
        return cls(
            engine=shown_text(said["engine"]),
            is_ready=bool(said["ready"]),
            reason=None if reason is None else shown_text(reason),
            device=None if device is None else Device.of_json(device),
            kv_usage_ratio=said["kv_usage_ratio"],
            running=said["running"],
            waiting=said["waiting"],
            totals=said["totals"],
            models={shown_text(name): Load.of_json(load) for name, load in said["models"].items()},
            at_s=said["time"],
        )
