"""Where checkpoints may come from: directories inside the configured roots, and the one hub."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from linker_core.errors import (
    ForbiddenSourceError,
    InvalidRequestError,
    LinkerError,
    NotReadyError,
)
from linker_core.sharing.delta import is_delta
from linker_core.sharing.plan import Policy
from linker_core.weights.checkpoint import Identity
from linker_core.weights.lora import is_adapter
from server.onboarding.adapters import Source
from server.onboarding.hub.hub import Hub, OnProgress
from server.onboarding.hub.listing import SourceKind
from server.onboarding.hub.source import HubSource, is_hub_source
from server.onboarding.prepare import read_again
from server.onboarding.request import OnboardRequest, own_plan_request

logger = logging.getLogger(__name__)

_MAX_SOURCE_CHARS = 4096


class Found(NamedTuple):
    """A source that may be onboarded from."""

    source: str  # as rows have it: a directory, every link followed, or hub:ORG/NAME@COMMIT
    kind: SourceKind
    path: Path | None  # its directory; None: it is to be downloaded

    def meant_by(self, request: OnboardRequest, said: Mapping[str, Any]) -> OnboardRequest:
        """Returns a request with its source as found; where that has a plan, without a policy.

        Args:
            request: As it was asked.
            said: Policy and options that were asked for; the request's others are defaults.

        Raises:
            InvalidRequestError: See `own_plan_request`.
        """
        request = replace(request, source=self.source)
        if self.kind is SourceKind.CHECKPOINT:
            return request
        return own_plan_request(request, said, Policy(self.kind))


class Sources:
    """Finds what requests and rows mean by a source. Event loop only.

    Args:
        roots: Directories that sources must lie in.
        hub: Has the others.

    Attributes:
        roots: As given.
        hub: As given.
        on_arrived: Called when a download that was missing for a stored model is here again.
    """

    def __init__(self, roots: Sequence[Path], hub: Hub) -> None:
        self.roots = tuple(roots)
        self.hub = hub
        self._missing: dict[HubSource, asyncio.Task[None]] = {}
        self.on_arrived: Callable[[], None] = _do_nothing

    async def find(self, source: str) -> Found:
        """Looks at what a request names, without reading or downloading weights.

        Raises:
            InvalidRequestError: Neither a path nor a source on the hub, or nothing is there.
            ForbiddenSourceError: Outside every root.
            LinkerError: See `Hub.look`.
        """
        if is_hub_source(source):
            offer = await self.hub.look(HubSource.parse(source))
            return Found(str(offer.source), offer.kind, offer.path)
        path = await asyncio.to_thread(resolve_source, source, self.roots)
        return Found(str(path), await asyncio.to_thread(_kind_of, path), path)

    async def path(self, source: str, *, on_progress: OnProgress) -> Path:
        """Returns the directory of a source as rows have it, downloaded where it is not here.

        Cancelling the wait ends a download that nobody else waits for; what has arrived is kept for
        the next one, as long as a row speaks of the source.

        Raises:
            LinkerError: See `Hub.fetch`.
        """
        if not is_hub_source(source):
            return Path(source)
        on_hub = HubSource.parse(source)
        if not on_hub.is_pinned:  # of a start whose hub could not be asked then
            await self.hub.look(on_hub)  # says why, most likely
            raise NotReadyError(
                f"The hub could not be asked which commit {on_hub.revision} is when the server "
                "started. Start it again, or name a commit."
            )
        return await self.hub.fetch(on_hub, on_progress=on_progress)

    async def read(self, source: str, *, identity: Identity | None = None) -> Source:
        """Validates a source that was accepted earlier; see `read_again`.

        Args:
            source: As rows have it.
            identity: Of the files that were accepted; None if only their digest is known.

        Raises:
            BadCheckpointError: See `read_again`.
            UnsupportedFormatError: See `read_again`.
            NotReadyError: Its download is gone and has been begun again.
        """
        if not is_hub_source(source):
            return await asyncio.to_thread(
                read_again, Path(source), source=source, identity=identity
            )
        path = await self.here(source)
        if path is None:
            self._download_again(HubSource.parse(source))
            raise NotReadyError("The model's files are being downloaded again; try again later.")
        return await asyncio.to_thread(read_again, path, source=str(path), identity=identity)

    async def here(self, source: str) -> Path | None:
        """Returns the directory of a source as rows have it; None of a download that is gone."""
        if not is_hub_source(source):
            return Path(source)
        return await self.hub.locate(HubSource.parse(source))

    async def kept(self, source: str) -> list[str]:
        """Returns what rows may have for a source, as far as that is known without the hub."""
        if not is_hub_source(source):
            return [source]
        return [str(pinned) for pinned in await self.hub.remembered(HubSource.parse(source))]

    @contextmanager
    def held(self, source: str) -> Iterator[None]:
        """Keeps the download of a source that no row speaks of, as rows have it."""
        if not is_hub_source(source):
            yield
            return
        with self.hub.held(HubSource.parse(source)):
            yield

    async def sweep(self, sources: Callable[[], Iterable[str]]) -> None:
        """Removes the downloads that none of the sources of rows needs; see `Hub.sweep`."""
        await self.hub.sweep(sources)

    async def close(self) -> None:
        """Ends the downloads that were begun again."""
        tasks = list(self._missing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _download_again(self, source: HubSource) -> None:
        if source not in self._missing:
            self._missing[source] = asyncio.ensure_future(self._until_here(source))

    async def _until_here(self, source: HubSource) -> None:
        try:
            await self.hub.fetch(source, on_progress=ignore_bytes)
        except LinkerError as error:
            logger.warning("%s cannot be downloaded again: %s", source, error.message)
        else:
            self.on_arrived()
        finally:
            del self._missing[source]


def resolve_source(source: str, roots: Sequence[Path]) -> Path:
    """Returns the directory that a source means, every symbolic link followed.

    Args:
        source: An absolute path, or a path relative to the first root.
        roots: The directories that a source must be or lie in, once they are resolved too.

    Raises:
        InvalidRequestError: Not a path at all.
        ForbiddenSourceError: Outside every root. Whether something is there is not said.
    """
    if not source or "\0" in source or len(source) > _MAX_SOURCE_CHARS:
        raise InvalidRequestError("A source is the path of a model directory.", param="source")
    allowed = [root.resolve() for root in roots]
    try:
        path = (allowed[0] / source).resolve()  # an absolute source replaces the root
    except (IndexError, OSError, RuntimeError):  # no roots, a loop of links, too long a part
        path = None
    if path is not None and any(path.is_relative_to(root) for root in allowed):
        return path
    raise ForbiddenSourceError(
        "The source is not inside a directory this server may read models from. Move it under "
        "the models root, or name it when the server is started.",
        param="source",
    )


def _kind_of(path: Path) -> SourceKind:
    if is_adapter(path):
        return SourceKind.ADAPTER
    return SourceKind.DELTA if is_delta(path) else SourceKind.CHECKPOINT


def _do_nothing() -> None:
    pass


def ignore_bytes(_done_bytes: int, _total_bytes: int) -> None:
    """Nobody follows a download."""
