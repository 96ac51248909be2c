"""Servers of small families whose checkpoints are a test's own: workers write beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.server.live import LiveServer, live_server
from tests.server.studies.fake_worker import FAKE_STUDY

NAMES = ("base", "near", "far")
ENABLED = {"analysis": {"enabled": True}}


def copied(family: Path, folder: Path) -> Path:
    """Returns where copies of a family's checkpoints are."""
    for name in NAMES:
        shutil.copytree(family / name, folder / "models" / name)
    return folder / "models"


@contextmanager
def studying(root: Path, state: Path) -> Iterator[LiveServer]:
    """Runs a server of copies, with a pretended study worker."""
    models = {name: root / name for name in NAMES}
    with live_server(
        state, models=models, root=root, study_command=FAKE_STUDY, settings=ENABLED
    ) as server:
        server.until_ready()
        yield server


def card(live: LiveServer, family: str = "base", **params: Any) -> dict[str, Any]:
    """Returns what a server says of a family's study."""
    response = live.client.get(f"/analysis/{family}", params=params)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found
