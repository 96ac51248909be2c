"""The page: whole, escaped, and asking for nothing."""

from __future__ import annotations

from html import escape

from analysis.report import figures
from analysis.report.content import Figure, Section, Table
from analysis.report.page import render_page
from tests.analysis.report.reading import Reading

NASTY = '</script><img src="http://x.example/y"> & "one"'
SECTIONS = [
    Section(
        heading=NASTY,
        sentences=[NASTY],
        figures=[
            Figure(
                caption=NASTY,
                label=NASTY,
                spec=figures.bars([NASTY], {NASTY: [1.0]}, x_title=NASTY, y_title="y"),
            )
        ],
        tables=[Table(caption=NASTY, columns=(NASTY, "n"), rows=[(NASTY, 0.123456)], folded=True)],
    ),
    Section(heading="Empty"),
]


def test_page_names_nothing_outside_and_forbids_every_request() -> None:
    read = Reading(render_page("Title", ["fact"], SECTIONS))
    assert read.addresses == []
    assert read.policy.startswith("default-src 'none'")
    assert "http" not in read.policy
    assert "connect-src" not in read.policy


def test_page_shows_names_as_they_are_and_runs_none_of_them() -> None:
    read = Reading(render_page(NASTY, [NASTY], SECTIONS))
    assert read.headings == [NASTY, "Empty"]
    assert read.rows == [[NASTY, "n"], [NASTY, "0.1235"]]
    assert read.specs["figures"][0]["data"][0]["name"] == escape(NASTY, quote=False)
    assert read.open_tags == []


def test_every_figure_has_a_place_and_templates_for_both_themes() -> None:
    read = Reading(render_page("Title", [], SECTIONS))
    assert read.plots == ["figure-0"]
    assert set(read.specs["templates"]) == {"light", "dark"}


def test_page_holds_the_library_that_draws() -> None:
    page = render_page("Title", [], [])
    assert "Plotly" in page
    assert len(page) > 1 << 20
