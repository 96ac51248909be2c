"""Reads a report as a program does: its tables, figures and everything it names from outside."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

_LOADING = ("src", "href", "action", "data", "poster", "srcset", "xlink:href", "background")


class Reading(HTMLParser):
    """What a page holds.

    Attributes:
        addresses: Everything that an attribute names, anchors within the page left out.
        rows: Cells of every table row, as text.
        headings: Of the sections.
        specs: What the figures are drawn from.
        plots: Ids of the places where they are drawn.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.specs: dict[str, Any] = {}
        self.plots: list[str] = []
        self.policy = ""
        self.open_tags: list[str] = []
        self._figures = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.addresses += [
            named[name] for name in _LOADING if name in named and not named[name].startswith("#")
        ]
        if tag not in ("meta", "link", "br"):
            self.open_tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if named.get("class") == "plot":
            self.plots.append(named["id"])
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]
        self._figures = named.get("id") == "figures"

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self.open_tags[-1] if self.open_tags else ""
        if tag in ("td", "th"):
            self.rows[-1][-1] += data
        if tag == "h2":
            self.headings[-1] += data
        if tag == "script" and self._figures:
            self.specs = json.loads(data)
