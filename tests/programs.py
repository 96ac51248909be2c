"""Programs that tests start and no Python package brings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def program(name: str, *, what: str) -> Path:
    """Returns a program's path; without it the test is skipped, or fails where CI runs.

    Args:
        name: As it is called.
        what: What to install, as people call it.
    """
    found = shutil.which(name)
    if found is None:
        absent(what)
    return Path(found)


def absent(what: str) -> NoReturn:
    """Ends the test that needs what is not installed."""
    message = f"no {what} is installed; `make programs` installs Debian's"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
