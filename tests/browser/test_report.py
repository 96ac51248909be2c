"""The report of a study in a browser: drawn, readable in both themes, on paper, and by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from server.cli.main import main
from tests.analysis.planted import plant_family
from tests.browser.visitor import grave_violations, sideways

_NUM_FIGURES = 9


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    planted = plant_family(folder)
    models = [str(path) for path in (planted.base, *planted.variants.values())]
    target = folder / "report.html"
    assert main(["analyze", "report", *models, "--draws", "40", "-o", str(target)]) == 0
    return target


@pytest.fixture
def troubles() -> Iterator[list[str]]:
    """What a page asks for or complains of; nothing is to be left at the end."""
    found: list[str] = []
    yield found
    assert found == []


def opened(
    browser: Browser,
    report: Path,
    troubles: list[str],
    *,
    scheme: Literal["light", "dark"] = "light",
    width: int = 1200,
) -> Page:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.on(
        "request",
        lambda one: None if one.url == report.as_uri() or "data:" in one.url[:5]
        else troubles.append(one.url[:200]),
    )  # fmt: skip
    page.on("console", lambda said: troubles.append(said.text[:200]))
    page.on("pageerror", lambda error: troubles.append(str(error)[:200]))
    page.goto(report.as_uri())
    expect(page.locator(".cartesianlayer > .subplot.xy")).to_have_count(_NUM_FIGURES)
    return page


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1200)])
def test_report_is_drawn_and_asks_for_nothing(
    browser: Browser,
    report: Path,
    troubles: list[str],
    scheme: Literal["light", "dark"],
    width: int,
) -> None:
    page = opened(browser, report, troubles, scheme=scheme, width=width)
    assert sideways(page) == []
    assert grave_violations(page) == []
    page.context.close()


def test_report_follows_the_theme_and_prints_in_the_light_one(
    browser: Browser, report: Path, troubles: list[str]
) -> None:
    page = opened(browser, report, troubles, scheme="dark")
    texts = page.locator(".plot .xtick text").first
    dark = texts.evaluate("text => getComputedStyle(text).fill")
    page.emulate_media(color_scheme="light")
    expect(texts).not_to_have_css("fill", dark)
    light = texts.evaluate("text => getComputedStyle(text).fill")
    page.emulate_media(color_scheme="dark")
    expect(texts).to_have_css("fill", dark)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    expect(texts).to_have_css("fill", light)
    expect(page.locator("details:not([open])")).to_have_count(0)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    expect(texts).to_have_css("fill", dark)
    expect(page.locator("details[open]")).to_have_count(0)
    page.context.close()
