"""The header of one safetensors file, checked by ourselves before a byte of data is read.

The format's own library accepts duplicate names and any name at all, so the checks are made here:
RELIABILITY rows A1 to A6.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from linker_core.errors import BadCheckpointError, UnsupportedFormatError
from linker_core.weights import strict_json

MAX_HEADER_BYTES = 16 << 20
_LENGTH_BYTES = 8
FLOATS: Final = MappingProxyType({"BF16": 2, "F16": 2, "F32": 4})  # type -> bytes of an element
_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies. Data is row-major, little-endian, without gaps."""

    name: str
    dtype: str  # BF16, F16 or F32; in a delta file also U8 or I64
    shape: tuple[int, ...]
    nbytes: int
    shard: int  # index of its file in the checkpoint
    offset: int  # of its first byte from the start of the file


class Header(NamedTuple):
    """What one file says of itself."""

    tensors: list[TensorInfo]  # in the order of their data
    metadata: Mapping[str, str]  # `__metadata__` as it stands
    data_start: int  # bytes before the data


def read_header(
    descriptor: int,
    *,
    file: str,
    shard: int,
    max_bytes: int = MAX_HEADER_BYTES,
    item_bytes: Mapping[str, int] = FLOATS,
) -> Header:
    """Reads and checks one file's header.

    Args:
        descriptor: Open file.
        file: Its name, for messages.
        shard: Its index, stored in the result.
        max_bytes: Longest header that is read, never above `MAX_HEADER_BYTES`.
        item_bytes: The types that may occur, with the bytes of an element.

    Raises:
        BadCheckpointError: Anything the format forbids, or a file of another size than declared.
        UnsupportedFormatError: A tensor of another type than those of `item_bytes`.
    """
    file_bytes = os.fstat(descriptor).st_size
    header_bytes = _header_length(descriptor, file, file_bytes, min(max_bytes, MAX_HEADER_BYTES))
    try:
        header = strict_json.parse(os.pread(descriptor, header_bytes, _LENGTH_BYTES), max_depth=8)
    except ValueError as error:
        raise BadCheckpointError(f"{file}: header is not valid JSON: {error!s:.200}.") from error
    if not isinstance(header, dict):
        raise BadCheckpointError(f"{file}: header holds no JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadCheckpointError(f"{file}: __metadata__ is no JSON object of texts.")
    data_start = _LENGTH_BYTES + header_bytes
    place = _Place(file, shard, data_start, item_bytes)
    tensors = [_entry(name, entry, place) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_packed(tensors, file=file, data_start=data_start, file_bytes=file_bytes)
    return Header(tensors, metadata, data_start)


class _Place(NamedTuple):
    file: str
    shard: int
    data_start: int
    item_bytes: Mapping[str, int]


def _header_length(descriptor: int, file: str, file_bytes: int, max_bytes: int) -> int:
    prefix = os.pread(descriptor, _LENGTH_BYTES, 0)
    if len(prefix) < _LENGTH_BYTES:
        raise BadCheckpointError(f"{file}: {file_bytes} bytes is too short for a safetensors file.")
    (length,) = struct.unpack("<Q", prefix)
    if length > max_bytes or length > file_bytes - _LENGTH_BYTES:
        raise BadCheckpointError(
            f"{file}: header claims {length} bytes, more than the file or the limit of "
            f"{max_bytes} for this model. The file is damaged or not safetensors."
        )
    return int(length)


def _entry(name: str, entry: Any, place: _Place) -> TensorInfo:
    file, item_bytes = place.file, place.item_bytes
    if not _NAME.fullmatch(name):
        raise BadCheckpointError(f"{file}: tensor name {name!r:.100} has characters no model uses.")
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise BadCheckpointError(
            f"{file}: tensor {name} needs exactly dtype, shape and data_offsets."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise UnsupportedFormatError(
            f"{file}: tensor {name} has type {dtype!r:.20}; {', '.join(item_bytes)} are served."
        )
    if not _is_naturals(shape) or len(shape) > 4:
        raise BadCheckpointError(
            f"{file}: tensor {name} has shape {shape!r:.60}, not a list of sizes."
        )
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise BadCheckpointError(f"{file}: tensor {name} has data_offsets {offsets!r:.60}.")
    begin, end = offsets
    nbytes = math.prod(shape) * item_bytes[dtype]
    if end - begin != nbytes:
        raise BadCheckpointError(
            f"{file}: tensor {name} claims {end - begin} bytes, its shape and type need {nbytes}."
        )
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        nbytes=nbytes,
        shard=place.shard,
        offset=place.data_start + begin,
    )


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_packed(
    tensors: list[TensorInfo], *, file: str, data_start: int, file_bytes: int
) -> None:
    """Tensors must follow one another without overlap or hole and end with the file."""
    expected = data_start
    for tensor in tensors:
        if tensor.offset != expected:
            raise BadCheckpointError(
                f"{file}: tensor {tensor.name} starts at byte {tensor.offset}, expected "
                f"{expected}: tensors overlap or leave a hole."
            )
        expected += tensor.nbytes
    if expected != file_bytes:
        raise BadCheckpointError(
            f"{file}: holds {file_bytes} bytes, its header describes {expected}. "
            "The file is truncated or has something appended; copy it again."
        )
