"""Sections -> one HTML page that loads nothing: styles, script, Plotly and numbers are inside.

A content security policy in the page forbids it every request, so that what a library could ask
for is never asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, Final

import plotly.io
from plotly.offline import get_plotlyjs

from analysis.report.content import Cell, Figure, Section, Table, text_of

_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
_THEMES: Final = {"light": "plotly_white", "dark": "plotly_dark"}


def render_page(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    """Returns the page.

    Args:
        title: Of the page.
        facts: Short ones below the title: what was studied, when, by which command.
        sections: In their order.
    """
    figures = [figure for section in sections for figure in section.figures]
    numbers = iter(range(len(figures)))
    body = [_section(number, section, numbers) for number, section in enumerate(sections)]
    links = [
        f'<li><a href="#section-{number}">{escape(section.heading)}</a></li>'
        for number, section in enumerate(sections)
    ]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>",
        f"<header><h1>{escape(title)}</h1>",
        *(f"<p>{escape(fact)}</p>" for fact in facts),
        f'</header>\n<nav aria-label="Sections"><ol>{"".join(links)}</ol></nav>',
        '<noscript><p class="note">Without JavaScript there are no figures; their numbers are in '
        "the tables.</p></noscript>",
        *body,
        "</main>",
        f'<script type="application/json" id="figures">{_json(_specs(figures))}</script>',
        f"<script>{get_plotlyjs()}</script>\n<script>\n{_asset('page.js')}</script>",
        "</body>\n</html>\n",
    ])  # fmt: skip


def _section(number: int, section: Section, numbers: Iterator[int]) -> str:
    return "\n".join([
        f'<section id="section-{number}"><h2>{escape(section.heading)}</h2>',
        *(f"<p>{escape(sentence)}</p>" for sentence in section.sentences),
        *(_figure(next(numbers), figure) for figure in section.figures),
        *(_table(table) for table in section.tables),
        "</section>",
    ])  # fmt: skip


def _figure(number: int, figure: Figure) -> str:
    return (
        f'<figure><div class="plot" id="figure-{number}" role="group" '
        f'aria-label="{escape(figure.label)}"></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(text_of(first))}</th>' + "".join(map(_cell, rest)) + "</tr>"
        for first, *rest in table.rows
    )
    # It can be wider than a screen, and is scrolled by keyboard then.
    shown = (
        '<div class="wide" role="region" tabindex="0" aria-label="Table">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        f'<p class="note">{escape(table.caption)}</p>'
    )
    if not table.folded:
        return shown
    return f"<details><summary>{len(table.rows)} rows of numbers</summary>{shown}</details>"


def _cell(cell: Cell) -> str:
    text = text_of(cell)
    # Words begin where the last line's did; numbers and their intervals end there.
    words = ' class="words"' if text[:1].isalpha() else ""
    return f"<td{words}>{escape(text)}</td>"


def _specs(figures: Sequence[Figure]) -> dict[str, Any]:
    templates: dict[str, Mapping[str, Any]] = {
        theme: plotly.io.templates[name].to_plotly_json() for theme, name in _THEMES.items()
    }
    return {"templates": templates, "figures": [_plain(figure.spec) for figure in figures]}


def _plain(value: Any) -> Any:
    """Returns a figure's JSON whose words Plotly draws as they are: it reads tags and entities."""
    if isinstance(value, str):
        return escape(value, quote=False)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _json(value: Any) -> str:
    """Returns JSON that ends no script element, whatever the models are called."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("analysis.report").joinpath(name).read_text("utf-8")
