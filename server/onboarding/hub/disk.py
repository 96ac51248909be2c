"""What the disk has to give for a download, and what it says when it cannot."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linker_core.errors import InsufficientCapacityError, NotReadyError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's are
_KEEP_SIZE = 1  # linux/falloc.h: a file's size goes on to say what was written


@contextmanager
def disk_faults() -> Iterator[None]:
    """Makes what the disk says an error that operators understand."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in _FULL:
            raise InsufficientCapacityError(
                f"The download cannot be stored: {reason}. Free space in the state directory, or "
                "delete models that came from the hub, and onboard it again."
            ) from error
        raise NotReadyError(f"The state directory cannot be written: {reason}.") from error


def stored_bytes(path: Path) -> int:
    """Returns what a file takes of the disk, room that was set aside included."""
    return path.stat().st_blocks * _BLOCK_BYTES


def check_room(directory: Path, needed_bytes: int, *, keep_free_bytes: int) -> None:
    """Refuses what would leave the disk with less than is to be kept free.

    Raises:
        InsufficientCapacityError: With what it needs and what there is.
    """
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes + keep_free_bytes > free_bytes:
        raise InsufficientCapacityError(
            f"The download needs {needed_bytes} bytes of disk and has to leave {keep_free_bytes}; "
            f"{free_bytes} are free in the state directory. Free space there, or lower "
            "hub.keep_free_bytes."
        )


def set_aside(descriptor: int, nbytes: int) -> None:
    """Has the file system hold room for a file, whose size stays; does nothing where it cannot.

    Raises:
        OSError: The disk is full. It is as full as before.
    """
    size, held = os.fstat(descriptor), os.fstatvfs(descriptor)
    missing_bytes = nbytes - size.st_blocks * _BLOCK_BYTES
    # Asked first, since some file systems would give all that they have before they refuse.
    if missing_bytes > held.f_bavail * held.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if missing_bytes > 0 and libc.fallocate(descriptor, _KEEP_SIZE, 0, nbytes):
        number = ctypes.get_errno()
        if number in _FULL:
            os.ftruncate(descriptor, size.st_size)  # gives back what lies beyond
            raise OSError(number, os.strerror(number))


def sync_directory(directory: Path) -> None:
    """Has the disk keep the names in a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
