"""Folders that appear whole or not at all: made under another name, synced, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linker_core.errors import ConflictError, InsufficientCapacityError, InvalidRequestError

INCOMPLETE = ".incomplete-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def check_target(target: Path) -> None:
    """Refuses what `new_folder` would refuse, before costly work for it is done.

    Raises:
        ConflictError: The target exists.
        InvalidRequestError: It is to be made in no folder.
    """
    for refused, code in (
        (os.path.lexists(target), errno.EEXIST),
        (not target.parent.is_dir(), errno.ENOENT),
    ):
        if refused:
            raise _typed(OSError(code, os.strerror(code)), target)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` at the end, with all that was put into it.

    It is removed instead if the block raises; a process that is killed leaves it behind, under a
    name that begins with `INCOMPLETE`.

    Raises:
        InsufficientCapacityError: The disk is full.
        ConflictError: The target exists.
        InvalidRequestError: The target cannot be written for another reason.
        BrokenPipeError: The block's own; it tells nothing of the target.
    """
    folder = target.parent / f"{INCOMPLETE}{target.name[:100]}-{secrets.token_hex(8)}"
    try:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        folder.mkdir(mode=0o755)
        try:
            yield folder
            for path in (*folder.iterdir(), folder):
                _sync(path)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _sync(target.parent)
    except BrokenPipeError:  # of whoever hears of progress; regular files raise none
        raise
    except OSError as error:
        raise _typed(error, target) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _typed(
    error: OSError, target: Path
) -> ConflictError | InsufficientCapacityError | InvalidRequestError:
    why = os.strerror(error.errno or 0)
    if error.errno in _FULL:
        return InsufficientCapacityError(
            f"There is no room on the disk for {target.name}: {why}. Nothing was kept; free some "
            "space and try again.",
            param="target",
        )
    if error.errno in _TAKEN:
        return ConflictError(
            f"{target.name} cannot be made: {why}. Name a folder that does not exist yet.",
            param="target",
        )
    return InvalidRequestError(
        f"{target.name} cannot be written: {why}. Name a folder in a directory that exists and "
        "may be written to.",
        param="target",
    )
