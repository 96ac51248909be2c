"""Fixtures of every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder beside the project; mark tests that take it `shared`."""
    given = os.environ.get("LINKER_SHARED")
    folder = Path(given) if given else PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no data folder beside the project; LINKER_SHARED can name one")
    return folder
