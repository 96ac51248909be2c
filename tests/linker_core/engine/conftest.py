"""The engine that most tests of loading and serving begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.linker_core.engine.serving import Served, serve_three


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return serve_three(tmp_path, "qwen2")
