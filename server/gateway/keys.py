"""The API keys that are good now, as the registry has them; read again every second."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Sequence

from linker_core.errors import InvalidKeyError, NotReadyError
from server.gateway.caller import STRANGER, Caller
from server.registry.keys import digest_of
from server.registry.records import KeyRecord, Role

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_POLL_FAILED_S = 10.0  # while the registry cannot be read, which it says itself each time
_NOBODY = ("0" * 64, STRANGER)  # which no key has the digest of


class KeyRing:
    """Knows keys by their digests. Event loop only, but for the reading of the registry.

    Args:
        read: Returns every key that there has ever been. Blocking.
        no_auth: Everybody may do everything, keys or not.
        is_private: The server is reached from this machine alone; it then needs keys only once it
            has had one.
        on_change: Told the ids of the good keys when they are read.

    Raises:
        NotReadyError: The registry cannot be read.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[KeyRecord]],
        *,
        no_auth: bool,
        is_private: bool,
        on_change: Callable[[frozenset[str]], None],
    ) -> None:
        self._read = read
        self._no_auth = no_auth
        self._is_required = not is_private
        self._on_change = on_change
        self._callers: dict[str, tuple[str, Caller]] = {}  # digest and caller, by digest
        self._ids = frozenset[str]()
        self._is_following = False
        self._take(read())

    @property
    def are_optional(self) -> bool:
        """Whether everybody may do everything."""
        return self._no_auth or not self._is_required

    @property
    def roles(self) -> frozenset[Role]:
        """What there are good keys for."""
        return frozenset(caller.role for _, caller in self._callers.values())

    def find(self, key: str | None) -> Caller:
        """Returns whose key it is, in the same steps whether it is anybody's or not.

        Raises:
            InvalidKeyError: Nobody's, or revoked.
        """
        digest = digest_of(key or "")
        stored, caller = self._callers.get(digest, _NOBODY)
        if not hmac.compare_digest(digest, stored):
            what = "An API key is needed" if key is None else "The API key is not known here"
            raise InvalidKeyError(
                f"{what}; send the header `Authorization: Bearer KEY` with one that `linker keys "
                "create` has made."
            )
        return caller

    def check(self, caller: Caller) -> None:
        """Refuses a caller from before, whose key has been revoked or who by now needs one.

        Raises:
            InvalidKeyError: It is so.
        """
        if not self.are_optional and caller.key_id not in self._ids:
            raise InvalidKeyError("The API key of this request is no longer good.")

    async def follow(self) -> None:
        """Notices keys that are made or revoked while the server runs; never returns."""
        wait_s = _POLL_S
        self._is_following = True
        while True:
            await asyncio.sleep(wait_s)
            try:
                self._take(await asyncio.to_thread(self._read))
                wait_s = _POLL_S
            except NotReadyError:
                wait_s = _POLL_FAILED_S  # those that are known go on

    def _take(self, keys: Sequence[KeyRecord]) -> None:
        # For good: who has ever locked the door does not leave it open by losing the last key.
        if keys and not self._is_required:
            self._is_required = True
            if self._is_following:  # else a start says who may do what
                logger.info("there are API keys now: every request needs one")
        good = [key for key in keys if key.revoked_at is None]
        self._callers = {key.digest: (key.digest, Caller.of_key(key)) for key in good}
        self._ids = frozenset(key.id for key in good)
        self._on_change(self._ids)
