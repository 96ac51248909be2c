"""Fixtures of every test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Takes SIGINT as usual, also where a shell started us in the background.

    There it is ignored, and the programs that tests interrupt would inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder beside the project; mark tests that take it `shared`."""
    given = os.environ.get("LINKER_SHARED")
    folder = Path(given) if given else PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no data folder beside the project; LINKER_SHARED can name one")
    return folder
