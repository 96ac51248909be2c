"""All metrics of a server as one text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from linker_core.started_threads import started_threads
from server.metrics.families import FAMILIES
from server.metrics.text import header, series
from server.metrics.view import View

_BUILT: Final = FAMILIES["linker_build_info"]
# Some 0.3 ms; then other threads have their turn. Unasked, a thread keeps the interpreter for 5 ms,
# in which the event loop would hand no token on.
_PIECES_AT_ONCE: Final = 100

Part = Callable[[View], Iterable[str]]  # families of its own, in pieces


class Exposition:
    """What a scrape reads.

    Scrapes have a thread of their own and follow one another on it: however many wait for a
    database that does not answer, no other work waits with them.

    Args:
        registry: Of what is rare or of no model; the process's own metrics join it.
        parts: What else there is; never asked on two threads at a time.
        version: Of the server.
    """

    def __init__(self, registry: CollectorRegistry, parts: Sequence[Part], *, version: str) -> None:
        # A second series beside every counter, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        ProcessCollector(registry=registry)
        self._registry = registry
        self._parts = parts
        self._built = f"{header(_BUILT)}{series(_BUILT.name, {'version': version})} 1\n"
        self._thread = started_threads(1, "scrape")

    async def scrape(self, view: View) -> bytes:
        """Returns every series, made where nobody waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.render, view)

    def close(self) -> None:
        """Ends the thread; scrapes that wait for it are cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def render(self, view: View) -> bytes:
        """Returns every series. Blocking; one thread at a time, as parts keep what they wrote."""
        rare = generate_latest(self._registry)
        pieces = [rare, self._built.encode()]
        for piece in chain.from_iterable(render(view) for render in self._parts):
            if len(pieces) % _PIECES_AT_ONCE == 0:
                time.sleep(0)
            pieces.append(piece.encode())
        # Put together once: megabytes that are copied cost more than the numbers in them.
        return b"".join(pieces)
