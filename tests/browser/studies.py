"""Studies of families as the server tells of them."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from playwright.sync_api import Page, Route

from tests.server.summaries import summary_of


def study_card(base: str, *variants: str, **more: Any) -> dict[str, Any]:
    """Returns a study that has ended, as `GET /analysis/{family}` has it."""
    summary = more.pop("summary", summary_of(base, *variants))
    return {
        "object": "analysis",
        "family": base,
        "state": "done",
        "reason": None,
        "error": None,
        "base": base,
        "variants": list(variants),
        "same_weights": {},
        "left_out": {},
        "progress": None,
        "is_current": True,
        "started_at": 10.0,
        "finished_at": None if summary is None else 20.0,
        "age_s": None if summary is None else 5.0,
        "summary": summary,
        **more,
    }


def answer_studies(page: Page, *cards: dict[str, Any]) -> list[str]:
    """Has a page see these studies, as the server would tell it; returns whose it asks for."""
    asked: list[str] = []

    def answer_one(route: Route) -> None:
        asked.append(unquote(urlsplit(route.request.url).path.removeprefix("/analysis/")))
        route.fulfill(json=next(card for card in cards if card["family"] == asked[-1]))

    listed = [{key: card[key] for key in card if key != "summary"} for card in cards]
    page.route("**/analysis", lambda route: route.fulfill(json={"object": "list", "data": listed}))
    page.route("**/analysis/**", answer_one)
    return asked
