"""Somebody with a browser: opens the page in windows, and judges it as everybody meets it."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, NamedTuple

from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, expect

from tests.browser.chromium import DEADLINE_MS
from tests.browser.watch import Watch
from tests.server.live import LiveServer

WIDE: Final = ViewportSize(width=1280, height=900)
NARROW: Final = ViewportSize(width=390, height=844)
GRAVE: Final = frozenset({"serious", "critical"})
# Sections are drawn when they come into sight, and charts once their library is there.
_DRAWN: Final = """() => [...document.querySelectorAll(".plot")].every((plot) =>
  plot.clientWidth === 0 || plot.querySelector("svg") !== null)"""
# What reaches over the right edge, by its last few ancestors: a list, since one alone misleads.
_TOO_WIDE: Final = """() => {
  const limit = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= limit) return [];
  const name = (node) => node.tagName.toLowerCase() + (node.id ? "#" + node.id : "")
    + [...node.classList].map((c) => "." + c).join("");
  const over = [...document.body.querySelectorAll("*")]
    .filter((node) => node.getBoundingClientRect().right > limit + 1);
  return [`scrolls to ${document.documentElement.scrollWidth}`,
    ...over.slice(0, 12).map((node) => `${name(node.parentElement)} > ${name(node)}`)];
}"""


class Window(NamedTuple):
    """A page and who watches it."""

    page: Page
    watch: Watch


class Visitor:
    """Opens windows, and closes them all.

    Args:
        browser: Whose windows they are.
        pictures: Where pictures of them go.
    """

    def __init__(self, browser: Browser, pictures: Path) -> None:
        self._browser = browser
        self._pictures = pictures
        self._contexts: list[BrowserContext] = []
        self._windows: list[Window] = []

    def open(
        self,
        live: LiveServer,
        *,
        size: ViewportSize = WIDE,
        scheme: Literal["light", "dark"] = "light",
        motion: Literal["no-preference", "reduce"] = "reduce",
        path: str = "/ui",
        missing: str | None = None,
    ) -> Window:
        """Opens the page in a window of its own, as a new visitor.

        A file of that name does not arrive where one is `missing`.
        """
        context = self._browser.new_context(
            viewport=size, color_scheme=scheme, reduced_motion=motion
        )
        self._contexts.append(context)
        context.set_default_timeout(DEADLINE_MS)
        page = context.new_page()
        window = Window(page, Watch(page, live.url))
        self._windows.append(window)
        if missing is not None:
            window.watch.forgive(f".*/{re.escape(missing)}", None)
            page.route(f"**/{missing}", lambda route: route.abort("connectionreset"))
        page.goto(f"{live.url}{path}")
        expect(page.get_by_role("heading").first).to_be_attached()
        return window

    def leave(self) -> list[str]:
        """Closes every window; returns what went wrong in them."""
        for context in self._contexts:
            context.close()
        return [trouble for window in self._windows for trouble in window.watch.troubles]

    def picture(self, page: Page, name: str, *, full: bool = True) -> None:
        """Keeps a picture once all is drawn: of the `full` page, or of what a screen holds."""
        size = page.viewport_size
        assert size is not None
        height: int = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": size["width"], "height": max(height, size["height"])})
        page.evaluate("scrollTo(0, 0)")  # else what sticks to the top hides what is below it
        until_drawn(page)
        self._pictures.mkdir(parents=True, exist_ok=True)
        if not full:
            page.set_viewport_size(size)
        page.screenshot(path=self._pictures / f"{name}.png", full_page=full)
        page.set_viewport_size(size)

    def inspect(self, page: Page, name: str) -> None:
        """Holds the page as it is now against what all its states must meet; keeps a picture."""
        self.picture(page, name)
        assert sideways(page) == []
        assert grave_violations(page) == []


def until_drawn(page: Page) -> None:
    """Waits until there is no chart in sight that has yet to be drawn."""
    page.wait_for_function(_DRAWN)


def sideways(page: Page) -> list[str]:
    """Returns what makes the page scroll sideways; nothing where it does not."""
    found: list[str] = page.evaluate(_TOO_WIDE)
    return found


def grave_violations(page: Page) -> list[str]:
    """Returns what axe finds serious or critical: rule, and the elements that break it."""
    page.evaluate(_axe())
    found = page.evaluate("() => axe.run({resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {node['target']} {node['html'][:160]} {node['failureSummary'][:300]}"
        for violation in found["violations"]
        if violation["impact"] in GRAVE
        for node in violation["nodes"]
    ]


@cache
def _axe() -> str:
    return files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
