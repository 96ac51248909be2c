"""How much work is taken: bounds on sequences in flight and prompts in wait, and the drain."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from linker_core.errors import InvalidRequestError, NotReadyError, QueueFullError
from server.gateway.caller import EVERYBODY, Caller
from server.gateway.limits import Quotas

_OPEN_TO_ALL = 7 / 8  # of a room; beyond it shares count
_ANY = 2**63


class _Room:
    """A bounded amount of something that keys share.

    Args:
        limit: Of all keys together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._by_key: Counter[str] = Counter()  # more than 0 each

    def has(self, amount: int, key: str | None) -> bool:
        """Whether there is so much left for a key."""
        usage = (self.taken + amount) / self.limit
        if usage > 1:
            return False
        # Alone it may have everything: it would never be admitted otherwise.
        if usage <= _OPEN_TO_ALL or self.taken == 0 or key is None:
            return True
        num_keys = len(self._by_key) + (key not in self._by_key) + 1
        return self._by_key[key] + amount <= max(1, self.limit // num_keys)

    def take(self, amount: int, key: str | None) -> None:
        """Counts what a key takes, or with a negative number gives back."""
        self.taken += amount
        if key is not None:
            self._by_key[key] += amount
            if self._by_key[key] <= 0:
                del self._by_key[key]


class Place:
    """What one request holds of the gate, from its admission to its end. Event loop only.

    Args:
        gate: Which counts it.
        caller: Whose it is.
        num_sequences: Of the request.
        prompt_tokens: Of all of them together.
        held_tokens: Of the key's minute, kept for the answer.
    """

    def __init__(
        self,
        gate: Gate,
        caller: Caller,
        *,
        num_sequences: int,
        prompt_tokens: int,
        held_tokens: int,
    ) -> None:
        self._gate = gate
        self.caller = caller
        self.num_sequences = num_sequences
        self._waiting_each = prompt_tokens // num_sequences
        self.waiting_tokens = prompt_tokens  # of prompts that have no answer yet
        self.held_tokens = held_tokens

    def begun(self) -> None:
        """Notes that a sequence has its first token: its prompt waits no longer."""
        tokens = min(self._waiting_each, self.waiting_tokens)
        self.waiting_tokens -= tokens
        self._gate.waiting.take(-tokens, self.caller.key_id)

    def answered(self, num_tokens: int) -> None:
        """Counts tokens of the answer against the key's minute."""
        if self.caller.limits.tokens_per_minute is not None:
            self.release(min(num_tokens, self.held_tokens))
            self._gate.quotas.spend(self.caller, num_tokens)

    def release(self, num_tokens: int) -> None:
        """Keeps so much less of the key's minute for the answer."""
        self.held_tokens -= num_tokens
        self._gate.quotas.release(self.caller, num_tokens)


class Gate:
    """Counts sequences and their prompts at admission, before any work. Event loop only.

    The last of the sequences, and of the prompts' tokens, are for keys that hold less than an equal
    share of them, so that nobody's flood keeps others out.

    Args:
        limit: Sequences waiting or running at once.
        max_waiting_tokens: Tokens of prompts without an answer yet; None: as many as come.
        quotas: What keys may do.
    """

    def __init__(
        self,
        limit: int,
        *,
        max_waiting_tokens: int | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.quotas = quotas or Quotas()
        self._inflight = _Room(limit)  # sequences
        self.waiting = _Room(_ANY if max_waiting_tokens is None else max_waiting_tokens)  # tokens
        self._empty = asyncio.Event()
        self._empty.set()
        self.closing = asyncio.Event()  # set when no more work is taken

    @property
    def draining(self) -> bool:
        """Whether the server takes no more work."""
        return self.closing.is_set()

    @property
    def num_running(self) -> int:
        """Sequences waiting or running."""
        return self._inflight.taken

    @contextmanager
    def admit(
        self,
        num_sequences: int,
        *,
        prompt_tokens: int = 0,
        answer_tokens: int = 0,
        caller: Caller = EVERYBODY,
    ) -> Iterator[Place]:
        """Holds places for the sequences of one request.

        Args:
            num_sequences: At least 1.
            prompt_tokens: Of all prompts together.
            answer_tokens: Of all answers together, at most.
            caller: Whose request it is.

        Raises:
            LinkerError: See `check`.
        """
        self.check(caller, num_sequences=num_sequences, prompt_tokens=prompt_tokens)
        self.quotas.spend(caller, prompt_tokens)
        place = Place(
            self,
            caller,
            num_sequences=num_sequences,
            prompt_tokens=prompt_tokens,
            held_tokens=self.quotas.hold(caller, answer_tokens),
        )
        self._enter(place)
        try:
            yield place
        finally:
            self._leave(place)

    def check(self, caller: Caller, *, num_sequences: int = 1, prompt_tokens: int = 1) -> None:
        """Refuses what would not be admitted now: at the least it takes, before any work is done.

        Raises:
            NotReadyError: The server is shutting down.
            InvalidRequestError: More than would ever be admitted.
            RateLimitError: The key has used up what it may.
            QueueFullError: Too much is waiting or running.
        """
        self.check_open()
        self._check_sizes(num_sequences, prompt_tokens)
        self.quotas.check(caller, num_sequences=num_sequences, prompt_tokens=prompt_tokens)
        self._check_room(num_sequences, prompt_tokens, caller.key_id)

    def check_open(self) -> None:
        """Refuses new work while the server drains.

        Raises:
            NotReadyError: It does.
        """
        if self.draining:
            raise NotReadyError("The server is shutting down.")

    def close(self) -> None:
        """Takes no more work from here on."""
        self.closing.set()

    async def drain(self, deadline_s: float) -> bool:
        """Takes no more work and waits for what runs; True if all of it ended in time."""
        self.close()
        try:
            async with asyncio.timeout(deadline_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _check_sizes(self, num_sequences: int, prompt_tokens: int) -> None:
        if num_sequences > self._inflight.limit:
            raise InvalidRequestError(
                f"The request makes {num_sequences} sequences, and the server runs at most "
                f"{self._inflight.limit} at once; send fewer prompts or a smaller n."
            )
        if prompt_tokens > self.waiting.limit:
            raise InvalidRequestError(
                f"The prompts have {prompt_tokens} tokens together, and the server lets at most "
                f"{self.waiting.limit} wait; send fewer of them at once."
            )

    def _check_room(self, num_sequences: int, prompt_tokens: int, key: str | None) -> None:
        if not (self._inflight.has(num_sequences, key) and self.waiting.has(prompt_tokens, key)):
            raise QueueFullError("Too many requests are waiting; try again in a moment.")

    def _enter(self, place: Place) -> None:
        key = place.caller.key_id
        self._inflight.take(place.num_sequences, key)
        self.waiting.take(place.waiting_tokens, key)
        self._empty.clear()
        self.quotas.run(place.caller, place.num_sequences)

    def _leave(self, place: Place) -> None:
        key = place.caller.key_id
        self._inflight.take(-place.num_sequences, key)
        self.waiting.take(-place.waiting_tokens, key)
        self.quotas.run(place.caller, -place.num_sequences)
        place.release(place.held_tokens)
        if not self._inflight.taken:
            self._empty.set()
