"""Where the bytes of a tensor are while they are summed: in a map of the file, or in a buffer."""

from __future__ import annotations

import ctypes
import mmap
from typing import Protocol

from linker_core.errors import BadCheckpointError
from linker_core.weights.checkpoint import Checkpoint


class Memory(Protocol):
    """Gives addresses of tensors' bytes. Each thread has its own."""

    def address(self, name: str, *, offset_bytes: int, nbytes: int) -> int:
        """Returns where these bytes are; valid until the next call."""


class MappedFiles:
    """The files themselves. A file that is cut short ends the process that reads it here."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: list[mmap.mmap] = []
        self._starts: list[int] = []
        for shard in range(len(checkpoint.shard_names)):
            mapped = checkpoint.map_file(shard)
            self._maps.append(mapped)
            # The map stays where it is; only its owner keeps it alive.
            self._starts.append(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))

    def address(self, name: str, *, offset_bytes: int, nbytes: int) -> int:
        """Returns where these bytes are, for as long as this object lives.

        Raises:
            BadCheckpointError: The file became shorter before it was mapped.
        """
        tensor = self._checkpoint.tensors[name]
        assert 0 <= offset_bytes <= tensor.nbytes - nbytes
        if tensor.offset + offset_bytes + nbytes > len(self._maps[tensor.shard]):
            # It was cut before it was mapped; beyond the map lies something else.
            file = self._checkpoint.shard_names[tensor.shard]
            raise BadCheckpointError(f"{file}: the file became shorter while it was read.")
        return self._starts[tensor.shard] + tensor.offset + offset_bytes


class ReadBuffer:
    """A buffer into which every piece is read first: slower, and safe in any process."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._buffer = bytearray()
        self._start = 0

    def address(self, name: str, *, offset_bytes: int, nbytes: int) -> int:
        """Reads the bytes and returns where they are until the next call.

        Raises:
            BadCheckpointError: The file became shorter, or the disk failed.
        """
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
            self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._checkpoint.read_into(
            name, memoryview(self._buffer)[:nbytes], offset_bytes=offset_bytes
        )
        return self._start
