"""A directory of safetensors, opened without trust and read in slices into the caller's buffers.

Everything is checked at `open`, before anything is allocated: files, headers, config, names, shapes
and predicted bytes. Knows nothing of other checkpoints, of torch or of devices.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

from linker_core.errors import BadCheckpointError
from linker_core.weights.architecture import CONFIG_FILE, ModelConfig
from linker_core.weights.files import (
    open_directory,
    open_regular,
    read_at,
    read_json,
)
from linker_core.weights.folder import read_settings
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME, parse_key
from linker_core.weights.safetensors_header import TensorInfo, read_header
from linker_core.weights.shapes import expected_tensors
from linker_core.weights.shards import INDEX_FILE, check_index, shard_names

_MAX_INDEX_BYTES = 16 << 20
_HEADER_BASE_BYTES = 1 << 20  # also for __metadata__
_HEADER_BYTES_PER_TENSOR = 1 << 10
_INV_FREQ = "self_attn.rotary_emb.inv_freq"
_COMPARE_BYTES = 1 << 20
_MAP_NORESERVE = 0x4000  # linux/mman.h; what is never written needs no memory set aside

# Name, device, inode, size, mtime and ctime in ns of each weight file. A file that was rewritten
# and had its mtime put back still shows in its ctime.
Identity = tuple[tuple[str, int, int, int, int, int], ...]


def identity_of(names: Sequence[str], descriptors: Sequence[int]) -> Identity:
    """Returns what open files are now; changes when one of them does."""
    return tuple(
        (name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for name, s in zip(names, map(os.fstat, descriptors), strict=True)
    )


class Checkpoint:
    """A validated checkpoint. Holds its files open until `close`; use it as a context manager.

    Reads are thread-safe (`pread`). Attributes:
        path: The directory.
        config: Shape and arithmetic of the model.
        tensors: Name -> place, of every stored tensor the model has, ignored extras left out.
        tied_head: Place of an output head that is stored though it is the embedding, if one is.
        notes: What was ignored, in words.
        identity: What the weight files are; changes when a file does.
        eos_token_ids: Ids that end an answer, from config.json and generation_config.json.
        generation: Sampling defaults that generation_config.json states, within bounds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tied_head: TensorInfo | None = None
        self.notes: tuple[str, ...] = ()
        self._shards: list[int] = []
        self._maps: dict[int, mmap.mmap] = {}
        self._directory = open_directory(path)
        try:
            names, settings = read_settings(self._directory)
            self.config: ModelConfig = settings.config
            self.eos_token_ids = settings.eos_token_ids
            self.generation = settings.generation
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._open_shards(names))
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Opens and validates a directory.

        Raises:
            UnsupportedFormatError: Pickles, custom code, quantised weights, another architecture.
            BadCheckpointError: Damaged or dishonest files; names file, tensor and remedy.
        """
        return cls(Path(path))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored; tied tensors count once."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def identity(self) -> Identity:
        """What the weight files are now."""
        return identity_of(self.shard_names, self._shards)

    def read_into(self, name: str, buffer: memoryview, *, offset_bytes: int = 0) -> None:
        """Fills a buffer with bytes of a tensor.

        Args:
            name: A key of `tensors`.
            buffer: Writable, contiguous, one byte an item; its length says how much is read.
            offset_bytes: Where in the tensor to begin.

        Raises:
            BadCheckpointError: The file became shorter, or the disk failed.
        """
        tensor = self.tensors[name]
        assert 0 <= offset_bytes <= tensor.nbytes - len(buffer)
        self._read_at(tensor, buffer, offset_bytes)

    def read_file_bytes(self, shard: int, buffer: memoryview, *, offset: int) -> int:
        """Reads any bytes of a weight file, for fingerprints; returns how many there were."""
        return os.preadv(self._shards[shard], [buffer], offset)

    def map_file(self, shard: int) -> mmap.mmap:
        """Maps a weight file; a file that is cut short ends the process that touches the map.

        Only for processes that may end so. There is one map a file, since the second pass over it
        then finds its pages in place; it lives as long as it is used. Nothing is ever written to
        it; it is private and writable because ctypes gives no address of a read-only one.
        """
        if shard not in self._maps:
            self._maps[shard] = mmap.mmap(
                self._shards[shard],
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        return self._maps[shard]

    def close(self) -> None:
        """Closes all files; harmless when repeated."""
        for descriptor in (*self._shards, *([self._directory] if self._directory >= 0 else [])):
            os.close(descriptor)
        self._shards, self._directory = [], -1
        self._maps = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _read_at(self, tensor: TensorInfo, buffer: memoryview, offset_bytes: int) -> None:
        read_at(
            self._shards[tensor.shard],
            buffer,
            position=tensor.offset + offset_bytes,
            what=f"{self.shard_names[tensor.shard]}: tensor {tensor.name}",
        )

    def _open_shards(self, names: list[str]) -> dict[str, TensorInfo]:
        """Opens all weight files; returns the tensors the model has, extras noted and left out."""
        index = None
        if INDEX_FILE in names:
            index = read_json(self._directory, INDEX_FILE, max_bytes=_MAX_INDEX_BYTES)
        self.shard_names = shard_names(names, index)
        expected = expected_tensors(self.config)
        # Honest headers take about 120 bytes a tensor; one that is far longer is not parsed.
        max_header_bytes = _HEADER_BASE_BYTES + _HEADER_BYTES_PER_TENSOR * len(expected)
        stored: dict[str, TensorInfo] = {}
        for number, name in enumerate(self.shard_names):
            self._shards.append(open_regular(self._directory, name))
            for tensor in read_header(
                self._shards[number], file=name, shard=number, max_bytes=max_header_bytes
            ).tensors:
                self._check_place(tensor, stored, expected)
                stored[tensor.name] = tensor
        if index is not None:
            check_index(index, stored, self.shard_names)
        if missing := [name for name in expected if name not in stored]:
            raise BadCheckpointError(
                f"{CONFIG_FILE} describes {len(expected)} tensors; {len(missing)} are missing, "
                f"first {', '.join(missing[:3])}. Copy all shards of the same model."
            )
        extras = [name for name in stored if name not in expected]
        self.notes = tuple(self._ignore_extra(stored[name], stored) for name in extras)
        return {name: stored[name] for name in expected}

    def _check_place(
        self,
        tensor: TensorInfo,
        stored: Mapping[str, TensorInfo],
        expected: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Refuses a tensor that is stored twice, unknown to the model, or of another shape."""
        file = self.shard_names[tensor.shard]
        if tensor.name in stored:
            raise BadCheckpointError(f"{file}: tensor {tensor.name} is in another shard too.")
        shape = expected.get(tensor.name) or self._extra_shape(tensor.name)
        if shape is None:
            raise BadCheckpointError(
                f"{file}: tensor {tensor.name} is not part of a {self.config.architecture} of "
                "this config. Mend the config or drop the tensor."
            )
        if tensor.shape != shape:
            raise BadCheckpointError(
                f"{file}: tensor {tensor.name} has shape {list(tensor.shape)}, {CONFIG_FILE} asks "
                f"for {list(shape)}."
            )

    def _extra_shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a tensor that may be stored without being needed, if it is one."""
        if name == LM_HEAD_NAME:
            return (self.config.vocab_size, self.config.hidden_size)
        key = parse_key(name)
        in_block = key is not None and key.parameter == _INV_FREQ
        if name == "model.rotary_emb.inv_freq" or in_block:
            return (self.config.head_dim // 2,)
        return None

    def _ignore_extra(self, extra: TensorInfo, stored: Mapping[str, TensorInfo]) -> str:
        """Returns a note on a harmless tensor.

        Raises:
            BadCheckpointError: A tied head that is stored with other values.
        """
        if extra.name != LM_HEAD_NAME:
            return f"{extra.name} ignored: rope frequencies follow from the config"
        if self._same_bytes(extra, stored[EMBED_NAME]):
            self.tied_head = extra
            return f"{extra.name} ignored: equal to the embedding it is tied to"
        raise BadCheckpointError(
            f"{self.shard_names[extra.shard]}: {extra.name} differs from the embedding that "
            f"{CONFIG_FILE} ties it to. Set tie_word_embeddings to false, or drop the tensor."
        )

    def _same_bytes(self, a: TensorInfo, b: TensorInfo) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = bytearray(_COMPARE_BYTES), bytearray(_COMPARE_BYTES)
        for start in range(0, a.nbytes, _COMPARE_BYTES):
            length = min(_COMPARE_BYTES, a.nbytes - start)
            self._read_at(a, memoryview(left)[:length], start)
            self._read_at(b, memoryview(right)[:length], start)
            if left[:length] != right[:length]:
                return False
        return True
