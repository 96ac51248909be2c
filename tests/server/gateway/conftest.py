"""Servers that the gateway's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry.records import Role
from tests.server.keyed import Keyed, give_key, revoke_key
from tests.server.live import live_server


@pytest.fixture(scope="module")
def keyed(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    state = tmp_path_factory.mktemp("keyed")
    keys = {role: give_key(state, role).key for role in Role}
    revoked = give_key(state, Role.ADMIN)
    revoke_key(state, revoked)
    with live_server(state, models={"base": family / "base"}, root=family) as live:
        live.until_ready()
        yield Keyed(live, keys, state, revoked.key)
