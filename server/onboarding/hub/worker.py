"""A disposable process that asks a hub: `python -m server.onboarding.hub.worker`.

Reads a task as one JSON line on stdin; prints JSON lines on stdout: progress, then one result or
one error. The token is in the environment. Killing it at any moment leaves what it has downloaded
under a name that says it is incomplete; the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from linker_core.errors import BadCheckpointError, InsufficientCapacityError, LinkerError
from linker_core.lifeline import die_with_parent
from linker_core.speech import progress_of, say
from linker_core.weights.architecture import CONFIG_FILE, parse_config
from linker_core.weights.files import parse_object
from linker_core.weights.shards import INDEX_FILE, shard_names
from server.onboarding.hub.cache import HubCache
from server.onboarding.hub.client import HubClient
from server.onboarding.hub.download import PART, download, read_small
from server.onboarding.hub.limits import HubLimits
from server.onboarding.hub.listing import HubFile, SourceKind, kind_of, wanted_files
from server.onboarding.hub.source import HubSource

TOKEN_VARIABLE = "HF_TOKEN"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 16 << 20


def main() -> int:
    """Does one task; exit status 1 after an error line."""
    die_with_parent()
    task = json.loads(sys.stdin.readline())
    try:
        say({"result": perform(task, token=os.environ.get(TOKEN_VARIABLE))})
    except LinkerError as error:
        say({"error": error.to_record()})
        return 1
    return 0


def perform(task: Mapping[str, Any], *, token: str | None) -> dict[str, Any]:
    """Looks a source up (`look`), or downloads it (`fetch`).

    Returns:
        The source at its commit, and what it is taken for.

    Raises:
        LinkerError: See `Visit`.
    """
    limits = HubLimits.from_json(task["limits"])
    is_look = task["task"] == "look"
    with contextlib.closing(HubClient(limits, token, is_hurried=is_look)) as client:
        cache = HubCache(Path(task["directory"]))
        visit = Visit(client, limits, cache, HubSource.parse(task["source"]))
        visit.check()
        if not is_look:
            visit.fetch(progress_of("downloading"))
    return {"source": str(visit.source), "kind": visit.kind.value}


class Visit:
    """One source on the hub, from its listing to its download.

    Args:
        client: Asks the hub.
        limits: What a download may take.
        cache: Takes it.
        source: At any revision; the attribute `source` is at the commit.

    Raises:
        UnsupportedFormatError: There are no weights as safetensors.
        BadCheckpointError: The listing makes no sense.
        LinkerError: The hub refuses, cannot be reached or stands still.
    """

    def __init__(
        self, client: HubClient, limits: HubLimits, cache: HubCache, source: HubSource
    ) -> None:
        info = client.describe(source)
        assert info.sha is not None
        assert info.siblings is not None
        self.source = HubSource(repo=source.repo, revision=info.sha)
        self._files = {file.name: file for file in wanted_files(info.siblings)}
        self._client, self._limits, self._cache = client, limits, cache
        self._digests: dict[str, str] = {}
        self.kind = kind_of(self._files)
        self._nbytes = sum(file.nbytes for file in self._files.values())

    def check(self) -> None:
        """Refuses what can be refused before the weights are asked for. Stores nothing.

        Raises:
            UnsupportedFormatError: A model that is not served here.
            BadCheckpointError: A config or an index that lies.
            InsufficientCapacityError: It is larger than may be downloaded, or than the disk has.
        """
        if self._limits.max_bytes is not None and self._nbytes > self._limits.max_bytes:
            raise InsufficientCapacityError(
                f"The download has {self._nbytes} bytes, and hub.max_bytes is "
                f"{self._limits.max_bytes}. Choose a smaller model, or raise it."
            )
        self._check_room()
        if CONFIG_FILE in self._files:
            parse_config(self._read(CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES))
        if self.kind is SourceKind.CHECKPOINT:
            index = None
            if INDEX_FILE in self._files:
                index = self._read(INDEX_FILE, max_bytes=_MAX_INDEX_BYTES)
            shard_names(list(self._files), index)

    def fetch(self, progress: Callable[[int, int], None]) -> None:
        """Downloads all of it. What has arrived stays for the next time, save on a full disk.

        Raises:
            LinkerError: See `download`.
        """
        try:
            self._fetch(progress)
        except InsufficientCapacityError:
            self._cache.give_up(self.source)
            raise

    def _fetch(self, progress: Callable[[int, int], None]) -> None:
        folder = self._cache.open_unfinished(self.source)
        small = [file for file in self._files.values() if not file.is_weights]
        weights = [file for file in self._files.values() if file.is_weights]
        self._download(small, folder, progress)
        stated = {file.name: file.sha256 for file in weights if file.sha256 is not None}
        whole = {**self._digests, **stated}
        if len(whole) == len(self._files) and self._cache.holds(whole):
            self._digests = whole  # another commit of the same files
        for file in weights:
            part = folder / (file.name + PART)
            is_new = not part.exists() and not (folder / file.name).exists()
            if file.name not in self._digests and file.sha256 is not None and is_new:
                self._cache.copy_known(file.sha256, part)
        self._download(weights, folder, progress)
        self._cache.finish(self.source, self._digests)
        progress(self._nbytes, self._nbytes)

    def _download(
        self, files: Sequence[HubFile], folder: Path, progress: Callable[[int, int], None]
    ) -> None:
        for file in files:
            if file.name not in self._digests:
                self._check_room()  # again: other downloads take of the same disk
                done_bytes = sum(self._files[name].nbytes for name in self._digests)
                self._digests[file.name] = download(
                    self._client,
                    self.source,
                    file,
                    folder,
                    on_bytes_done=partial(self._report, progress, done_bytes),
                )

    def _check_room(self) -> None:
        self._cache.check_room(
            self.source, self._nbytes, keep_free_bytes=self._limits.keep_free_bytes
        )

    def _report(self, progress: Callable[[int, int], None], before: int, done_bytes: int) -> None:
        progress(before + done_bytes, self._nbytes)

    def _read(self, name: str, *, max_bytes: int) -> dict[str, object]:
        file = self._files[name]
        if file.nbytes > max_bytes:
            raise BadCheckpointError(
                f"{name}: larger than the {max_bytes >> 20} MiB that are read."
            )
        return parse_object(read_small(self._client, self.source, file), name)


if __name__ == "__main__":
    sys.exit(main())
