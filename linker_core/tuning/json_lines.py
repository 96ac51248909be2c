"""A user's file, and JSON lines of one: bounded, strict, refused with the line at fault."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from linker_core.weights import strict_json

Row = TypeVar("Row")

MAX_FILE_BYTES: Final = 64 << 20
MAX_ROW_BYTES: Final = 1 << 20
MAX_ROWS: Final = 100_000  # rows become objects: a full file of tiny ones would take gigabytes


def read_bytes(source: Path) -> bytes:
    """Returns the content of a user's file. Never blocks, as a FIFO or a device could.

    Raises:
        ValueError: Cannot be opened, no regular file, or too large.
    """
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"the file cannot be opened: {os.strerror(error.errno or 0)}") from error
    except ValueError as error:  # a null byte in the name
        raise ValueError(f"the file cannot be opened: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("this is not a regular file; name one, no folder and no device")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB; give a smaller one")
    return data


def parse_rows(data: bytes, make: Callable[[Any], Row], *, max_rows: int = MAX_ROWS) -> list[Row]:
    """Returns what `make` makes of every line that is not blank.

    Args:
        data: Of `read_bytes`.
        make: From a JSON value; raises ValueError that says what is wrong with the row.
        max_rows: More are refused.

    Raises:
        ValueError: Names the first line that is at fault, or there is no row at all.
    """
    rows: list[Row] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(rows) == max_rows:
            raise ValueError(f"the file has more than {max_rows} rows; give fewer")
        try:
            if len(line) > MAX_ROW_BYTES:
                raise ValueError(f"longer than {MAX_ROW_BYTES >> 20} MiB")
            rows.append(make(strict_json.parse(line)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error!s:.200}") from error
    if not rows:
        raise ValueError("the file has no rows")
    return rows
