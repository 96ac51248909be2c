"""API keys: how they are made, and what is kept of them. Nothing here stores one."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import NamedTuple

from linker_core.errors import InvalidRequestError
from server.registry.records import KeyRecord, Role

MAX_KEYS = 1000  # good at once; a running server holds them all
_SECRET_BYTES = 32
_BEGINNING = "sk-linker-"  # by which people and secret scanners know it
_SHOWN = len(_BEGINNING) + 4  # characters; the other 39 hold 232 of its 256 bits
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")
_MAX_LIMIT = 2**31 - 1


class MadeKey(NamedTuple):
    """A new key, and what may be kept of it."""

    key: str
    record: KeyRecord


def make_key(
    name: str,
    role: Role,
    *,
    created_at: float,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    max_parallel: int | None = None,
) -> MadeKey:
    """Makes a key of 256 random bits.

    Args:
        name: For people to know it by.
        role: What it is for.
        created_at: Seconds since the epoch.
        requests_per_minute: None for no limit, as for the others.
        tokens_per_minute: Of prompts and answers together.
        max_parallel: Sequences at once.

    Raises:
        InvalidRequestError: A name that is none, or a limit out of range.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            "A key's name has 1 to 64 letters, digits, spaces and . _ @ -, and begins with a "
            "letter or a digit.",
            param="name",
        )
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_parallel": max_parallel,
    }
    for limit, value in limits.items():
        if value is not None and not 1 <= value <= _MAX_LIMIT:
            raise InvalidRequestError(f"{limit} is 1 to {_MAX_LIMIT}.", param=limit)
    key = _BEGINNING + secrets.token_urlsafe(_SECRET_BYTES)
    record = KeyRecord(
        id=f"key_{secrets.token_hex(6)}",
        name=name,
        role=role,
        prefix=key[:_SHOWN],
        digest=digest_of(key),
        created_at=created_at,
        **limits,
    )
    return MadeKey(key, record)


def digest_of(key: str) -> str:
    """Returns what a key is known by; as good as random, so that no salt or slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()
