"""The bounded queue between the engine's messages and one reader. Event loop only."""

from __future__ import annotations

import asyncio
from typing import Final

from linker_core.engine.messages import TokenOutput
from linker_core.errors import LinkerError

# At once, so that one reader with much to read does not keep the others waiting.
MAX_TAKEN: Final = 16


class Mailbox:
    """Tokens of one sequence on their way to whoever reads them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tokens: list[TokenOutput] = []
        self._arrivals_s: list[float] = []  # of each of them
        self._failure: LinkerError | None = None
        self._waiting: asyncio.Future[None] | None = None  # the reader, while it waits

    def put(self, token: TokenOutput, came_s: float) -> bool:
        """Adds a token and when it came; False if the reader is too far behind to take it."""
        if len(self._tokens) >= self._limit:
            return False
        self._tokens.append(token)
        self._arrivals_s.append(came_s)
        self._wake()
        return True

    def fail(self, error: LinkerError) -> None:
        """Ends the sequence: the reader gets the tokens that are there, then the error."""
        if self._failure is None:
            self._failure = error
        self._wake()

    async def take(self) -> tuple[list[TokenOutput], list[float]]:
        """Waits for the next token and returns those that are there, the first `MAX_TAKEN`.

        Returns:
            The tokens, and when each of them came, however long it has been waiting here.

        Raises:
            LinkerError: The sequence failed.
        """
        if self._tokens:
            await asyncio.sleep(0)  # the others' turn: this reader is behind
        while not self._tokens:
            if self._failure is not None:
                raise self._failure
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        tokens, arrivals_s = self._tokens, self._arrivals_s
        if len(tokens) <= MAX_TAKEN:  # nearly always, and for every token
            self._tokens, self._arrivals_s = [], []
            return tokens, arrivals_s
        self._tokens, self._arrivals_s = tokens[MAX_TAKEN:], arrivals_s[MAX_TAKEN:]
        return tokens[:MAX_TAKEN], arrivals_s[:MAX_TAKEN]

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
