"""What keys have used: requests and tokens of the last minute, sequences of the moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from linker_core.errors import InvalidRequestError, RateLimitError
from server.gateway.caller import Caller

_MINUTE_S = 60
Clock = Callable[[], float]  # seconds; never set back


class LastMinute:
    """A count that forgets what is older than a minute, in memory that never grows.

    Counts are kept by the second, the current one and the sixty before it, so what is within the
    last minute is never forgotten, and nothing is remembered for more than 61 seconds.
    """

    def __init__(self) -> None:
        self._counts = [0] * (_MINUTE_S + 1)
        self._second = 0  # the newest that is counted
        self._total = 0

    def add(self, amount: int, *, now: float) -> None:
        """Counts something."""
        self._move(now)
        self._counts[self._second % len(self._counts)] += amount
        self._total += amount

    def total(self, *, now: float) -> int:
        """Returns what is not forgotten."""
        self._move(now)
        return self._total

    def wait_s(self, amount: int, *, limit: int, now: float) -> float:
        """Returns after how many seconds an amount fits under a limit; 0 if it does now.

        Args:
            amount: At most the limit.
            limit: Of what a minute may have.
            now: By the clock.
        """
        excess = self.total(now=now) + amount - limit
        if excess <= 0:
            return 0.0
        oldest = self._second - _MINUTE_S
        for second in range(oldest, self._second + 1):
            excess -= self._counts[second % len(self._counts)]
            if excess <= 0:
                return second + len(self._counts) - now
        raise AssertionError("an amount above its limit")

    def _move(self, now: float) -> None:
        second = math.floor(now)
        # At most the whole ring, however long nothing was counted.
        for passed in range(max(self._second, second - len(self._counts)) + 1, second + 1):
            place = passed % len(self._counts)
            self._total -= self._counts[place]
            self._counts[place] = 0
        self._second = max(self._second, second)


class Usage:
    """What one key has used."""

    def __init__(self) -> None:
        self.requests = LastMinute()
        self.tokens = LastMinute()  # of prompts and answers, at most the limit
        self.num_held = 0  # tokens that answers under way may still use of the limit
        self.paid_at = -math.inf  # when the tokens beyond the limit have been waited for
        self.num_running = 0  # sequences, from admission to their end


class Quotas:
    """Holds keys to their limits. Event loop only.

    Args:
        clock: Monotonic, so that no change of the time of day opens or closes anything.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}  # by the ids of keys with limits

    def count_request(self, caller: Caller) -> None:
        """Counts a request, unless it is one too many.

        Raises:
            RateLimitError: It is.
        """
        limit = caller.limits.requests_per_minute
        if limit is None:
            return
        requests, now = self._of(caller).requests, self._clock()
        wait_s = requests.wait_s(1, limit=limit, now=now)
        if wait_s > 0:
            raise _used_up(f"{limit} requests", wait_s)
        requests.add(1, now=now)

    def check(self, caller: Caller, *, num_sequences: int, prompt_tokens: int) -> None:
        """Refuses sequences that are beyond a key's limits.

        Raises:
            InvalidRequestError: They would be at any time.
            RateLimitError: They are now.
        """
        limits = caller.limits
        if limits.max_parallel is not None:
            self._check_parallel(caller, limits.max_parallel, num_sequences)
        limit = limits.tokens_per_minute
        if limit is None:
            return
        if prompt_tokens > limit:
            raise InvalidRequestError(
                f"The prompts have {prompt_tokens} tokens, and this API key may use {limit} a "
                "minute; send fewer of them."
            )
        usage, now = self._of(caller), self._clock()
        wait_s = usage.tokens.wait_s(prompt_tokens, limit=limit, now=now)
        wait_s = max(wait_s, usage.paid_at - now)
        if wait_s > 0:
            raise _used_up(f"{limit} tokens", wait_s)
        if prompt_tokens > _left(usage, limit, now):
            raise RateLimitError(
                f"This API key may use {limit} tokens a minute, and answers that run may need what "
                "is left of them; wait until one has ended, or send max_tokens with each.",
                retry_after_s=1,
            )

    def spend(self, caller: Caller, num_tokens: int) -> None:
        """Counts tokens of a prompt or an answer.

        An answer that has begun is not cut short. What it takes beyond the limit is waited for: as
        long as the limit takes for as much, once everything that was counted is forgotten.
        """
        limit = caller.limits.tokens_per_minute
        if limit is None:
            return
        usage, now = self._of(caller), self._clock()
        within = min(num_tokens, _left(usage, limit, now))
        usage.tokens.add(within, now=now)
        if within < num_tokens:
            forgotten_at = now + _MINUTE_S + 1
            debt_s = (num_tokens - within) * _MINUTE_S / limit
            usage.paid_at = max(usage.paid_at, forgotten_at) + debt_s

    def hold(self, caller: Caller, num_tokens: int) -> int:
        """Keeps for an answer what it may need, or as much of it as is left; returns how much."""
        limit = caller.limits.tokens_per_minute
        if limit is None:
            return 0
        usage = self._of(caller)
        held = min(num_tokens, _left(usage, limit, self._clock()))
        usage.num_held += held
        return held

    def release(self, caller: Caller, num_tokens: int) -> None:
        """Keeps so many fewer; they are used, or are not needed."""
        if num_tokens:
            self._of(caller).num_held -= num_tokens

    def run(self, caller: Caller, num_sequences: int) -> None:
        """Counts sequences that begin, or with a negative number such that have ended."""
        if caller.limits.max_parallel is not None:
            self._of(caller).num_running += num_sequences

    def keep(self, key_ids: frozenset[str]) -> None:
        """Forgets what other keys have used, but for those whose sequences still run."""
        self._usage = {
            key: usage
            for key, usage in self._usage.items()
            if key in key_ids or usage.num_running > 0 or usage.num_held > 0
        }

    def _check_parallel(self, caller: Caller, limit: int, num_sequences: int) -> None:
        if num_sequences > limit:
            raise InvalidRequestError(
                f"The request makes {num_sequences} sequences, and this API key may run {limit} "
                "at once; send fewer prompts or a smaller n."
            )
        if self._of(caller).num_running + num_sequences > limit:
            sequences = "sequence" if limit == 1 else "sequences"
            raise RateLimitError(
                f"This API key may run {limit} {sequences} at once; wait until one has ended.",
                retry_after_s=1,
            )

    def _of(self, caller: Caller) -> Usage:
        assert caller.key_id is not None, "only keys have limits"
        usage = self._usage.get(caller.key_id)
        if usage is None:
            usage = self._usage[caller.key_id] = Usage()
        return usage


def _left(usage: Usage, limit: int, now: float) -> int:
    """Returns the tokens that are neither used nor kept for answers."""
    return limit - usage.tokens.total(now=now) - usage.num_held


def _used_up(what: str, wait_s: float) -> RateLimitError:
    return RateLimitError(
        f"This API key may use {what} a minute, and has; try again in {math.ceil(wait_s)} s.",
        retry_after_s=wait_s,
    )
