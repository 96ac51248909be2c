"""Who asks: the key of a request, what it may do, how much of it, and where its prefixes live."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.types import Scope

from linker_core.errors import PermissionDeniedError
from server.registry.records import KeyRecord, Role

SCOPE_KEY = "linker.caller"  # where `Access` leaves the caller of a request


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """How much one key may do; None: as much as the server does."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    max_parallel: int | None = None  # sequences waiting or running


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose request it is. `key_id` is None where the server is open to everybody."""

    key_id: str | None
    role: Role
    limits: KeyLimits = KeyLimits()

    @classmethod
    def of_key(cls, key: KeyRecord) -> Caller:
        """Returns the caller that a key stands for."""
        limits = KeyLimits(
            requests_per_minute=key.requests_per_minute,
            tokens_per_minute=key.tokens_per_minute,
            max_parallel=key.max_parallel,
        )
        return cls(key_id=key.id, role=key.role, limits=limits)

    def check_priority(self, priority: int) -> None:
        """Refuses to let one key go before the others because it says so.

        Raises:
            PermissionDeniedError: A client's key asks to be sooner than those that ask for nothing.
        """
        if priority < 0 and self.role is not Role.ADMIN:
            raise PermissionDeniedError(
                f"priority is {priority}; below 0 it would go before other keys' requests, which "
                "only keys of role admin may. Send 0 or more.",
                param="priority",
            )

    def cache_salt(self, asked: str | None) -> str:
        """Returns the salt of a prompt's prefixes: no other key finds or times what this one left.

        Args:
            asked: What the client itself says, to part its own prompts.
        """
        if self.key_id is None:
            return asked or ""
        # Of one length, so that no salt that a client makes up is another key's.
        return hashlib.sha256(f"{self.key_id}\0{asked or ''}".encode()).hexdigest()


EVERYBODY = Caller(key_id=None, role=Role.ADMIN)  # of an open server
STRANGER = Caller(key_id=None, role=Role.METRICS)  # who needs no key for what they ask


def caller_of(request: HTTPConnection | Scope) -> Caller:
    """Returns whose request it is, as `Access` has found out before any route saw it."""
    caller = request[SCOPE_KEY]
    assert isinstance(caller, Caller)
    return caller
