"""Brings one file of a repository into a folder: hashed while it streams, resumed where it broke.

A file has its name from the moment that all of it is checked and on the disk, and another before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import httpx2

from linker_core.errors import BadCheckpointError
from server.onboarding.hub.client import HubClient, headers_start
from server.onboarding.hub.disk import disk_faults, set_aside
from server.onboarding.hub.listing import HubFile
from server.onboarding.hub.source import HubSource

PART = ".part"
_READ_BYTES = 1 << 20

OnBytesDone = Callable[[int], None]


def download(
    client: HubClient,
    source: HubSource,
    file: HubFile,
    folder: Path,
    *,
    on_bytes_done: OnBytesDone,
) -> str:
    """Downloads a file; returns its SHA-256. One that is there and right is only read.

    Args:
        client: Asks the hub.
        source: The repository at a commit.
        file: What to download.
        folder: Where it goes. Nobody else writes there.
        on_bytes_done: Hears how many of the file's bytes are there.

    Raises:
        BadCheckpointError: The bytes are not those that the hub's listing says.
        InsufficientCapacityError: The disk is full.
        LinkerError: The hub refuses, cannot be reached or stands still.
    """
    target = folder / file.name
    part = folder / (file.name + PART)
    with disk_faults():
        if target.exists():
            target.rename(part)  # checked once more: the hub may list another file by now
    was_resumed = part.exists()
    try:
        digest = _bring(client, source, file, part, on_bytes_done)
    except BadCheckpointError:
        part.unlink(missing_ok=True)
        if not was_resumed:
            raise
        # What a kill or a power loss left may be at fault.
        digest = _bring(client, source, file, part, on_bytes_done)
    with disk_faults():
        part.rename(target)
    return digest


def read_small(client: HubClient, source: HubSource, file: HubFile) -> bytes:
    """Returns a small file's content, and stores nothing.

    Raises:
        BadCheckpointError: The bytes are not those that the hub's listing says.
        LinkerError: The hub refuses, cannot be reached or stands still.
    """

    def attempt() -> bytes:
        with client.opened(source, file, start=0) as response:
            return response.read()

    data = client.persistently(attempt, source)
    digests = _Digests(file)
    digests.update(data)
    digests.check(len(data))
    return data


class _Digests:
    """What a file is known by, of the bytes so far."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        # What git names a blob by; nobody's choice here, and the large files have SHA-256.
        self._git = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        """Takes what comes next."""
        self._sha256.update(chunk)
        if self._file.git_id is not None:
            self._git.update(chunk)

    def check(self, nbytes: int) -> str:
        """Returns the SHA-256 of all bytes.

        Raises:
            BadCheckpointError: They are not the file that the hub lists.
        """
        sha256, git_id = self._sha256.hexdigest(), self._git.hexdigest()
        is_right = self._file.git_id == git_id or self._file.sha256 == sha256
        if nbytes != self._file.nbytes or not is_right:
            raise BadCheckpointError(
                f"{self._file.name}: what the hub sent is not the file that it lists (size or "
                "digest differ). Try again, or choose another source."
            )
        return sha256


class _PartFile:
    """A file that grows by what is hashed. Its size says how much there is."""

    def __init__(self, path: Path, file: HubFile, on_bytes_done: OnBytesDone) -> None:
        self._file = file
        self._on_bytes_done = on_bytes_done
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._restart()
        while chunk := os.pread(self._descriptor, _READ_BYTES, self.nbytes):
            self._note(chunk)
        if self.nbytes > file.nbytes:
            self.begin_at(0)
        set_aside(self._descriptor, file.nbytes)

    def begin_at(self, start: int) -> None:
        """Goes on after `start` bytes, which is either all there is or nothing."""
        if start == self.nbytes:
            return
        if start != 0:
            raise BadCheckpointError(
                f"{self._file.name}: the hub sends another part of it than was asked for."
            )
        os.ftruncate(self._descriptor, 0)
        self._restart()

    def append(self, chunk: bytes) -> None:
        """Writes what comes next.

        Raises:
            BadCheckpointError: It is more than the file has.
            InsufficientCapacityError: The disk is full.
        """
        if self.nbytes + len(chunk) > self._file.nbytes:
            raise BadCheckpointError(f"{self._file.name}: the hub sends more than it lists.")
        with disk_faults():
            written, at = 0, self.nbytes
            while written < len(chunk):
                written += os.pwrite(self._descriptor, chunk[written:], at + written)
        self._note(chunk)

    def finish(self) -> str:
        """Returns the SHA-256 of a file that is complete, right and on the disk.

        Raises:
            BadCheckpointError: It is not right.
        """
        sha256 = self._digests.check(self.nbytes)
        with disk_faults():
            os.fsync(self._descriptor)
        return sha256

    def close(self) -> None:
        os.close(self._descriptor)

    def _restart(self) -> None:
        self.nbytes = 0
        self._digests = _Digests(self._file)

    def _note(self, chunk: bytes) -> None:
        self._digests.update(chunk)
        self.nbytes += len(chunk)
        self._on_bytes_done(self.nbytes)


def _bring(
    client: HubClient, source: HubSource, file: HubFile, path: Path, on_bytes_done: OnBytesDone
) -> str:
    with disk_faults():
        part = _PartFile(path, file, on_bytes_done)
    with contextlib.closing(part):

        def attempt() -> None:
            if part.nbytes < file.nbytes:
                with client.opened(source, file, start=part.nbytes) as response:
                    part.begin_at(headers_start(response))
                    for chunk in response.iter_raw():
                        part.append(chunk)
            if part.nbytes < file.nbytes:  # a body without a length may just end
                raise httpx2.RemoteProtocolError("the body ended early")

        client.persistently(attempt, source, gained=lambda: part.nbytes)
        return part.finish()
