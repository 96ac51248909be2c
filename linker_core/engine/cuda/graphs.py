"""Work that is captured when it comes again, and replayed from then on.

A replay launches what was captured over the same addresses: whatever a step changes has to lie in
tensors that stay where they are. Rows are not padded to a few batch sizes: there are no more sizes
than sequences at once, and graphs share one memory pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch

Replay = Callable[[], None]


class Capture(Protocol):
    """Makes a replay of some work."""

    def __call__(self, body: Callable[[], None]) -> Replay:
        """Notes down what `body` does to which tensors, and does none of it.

        Args:
            body: Has run before. Waits for nothing on the device, and copies nothing to it.
        """

    def forget(self) -> None:
        """Every replay has been dropped."""


class GraphCapture:
    """Captures CUDA graphs, whose temporary tensors share one pool.

    Graphs may share it because none leaves anything there that is read after its end.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # torch's type of a handle is private

    def __call__(self, body: Callable[[], None]) -> Replay:
        """See `Capture.__call__`."""
        if self._stream is None:
            # The default stream cannot be captured.
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which empties the allocator's cache every time.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay

    def forget(self) -> None:
        """See `Capture.forget`."""
        self._pool = None  # it goes with the last graph, and cannot be entered again


class _Captured(NamedTuple):
    replay: Replay
    kept: list[torch.Tensor]  # what it reads that nobody else may hold


class Replays:
    """The replays of the keys that came last.

    Args:
        capture: Makes them; None: nothing is ever replayed.
        limit: How many are kept.
    """

    def __init__(self, capture: Capture | None, *, limit: int) -> None:
        assert limit > 0
        self._capture, self._limit = capture, limit
        self._known: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: ran once
        self._kept: list[torch.Tensor] | None = None  # of what is being captured

    def __len__(self) -> int:
        return len(self._known)

    def run(self, key: Hashable | None, body: Callable[[], None]) -> None:
        """Runs `body` or its replay.

        It is captured when a key comes the second time, since many a batch comes but once; it is
        run before, so that all that it makes only once is there.

        Args:
            key: Tells what `body` does, and to which tensors; None if it never comes again.
            body: The work.
        """
        if key is None or self._capture is None:
            body()
            return
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            known.replay()
            return
        body()
        # What `body` may have made everybody forget is not here any more.
        is_second = key in self._known
        self._known[key] = self._captured(self._capture, body) if is_second else None
        self._known.move_to_end(key)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)

    def keep(self, tensor: torch.Tensor) -> None:
        """Keeps what is read by the work that is being captured, if any, for its replays."""
        if self._kept is not None:
            self._kept.append(tensor)

    def forget(self) -> None:
        """Drops every replay."""
        self._known.clear()
        if self._capture is not None:
            self._capture.forget()

    def _captured(self, capture: Capture, body: Callable[[], None]) -> _Captured:
        kept = self._kept = []
        try:
            return _Captured(capture(body), kept)
        finally:
            self._kept = None
