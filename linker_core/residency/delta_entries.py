"""A delta file in the making: entries in any order, then the digest of them all.

Entries lie by the size of their elements, the greatest first, so that each is aligned.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from blake3 import blake3

from linker_core.residency.encoding_memory import COPIED_BYTES
from linker_core.residency.reading import TORCH_DTYPES
from linker_core.sharing.delta import FORMAT, VERSION
from linker_core.sharing.delta_layout import ITEM_BYTES, Entry
from linker_core.sharing.plan import SharePlan
from linker_core.weights.checkpoint import Checkpoint

_NO_DIGEST = "0" * 64
_ALIGNMENT = 8  # of the data section
_CHUNK_BYTES = 4 << 20


class EntryWriter:
    """Writes one file; leaving its context without an error completes it.

    Args:
        path: The file to make.
        entries: Everything that it will hold.
        plan: What it says of itself.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], plan: SharePlan) -> None:
        self._plan = plan
        self._entries = {
            entry.name: entry for entry in sorted(entries, key=lambda e: -ITEM_BYTES[e.dtype])
        }
        assert len(self._entries) == len(entries)
        self._missing = set(self._entries)
        self._offsets: dict[str, int] = {}
        position = len(self._head(_NO_DIGEST))
        for entry in self._entries.values():
            self._offsets[entry.name] = position
            position += _nbytes(entry)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:  # a disk that is too small says so before anything is encoded
            os.posix_fallocate(self._file, 0, position)
        except OSError:
            os.close(self._file)
            raise

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one entry."""
        entry = self._entries[name]
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, TORCH_DTYPES[entry.dtype]), name
        self._missing.remove(name)
        words = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        _write(self._file, words, self._offsets[name])

    def copy(self, name: str, source: Checkpoint) -> None:
        """Writes one entry that is a tensor of a checkpoint, under its name there."""
        entry, info = self._entries[name], source.tensors[name]
        assert (info.shape, info.dtype) == (entry.shape, entry.dtype), name
        self._missing.remove(name)
        buffer = memoryview(bytearray(min(COPIED_BYTES, info.nbytes)))
        for start in range(0, info.nbytes, COPIED_BYTES):
            words = buffer[: info.nbytes - start]
            source.read_into(name, words, offset_bytes=start)
            _write(self._file, words, self._offsets[name] + start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._file)

    def _finish(self) -> None:
        assert not self._missing, sorted(self._missing)[:3]
        start = len(self._head(_NO_DIGEST))
        tree, buffer = blake3(max_threads=blake3.AUTO), memoryview(bytearray(_CHUNK_BYTES))
        while count := os.preadv(self._file, [buffer], start):
            tree.update(buffer[:count])
            start += count
        _write(self._file, memoryview(self._head(tree.hexdigest())), 0)

    def _head(self, digest: str) -> bytes:
        """Returns length and header; as long for one digest as for another."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "plan": json.dumps(self._plan.to_json(), separators=(",", ":")),
            "blake3": digest,
        }
        header: dict[str, object] = {"__metadata__": metadata}
        begin = 0
        for entry in self._entries.values():
            end = begin + _nbytes(entry)
            header[entry.name] = {
                "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]
            }  # fmt: skip
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * ITEM_BYTES[entry.dtype]


def _write(descriptor: int, words: memoryview, position: int) -> None:
    while words:
        count = os.pwrite(descriptor, words, position)
        words, position = words[count:], position + count
