"""The downloads under the state directory: found, shared and swept.

    trees/DIGEST/       the files of one download, named by their content
    records/KEY.json    which tree a source at a commit is, and its files' digests
    unfinished/KEY/     what is being downloaded, or was when its download broke off
    revisions.json      which commits branches and tags were when they were looked up

A tree is complete or not there, and has its own files: a link to one more name would change what
tells that a file is still the one that was checked. Blocking; of one server and its workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.onboarding.hub.disk import check_room, disk_faults, stored_bytes, sync_directory
from server.onboarding.hub.listing import SourceKind, kind_of
from server.onboarding.hub.source import HubSource

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 26
_GONE = "gone-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A download that is complete."""

    path: Path
    digests: Mapping[str, str]  # file -> SHA-256

    @property
    def kind(self) -> SourceKind:
        """What its files are taken for."""
        return kind_of(self.digests)


class HubCache:
    """The folders of one state directory.

    Args:
        directory: Holds them and nothing else; made when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        self._trees = directory / "trees"
        self._records = directory / "records"
        self._unfinished = directory / "unfinished"
        self._revisions = directory / "revisions.json"

    def find(self, source: HubSource) -> Snapshot | None:
        """Returns the download of a source at a commit, or None where it is not here."""
        record = _read_json(self._record(source))
        tree, digests = record.get("tree"), record.get("files")
        if not isinstance(tree, str) or not isinstance(digests, dict):
            return None
        path = self._trees / tree
        if not _is_whole(path, digests):
            return None
        return Snapshot(path=path.resolve(), digests=digests)

    def holds(self, digests: Mapping[str, str]) -> bool:
        """Whether a download of just these files is here."""
        return _is_whole(self._trees / _tree_name(digests), digests)

    def check_room(self, source: HubSource, nbytes: int, *, keep_free_bytes: int) -> None:
        """Refuses a download that would leave the disk with less than is to be kept free.

        Raises:
            InsufficientCapacityError: With what it needs and what there is.
        """
        # What has arrived, and the room that was set aside, is not asked for again.
        folder = self._unfinished / source.key
        there = sum(map(stored_bytes, _entries(folder)))
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        check_room(existing, max(nbytes - there, 0), keep_free_bytes=keep_free_bytes)

    def open_unfinished(self, source: HubSource) -> Path:
        """Returns the folder that a source is downloaded into, made where it is not there."""
        folder = self._unfinished / source.key
        with disk_faults():
            for directory in (self._trees, self._records, folder):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def copy_known(self, sha256: str, target: Path) -> None:
        """Copies a file that another download brought, if one did; shared where the disk can."""
        for path in self._records.iterdir():
            record = _read_json(path)
            known = record.get("files", {})
            for known_name, digest in known.items():
                origin = self._trees / str(record.get("tree")) / known_name
                if digest == sha256 and origin.is_file():
                    _copy(origin, target)
                    return

    def finish(self, source: HubSource, digests: Mapping[str, str]) -> Snapshot:
        """Makes a folder whose files are all there and on the disk a tree, and notes it down."""
        folder, tree = self._unfinished / source.key, self._trees / _tree_name(digests)
        with disk_faults():
            if _is_whole(tree, digests):
                shutil.rmtree(folder)
            else:
                for path in folder.iterdir():
                    if path.name not in digests:
                        path.unlink()  # of a listing that the hub has changed since
                sync_directory(folder)
                if tree.exists():  # somebody has taken files out of it
                    shutil.rmtree(tree)
                folder.rename(tree)
                sync_directory(self._trees)
            content = {"source": str(source), "tree": tree.name, "files": dict(digests)}
            self._write(self._record(source), content)
        return Snapshot(path=tree.resolve(), digests=digests)

    def give_up(self, source: HubSource) -> None:
        """Removes what has arrived of a source."""
        _remove(self._unfinished / source.key)

    def remember(self, named: HubSource, pinned: HubSource) -> None:
        """Notes which commit a branch or a tag was."""
        known = _read_json(self._revisions)
        commits = known.get(str(named), [])
        if str(pinned) not in commits:
            with disk_faults():
                self._write(self._revisions, {**known, str(named): [*commits, str(pinned)]})

    def remembered(self, named: HubSource) -> list[HubSource]:
        """Returns the commits of kept sources that a branch or a tag was when it was looked up."""
        commits = _read_json(self._revisions).get(str(named), [])
        return [HubSource.parse(pinned) for pinned in commits]

    def sweep(self, kept: Iterable[HubSource]) -> None:
        """Removes what none of these sources, all at commits, needs. Nothing else may be written.

        What cannot be removed is logged and left to the next sweep.
        """
        sources = set(kept)
        keys = {source.key for source in sources}
        records = [self._records / f"{key}.json" for key in keys]
        trees = {_read_json(path).get("tree") for path in records}
        for path in _entries(self._records):
            if path not in records:
                _remove(path)
        for path in _entries(self._trees):
            if path.name not in trees:
                # Gone at once, so that it is never found while it is being removed.
                with contextlib.suppress(OSError):
                    path.rename(self._unfinished / (_GONE + path.name))
        for path in _entries(self._unfinished):
            if path.name not in keys:
                _remove(path)
        self._forget_revisions({str(source) for source in sources})

    def _forget_revisions(self, pinned: set[str]) -> None:
        known = _read_json(self._revisions)
        kept = {name: [c for c in commits if c in pinned] for name, commits in known.items()}
        left = {name: commits for name, commits in kept.items() if commits}
        if left != known:
            with contextlib.suppress(OSError):
                self._write(self._revisions, left)

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        """Writes a record so that it is there as a whole or not at all."""
        self._unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._unfinished / path.name
        with draft.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        sync_directory(path.parent)

    def _record(self, source: HubSource) -> Path:
        assert source.is_pinned
        return self._records / f"{source.key}.json"


def _tree_name(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _is_whole(tree: Path, names: Iterable[str]) -> bool:
    return tree.is_dir() and all((tree / name).is_file() for name in names)


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []  # nothing was downloaded so far
    except OSError as error:
        logger.warning("the downloads cannot be listed: %s", error)
        return []


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, os.strerror(error.errno or 0))


def _copy(origin: Path, target: Path) -> None:
    """Copies inside the kernel, which file systems that can do as one more reference.

    What cannot be copied is left to the download.
    """
    try:
        with origin.open("rb") as source, target.open("wb") as sink:
            while os.copy_file_range(source.fileno(), sink.fileno(), _COPY_BYTES):
                pass
    except OSError as error:
        logger.warning("a download cannot be copied: %s", os.strerror(error.errno or 0))
        _remove(target)


def _read_json(path: Path) -> dict[str, Any]:
    """Returns a record of ours; empty where there is none that can be read."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return {}
    return record if isinstance(record, dict) else {}
