"""What the event loop cannot hand to anybody: said, but not two thousand times a second."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_QUIET_S = 10.0  # between two complaints of the same


class LoopErrors:
    """The handler of a loop's exceptions. Event loop only.

    A loop that has no descriptor for a connection tries for each one that may wait, and complains
    of each, before it pauses for a second.
    """

    def __init__(self) -> None:
        self._quiet_until = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _SHORTAGES):
            loop.default_exception_handler(dict(context))
        elif loop.time() >= self._quiet_until:
            self._quiet_until = loop.time() + _QUIET_S
            logger.error(
                "no connection can be taken: %s; raise the limit of open files, or lower "
                "http.max_connections",
                error.strerror,
            )
