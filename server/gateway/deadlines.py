"""How long one answer may take, in all and at each of its steps. Knows no model and no JSON."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import Request

from linker_core.errors import DeadlineError, InvalidRequestError, LinkerError
from server.settings import HttpSettings

HEADER = "X-Request-Timeout"  # seconds; the SDK's x-stainless-… are of its own side
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")
_TOO_LONG = "The answer was not complete within {:g} s."
_TOO_SLOW = "There was no first token within {:g} s; try again in a moment."
_STALLED = "The answer made no progress for {:g} s; try again in a moment."
_AGAIN_S = 1.0  # a sequence that was not there yet when its answer was late is, by then

Clock = Callable[[], float]


class Deadlines:
    """What one request has left. Event loop only.

    Args:
        settings: The server's limits.
        arrived_at: When the request came, in seconds of the clock.
        total_s: What the client allows for the whole answer, if less than the server.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        settings: HttpSettings,
        *,
        arrived_at: float,
        total_s: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        total_s = settings.total_timeout_s if total_s is None else total_s
        self.total_s = min(total_s, settings.total_timeout_s)
        self.first_token_s = settings.first_token_timeout_s
        self.stall_s = settings.stall_timeout_s
        self.arrived_at = arrived_at
        self.due_at = arrived_at + self.total_s
        self.clock = clock
        self._queue_s = settings.queue_timeout_s

    @property
    def start_within_s(self) -> float:
        """What a sequence that is sent now may wait for its first step."""
        return max(0.0, min(self._queue_s, self.due_at - self.clock()))

    @asynccontextmanager
    async def bounding(self) -> AsyncIterator[None]:
        """Bounds what one task does before there is anything to watch.

        Raises:
            DeadlineError: It took too long; it was cancelled.
        """
        scope = asyncio.timeout(max(0.0, self.due_at - self.clock()))
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise  # somebody else's
            raise DeadlineError(_TOO_LONG.format(self.total_s)) from None

    @contextmanager
    def watching(self, fail: Callable[[LinkerError], None]) -> Iterator[Watch]:
        """Watches the pieces of an answer that is with the engine from here on.

        Args:
            fail: Ends the answer; called by the event loop, and again as long as it has not ended.
        """
        watch = Watch(self, fail)
        try:
            yield watch
        finally:
            watch.close()


class Watch:
    """Fails an answer that takes too long; one timer, whatever the number of its pieces."""

    def __init__(self, deadlines: Deadlines, fail: Callable[[LinkerError], None]) -> None:
        self._deadlines = deadlines
        self._fail = fail
        self._first_due_at = deadlines.clock() + deadlines.first_token_s
        self._begun = False
        self._awaited_since: float | None = None  # None: the client is being served
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._wait_s(), self._check)

    def came(self) -> None:
        """Notes a piece; until the next is awaited the time is the client's."""
        self._begun = True
        self._awaited_since = None

    def awaits(self) -> None:
        """Notes that the next piece is waited for."""
        self._awaited_since = self._deadlines.clock()

    def close(self) -> None:
        """Stops watching."""
        self._timer.cancel()

    def _check(self) -> None:
        due_at, message = self._due()
        if due_at <= self._deadlines.clock():
            self._fail(DeadlineError(message))
            wait_s = _AGAIN_S
        else:
            wait_s = self._wait_s()
        self._timer = self._loop.call_later(wait_s, self._check)

    def _wait_s(self) -> float:
        """Returns when to look again: by then a first token may have come, and nothing after it."""
        left_s = self._due()[0] - self._deadlines.clock()
        return max(0.0, min(left_s, self._deadlines.stall_s))

    def _due(self) -> tuple[float, str]:
        """Returns when the answer is late, as things stand, and what is said of it then."""
        limits = self._deadlines
        whole = limits.due_at, _TOO_LONG.format(limits.total_s)
        if not self._begun:
            return min(whole, (self._first_due_at, _TOO_SLOW.format(limits.first_token_s)))
        since = limits.clock() if self._awaited_since is None else self._awaited_since
        return min(whole, (since + limits.stall_s, _STALLED.format(limits.stall_s)))


def deadlines_of(
    request: Request, settings: HttpSettings, *, arrived_at: float, clock: Clock = time.monotonic
) -> Deadlines:
    """Returns the deadlines of a request; its client may ask for less time than the server gives.

    Raises:
        InvalidRequestError: The header is no positive number of seconds.
    """
    said = request.headers.get(HEADER)
    if said is None:
        return Deadlines(settings, arrived_at=arrived_at, clock=clock)
    total_s = float(said) if _SECONDS.fullmatch(said) else math.nan
    if not total_s > 0:
        raise InvalidRequestError(
            f"The header {HEADER} must be a positive number of seconds, such as 30 or 2.5.",
            param=HEADER,
        )
    return Deadlines(settings, arrived_at=arrived_at, total_s=total_s, clock=clock)
