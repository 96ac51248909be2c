"""Debian's Chromium, without a window."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.programs import absent

DEADLINE_MS = 60_000.0  # of anything that is waited for; machines under load are slow
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Runs a browser until the block ends.

    Nothing else of this thread may run an event loop meanwhile: playwright has its own in it.
    """
    # Root has no sandbox of its own to give away; containers of tests run as root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    program = _program()
    expect.set_options(timeout=DEADLINE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()


def until(page: Page, condition: Callable[[], bool]) -> None:
    """Waits until a condition holds; what the page does meanwhile is taken in."""
    give_up_at = time.monotonic() + DEADLINE_MS / 1000
    while not condition():
        assert time.monotonic() < give_up_at, "the condition did not come true"
        page.wait_for_timeout(20)


def _program() -> str:
    found = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if found is None:
        absent("Chromium")
    return found
