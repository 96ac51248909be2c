"""What a server says to `linker top`, made up: the shapes are the gateway's."""

from __future__ import annotations

from typing import Any

MIB = 2**20


def card(name: str, *, donor: str | None = None, **more: Any) -> dict[str, Any]:
    """A model of 100 MiB, of which a variant holds a fourth."""
    logical = 100 * MIB
    unique = logical if donor is None else logical // 4
    return {
        "id": name,
        "state": "ready",
        "family": donor or name,
        "donor": donor,
        "bytes": {"logical": logical, "unique": unique, "shared": logical - unique},
        "blocks": {"alias": 1, "residual": 20, "own": 3, "total": 24},
        "plan": {"price": None if donor is None else {"kl_upper": 0.0081}, "budget_kl": 0.01},
        "pinned": False,
        "last_used_at": None,
        "error": None,
        **more,
    }


def job(model: str, **more: Any) -> dict[str, Any]:
    """A scan that is half way."""
    return {
        "id": f"job-{model}",
        "model": model,
        "status": "running",
        "stage": "scanning",
        "progress": {
            "done_bytes": 50 * MIB,
            "total_bytes": 100 * MIB,
            "bytes_per_second": 10 * MIB,
            "remaining_seconds": 5.0,
        },
        "error": None,
        **more,
    }


def snapshot(*models: dict[str, Any], jobs: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """The first event."""
    return {"type": "snapshot", "models": list(models), "jobs": list(jobs)}


def status(*, at_s: float = 100.0, tokens: int = 1000, **more: Any) -> dict[str, Any]:
    """A server that is ready, whose only variant `chat` has written all tokens."""
    return {
        "type": "status",
        "engine": "running",
        "ready": True,
        "reason": None,
        "device": {
            "name": "cpu",
            "weights": 125 * MIB,
            "kv": 100 * MIB,
            "free": 765 * MIB,
            "other": 10 * MIB,
            "budget": 1000 * MIB,
        },
        "kv_usage_ratio": 0.25,
        "running": 2,
        "waiting": 1,
        "totals": {
            "prompt_tokens": 500,
            "generation_tokens": tokens,
            "requests": 9,
            "preemptions": 0,
            "prefix_queries": 40,
            "prefix_hits": 10,
        },
        "models": {
            "base": {"running": 0, "waiting": 0, "generation_tokens": 0},
            "chat": {"running": 2, "waiting": 1, "generation_tokens": tokens},
        },
        "time": at_s,
        **more,
    }
