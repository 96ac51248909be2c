"""Opens the files of an untrusted directory: regular ones only, never through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from linker_core.errors import (
    BadCheckpointError,
    InsufficientCapacityError,
    LinkerError,
    UnsupportedFormatError,
)
from linker_core.weights import strict_json

# Formats that can hold code or that are not safetensors. They are never opened.
_FOREIGN_WEIGHTS = (
    ".bin", ".pt", ".pth", ".pt2", ".pkl", ".pickle", ".ckpt", ".npz", ".npy", ".gguf", ".ggml",
    ".h5", ".msgpack", ".onnx", ".joblib",
)  # fmt: skip
# What trainers leave beside the weights. Not weights, never opened.
_TRAINER_FILES = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


def open_directory(path: Path) -> int:
    """Returns a descriptor of a directory; files are opened relative to it from then on.

    Raises:
        BadCheckpointError: Not there, or not a directory.
        InsufficientCapacityError: Too many files are open.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _not_opened(
            error,
            f"The checkpoint directory cannot be opened: {os.strerror(error.errno or 0)}. "
            "Give a directory with config.json and safetensors files.",
        ) from error


def open_regular(directory_fd: int, name: str) -> int:
    """Returns a read-only descriptor of a regular file in the directory.

    Raises:
        BadCheckpointError: Missing, a link, a FIFO, a device, or a name that leaves the directory.
        InsufficientCapacityError: Too many files are open.
    """
    if name != Path(name).name or name in ("", ".", ".."):
        raise BadCheckpointError(f"{name!r:.100} is not a plain file name. Name files, not paths.")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadCheckpointError(
                f"{name:.100}: is a symbolic link, which is not followed. Copy the files "
                "themselves (cp -rL, or a download with a local directory)."
            ) from error
        raise _not_opened(
            error, f"{name:.100}: cannot be opened ({os.strerror(error.errno or 0)})."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadCheckpointError(f"{name:.100}: is not a regular file.")
    return descriptor


def _not_opened(error: OSError, message: str) -> LinkerError:
    """Returns what is said of a file that cannot be opened; no file is to blame for the others."""
    if error.errno in _NO_DESCRIPTORS:
        return InsufficientCapacityError(
            "Too many files are open for a checkpoint to be read. Raise the limit on open files "
            "(ulimit -n), and retry."
        )
    return BadCheckpointError(message)


def read_bytes(directory_fd: int, name: str, *, max_bytes: int) -> bytes:
    """Returns a small file's content.

    Raises:
        BadCheckpointError: Missing, irregular, or larger than `max_bytes`.
    """
    with os.fdopen(open_regular(directory_fd, name), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadCheckpointError(f"{name}: larger than the {max_bytes >> 20} MiB that are read.")
    return data


def read_at(descriptor: int, buffer: memoryview, *, position: int, what: str) -> None:
    """Fills a buffer with a file's bytes from `position` on.

    Raises:
        BadCheckpointError: The file became shorter, or the disk failed; `what` cannot be read.
    """
    while buffer:
        try:
            count = os.preadv(descriptor, [buffer], position)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise BadCheckpointError(f"{what} cannot be read: {why}.") from error
        if count == 0:
            raise BadCheckpointError(
                f"{what} cannot be read: the file became shorter while it was read."
            )
        position, buffer = position + count, buffer[count:]


def read_json(directory_fd: int, name: str, *, max_bytes: int) -> dict[str, object]:
    """Returns the JSON object in a small file.

    Raises:
        BadCheckpointError: See `read_bytes`; or not one strict JSON object.
    """
    return parse_object(read_bytes(directory_fd, name, max_bytes=max_bytes), name)


def read_optional(directory: Path, name: str, *, max_bytes: int) -> bytes | None:
    """Returns a small file's content, or None where there is no entry of that name.

    Raises:
        BadCheckpointError: See `open_directory` and `read_bytes`.
    """
    directory_fd = open_directory(directory)
    try:
        if name not in os.listdir(directory_fd):  # noqa: PTH208 - of a descriptor, not a path
            return None
        return read_bytes(directory_fd, name, max_bytes=max_bytes)
    finally:
        os.close(directory_fd)


def parse_object(data: bytes, name: str) -> dict[str, object]:
    """Parses a file's content as one strict JSON object.

    Raises:
        BadCheckpointError: It is not one.
    """
    try:
        record = strict_json.parse(data)
    except ValueError as error:
        raise BadCheckpointError(f"{name}: not valid JSON: {error!s:.200}.") from error
    if not isinstance(record, dict):
        raise BadCheckpointError(f"{name}: holds no JSON object.")
    return record


def refuse_foreign_formats(names: list[str]) -> None:
    """Refuses a directory that holds pickles, archives of other formats, or code.

    Raises:
        UnsupportedFormatError: Names the first such file and the remedy.
    """
    for name in sorted(names):
        trainer_file = name in _TRAINER_FILES or name.startswith("rng_state")
        if name.lower().endswith(_FOREIGN_WEIGHTS) and not trainer_file:
            raise UnsupportedFormatError(
                f"{name:.100}: weights are accepted as safetensors only. Convert them, and leave "
                "other formats out of the directory."
            )
        if name.endswith((".py", ".pyc", ".so")):
            raise UnsupportedFormatError(
                f"{name:.100}: custom code is never run. Leave it out of the directory."
            )
