"""Debian's Chromium, without a window."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, expect, sync_playwright

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


def _program() -> str:
    found = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if found is None:
        absent("Chromium")
    return found
