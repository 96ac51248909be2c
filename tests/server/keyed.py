"""API keys for servers under test."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx

from server.registry.keys import MadeKey, make_key
from server.registry.records import Role
from server.registry.store import Registry
from tests.server.live import DEADLINE_S, LiveServer


def registry_url(state: Path) -> str:
    """Returns the URL of the registry of a state directory, which is made if need be."""
    state.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{state / 'registry.sqlite3'}"


def give_key(state: Path, role: Role, **limits: int) -> MadeKey:
    """Makes a key as `linker keys create` does, whether a server runs or not."""
    made = make_key(f"{role.value} key", role, created_at=1.0, **limits)
    with contextlib.closing(Registry.open_beside(registry_url(state))) as registry:
        registry.save(made.record)
    return made


def revoke_key(state: Path, made: MadeKey) -> None:
    """Revokes a key as `linker keys revoke` does."""
    with contextlib.closing(Registry.open_beside(registry_url(state))) as registry:
        registry.save(replace(made.record, revoked_at=2.0))


def client_of(live: LiveServer, key: str | None) -> httpx.Client:
    """Returns a client of a server that shows a key."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=live.url, headers=headers, timeout=DEADLINE_S, trust_env=False)


class Keyed(NamedTuple):
    """A server that wants keys, and some."""

    live: LiveServer
    keys: dict[Role, str]
    state: Path
    revoked: str = ""

    def client(self, role: Role | None) -> httpx.Client:
        return client_of(self.live, None if role is None else self.keys[role] or None)
