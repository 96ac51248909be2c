"""The bounded queue between the engine's messages and one reader. Event loop only."""

from __future__ import annotations

import asyncio
from collections import deque

from linker_core.engine.messages import TokenOutput
from linker_core.errors import LinkerError


class Mailbox:
    """Tokens of one sequence on their way to whoever reads them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tokens: deque[TokenOutput] = deque()
        self._failure: LinkerError | None = None
        self._wake = asyncio.Event()

    def put(self, token: TokenOutput) -> bool:
        """Adds a token; False if the reader is too far behind to take it."""
        if len(self._tokens) >= self._limit:
            return False
        self._tokens.append(token)
        self._wake.set()
        return True

    def fail(self, error: LinkerError) -> None:
        """Ends the sequence: the reader gets the tokens that are there, then the error."""
        if self._failure is None:
            self._failure = error
        self._wake.set()

    async def get(self) -> TokenOutput:
        """Waits for the next token.

        Raises:
            LinkerError: The sequence failed.
        """
        while not self._tokens:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        return self._tokens.popleft()
