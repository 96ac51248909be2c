"""The files of a folder of weights, taken apart and put together whatever is left of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

Mutation = Callable[[Path, random.Random], bool]
SAME, OTHER = False, True  # what is read, if anything is
_MAX_BYTES = 1 << 24


def weight_files(folder: Path) -> list[Path]:
    """The files to spoil; holes of gigabytes are left as they are."""
    files = (path for path in sorted(folder.glob("*.safetensors")) if path.is_file())
    return [path for path in files if path.stat().st_size < _MAX_BYTES]


def split(file: Path) -> tuple[str, bytes]:
    """Header text and data of a file, whatever is left of them."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    length = min(length, len(data))
    return data[8 : 8 + length].decode("utf-8", "replace"), data[8 + length :]


def join(file: Path, header: str | bytes, body: bytes, *, length: int | None = None) -> None:
    encoded = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    prefix = struct.pack("<Q", len(encoded) if length is None else length)
    file.write_bytes(prefix + encoded + body)


def json_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if path.is_file()]
