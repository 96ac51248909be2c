"""Threads for work on texts, where long texts keep no short ones waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar
from weakref import WeakKeyDictionary

from linker_core.started_threads import started_threads
from linker_core.text.tokenizer import Tokenizer

SHORT_CHARS: Final = 64 * 1024  # some 50 ms of tokenising
# Less than a millisecond of tokenising, where waking a thread for it takes a fifth of one.
_LINE_CHARS: Final = 2048
_NUM_LONG: Final = 2

_Result = TypeVar("_Result")


class TextThreads:
    """Runs work on texts off the event loop, but for what takes no longer than a thread's start.

    Long texts have threads of their own, and one tokenizer never more than one of those: nobody
    can stop a thread, so a tokenizer that is slow with a text must not have all of them.
    """

    def __init__(self) -> None:
        self._long = started_threads(_NUM_LONG, "long-text")
        self._turns: WeakKeyDictionary[Tokenizer, asyncio.Semaphore] = WeakKeyDictionary()

    async def run(
        self,
        work: Callable[[], _Result],
        *,
        tokenizer: Tokenizer,
        num_chars: int,
        is_light: bool = False,
    ) -> _Result:
        """Returns what blocking work returns.

        Args:
            work: Tokenises a text, most of all.
            tokenizer: With which it does.
            num_chars: Length of the text.
            is_light: Whether it is next to nothing but that.
        """
        if is_light and num_chars <= _LINE_CHARS and tokenizer.is_linear:
            return work()
        if num_chars <= SHORT_CHARS:
            return await asyncio.to_thread(work)
        loop = asyncio.get_running_loop()
        turn = self._turns.setdefault(tokenizer, asyncio.Semaphore())
        await turn.acquire()
        running = self._long.submit(work)
        # When the work has ended, not when somebody stops waiting for it.
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(turn.release))
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Starts no more work on long texts."""
        self._long.shutdown(wait=False, cancel_futures=True)
