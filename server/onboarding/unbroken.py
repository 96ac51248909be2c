"""Work that a cancelled wait does not leave half done."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def unbroken(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Awaits `work` to its end; a wait that is cancelled meanwhile is cancelled afterwards.

    What a thread has begun to write goes on whether or not somebody waits for it: whoever gives
    up has to know how it ended before he undoes it. A second cancellation waits for nothing.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # retrieved: the one who asked has left
        raise
