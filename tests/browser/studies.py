"""Studies of families as the server tells of them."""

from __future__ import annotations

from typing import Any

from tests.server.summaries import summary_of


def study_card(base: str, *variants: str, **more: Any) -> dict[str, Any]:
    """Returns a study that has ended, as `GET /analysis` lists it."""
    return {
        "object": "analysis",
        "family": base,
        "state": "done",
        "reason": None,
        "error": None,
        "base": base,
        "variants": list(variants),
        "same_weights": {},
        "progress": None,
        "is_current": True,
        "started_at": 10.0,
        "finished_at": 20.0,
        "age_s": 5.0,
        "summary": summary_of(base, *variants),
        **more,
    }
