"""Who may read what a server keeps: its own user alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry.lock import StateLock
from server.registry.store import Registry
from tests.server.keyed import registry_url


@pytest.fixture(autouse=True)
def open_handed() -> Iterator[None]:
    """Has the process make files that everybody may read, unless it says otherwise."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_new_state_directory_and_registry_are_their_owners_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    StateLock(state).release()
    registry = Registry.open(registry_url(state))
    files = {path.name: mode(path) for path in state.iterdir()}
    registry.close()
    assert mode(state) == 0o700
    assert {"registry.sqlite3", "registry.sqlite3-wal", "registry.sqlite3-shm"} <= files.keys()
    assert set(files.values()) == {0o600}


def test_what_is_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    file = tmp_path / "registry.sqlite3"
    file.touch(0o640)
    StateLock(tmp_path).release()
    Registry.open(registry_url(tmp_path)).close()
    assert (mode(tmp_path), mode(file)) == (0o750, 0o640)
