"""The hub as the server meets it: sources are looked up, downloaded, found again and swept."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from linker_core.errors import QueueFullError
from server.onboarding.hub.cache import HubCache
from server.onboarding.hub.limits import HubLimits
from server.onboarding.hub.listing import SourceKind
from server.onboarding.hub.source import HubSource, is_hub_source
from server.onboarding.processes import OnStageProgress, run_worker
from server.settings import HubSettings

HUB_COMMAND = (sys.executable, "-P", "-m", "server.onboarding.hub.worker")
_LOOKS = 4  # at once
_MAX_LOOKS = 32  # running and waiting

OnProgress = Callable[[int, int], None]  # bytes that are there, bytes in all


class Offer(NamedTuple):
    """What the hub has under a source."""

    source: HubSource  # at its commit
    kind: SourceKind
    path: Path | None  # where it is, if it is here already


class _Transfer:
    """A download that runs, and who waits for it."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Path] | None = None
        self.listeners: list[OnProgress] = []
        self.is_wanted = True

    def on_progress(self, _stage: str, done_bytes: int, total_bytes: int) -> None:
        for listener in self.listeners:
            listener(done_bytes, total_bytes)


class Hub:
    """Downloads under the state directory. Event loop only.

    Args:
        directory: Holds them and nothing else.
        settings: Where they come from and what they may take.
        command: The worker's command line.
        retry_wait_s: Before a failed request is tried again; doubles.
    """

    def __init__(
        self,
        directory: Path,
        settings: HubSettings,
        *,
        command: Sequence[str] = HUB_COMMAND,
        retry_wait_s: float = 1.0,
    ) -> None:
        self._directory = directory
        self._cache = HubCache(directory)
        self._limits = HubLimits.of(settings, retry_wait_s=retry_wait_s)
        self._command = command
        self._looks = asyncio.Semaphore(_LOOKS)
        self._num_looks = 0
        self._downloads = asyncio.Semaphore(settings.downloads)
        self._transfers: dict[HubSource, _Transfer] = {}
        self._held: Counter[HubSource] = Counter()
        self._sweeping = asyncio.Lock()  # guards the cache against being read while it is swept

    async def look(self, source: HubSource) -> Offer:
        """Looks a source up: what commit it is, whether it may and can be downloaded.

        A commit that is here already is found without asking anybody.

        Raises:
            InvalidRequestError: There is no such repository or revision for us.
            UnsupportedFormatError: It holds no weights as safetensors, or a model not served here.
            BadCheckpointError: Its listing, config or index is wrong.
            InsufficientCapacityError: It is too large for the disk or the settings.
            NotReadyError: The hub cannot be asked now.
            QueueFullError: Too many sources are being looked up.
        """
        if source.is_pinned and (here := await self._find(source)) is not None:
            return here
        if self._num_looks >= _MAX_LOOKS:
            raise QueueFullError("Too many sources are being looked up; try again later.")
        self._num_looks += 1
        try:
            async with self._looks:
                result = await self._run("look", source, _ignore)
        finally:
            self._num_looks -= 1
        pinned = HubSource.parse(result["source"])
        if not source.is_pinned:
            async with self._sweeping:
                await asyncio.to_thread(self._cache.remember, source, pinned)
        return await self._find(pinned) or Offer(pinned, SourceKind(result["kind"]), None)

    async def fetch(self, source: HubSource, *, on_progress: OnProgress) -> Path:
        """Returns the directory of a source at a commit, downloaded where it is not here.

        Who asks for the same source meanwhile waits for the same download. It ends, and keeps what
        has arrived, when nobody waits for it any more.

        Raises:
            LinkerError: See `look`; or what arrives is not what the hub lists.
        """
        assert source.is_pinned
        while (transfer := self._transfers.get(source)) is not None and not transfer.is_wanted:
            assert transfer.task is not None
            await asyncio.wait([transfer.task])  # its worker is being killed
        if transfer is None:
            transfer = self._begin(source)
        assert transfer.task is not None
        transfer.listeners.append(on_progress)
        try:
            return await asyncio.shield(transfer.task)
        finally:
            transfer.listeners.remove(on_progress)
            if not transfer.listeners and not transfer.task.done():
                transfer.is_wanted = False
                transfer.task.cancel()
                await asyncio.wait([transfer.task])

    async def locate(self, source: HubSource) -> Path | None:
        """Returns the directory of a source at a commit if it is here. Nobody is asked."""
        here = await self._find(source)
        return None if here is None else here.path

    async def remembered(self, source: HubSource) -> list[HubSource]:
        """Returns the commits of kept sources that a revision was when it was looked up."""
        if source.is_pinned:
            return [source]
        async with self._sweeping:
            return await asyncio.to_thread(self._cache.remembered, source)

    @contextmanager
    def held(self, source: HubSource) -> Iterator[None]:
        """Keeps a source's download from being swept, for who has no row that speaks of it."""
        self._held[source] += 1
        try:
            yield
        finally:
            self._held[source] -= 1
            if not self._held[source]:
                del self._held[source]

    async def sweep(self, sources: Callable[[], Iterable[str]]) -> None:
        """Removes downloads, whole and broken off, that nobody needs.

        Args:
            sources: Returns all that rows speak of, when nothing can be found any more that it does
                not name; those that are not on the hub are passed over.
        """
        async with self._sweeping:
            named = [HubSource.parse(source) for source in sources() if is_hub_source(source)]
            kept = {source for source in named if source.is_pinned}
            kept |= self._transfers.keys()
            kept |= self._held.keys()
            await asyncio.to_thread(self._cache.sweep, kept)

    def _begin(self, source: HubSource) -> _Transfer:
        transfer = self._transfers[source] = _Transfer()

        def on_end(task: asyncio.Task[Path]) -> None:
            del self._transfers[source]
            if not task.cancelled():
                task.exception()  # those who waited have it

        transfer.task = asyncio.ensure_future(self._download(source, transfer.on_progress))
        transfer.task.add_done_callback(on_end)
        return transfer

    async def _download(self, source: HubSource, on_progress: OnStageProgress) -> Path:
        here = await self._find(source)  # a sweep that began before this has ended then
        if here is None:
            async with self._downloads:
                await self._run("fetch", source, on_progress)
            here = await self._find(source)
        assert here is not None
        assert here.path is not None
        return here.path

    async def _find(self, source: HubSource) -> Offer | None:
        async with self._sweeping:
            snapshot = await asyncio.to_thread(self._cache.find, source)
        return None if snapshot is None else Offer(source, snapshot.kind, snapshot.path)

    async def _run(
        self, task: str, source: HubSource, on_progress: OnStageProgress
    ) -> Mapping[str, Any]:
        request = {
            "task": task,
            "source": str(source),
            "directory": str(self._directory),
            "limits": self._limits.to_json(),
        }
        return await run_worker(self._command, request=request, on_progress=on_progress)


def _ignore(_stage: str, _done_bytes: int, _total_bytes: int) -> None:
    pass
