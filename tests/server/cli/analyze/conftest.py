"""Fixtures of the studies' commands."""

from __future__ import annotations

import pytest

from tests.analysis.planted import Planted, plant_family


@pytest.fixture(scope="session")
def small_family(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Five fine-tunes whose deltas are half along one direction; nobody writes to it."""
    return plant_family(tmp_path_factory.mktemp("planted"))
