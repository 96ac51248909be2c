"""A directory of safetensors, opened without trust and read in slices into the caller's buffers.

Everything is checked at `open`, before anything is allocated: files, headers, config, names, shapes
and predicted bytes. Knows nothing of other checkpoints, of torch or of devices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from linker_core.errors import BadCheckpointError, UnsupportedFormatError
from linker_core.weights.architecture import (
    CONFIG_FILE,
    ModelConfig,
    expected_tensors,
    parse_config,
)
from linker_core.weights.fields import Fields
from linker_core.weights.files import (
    open_directory,
    open_regular,
    read_json,
    refuse_foreign_formats,
)
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from linker_core.weights.safetensors_header import TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 16 << 20
_MAX_SHARDS = 512
_COMPARE_BYTES = 1 << 20


class Checkpoint:
    """A validated checkpoint. Holds its files open until `close`; use it as a context manager.

    Reads are thread-safe (`pread`). Attributes:
        path: The directory.
        config: Shape and arithmetic of the model.
        tensors: Name -> place, of every stored tensor the model has, ignored extras left out.
        notes: What was ignored, in words.
        identity: (file, device, inode, size, mtime ns) per weight file; changes when a file does.
        eos_token_ids: Ids that end an answer, from config.json and generation_config.json.
        generation: Sampling defaults that generation_config.json states, within bounds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._shards: list[int] = []
        self._directory = open_directory(path)
        try:
            with os.scandir(self._directory) as entries:
                names = [entry.name for entry in entries]
            refuse_foreign_formats(names)
            config = read_json(self._directory, CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES)
            self.config: ModelConfig = parse_config(config)
            self._read_generation(names)
            stored = self._open_shards(names)
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._accept(stored))
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
    def identity(self) -> tuple[tuple[str, int, int, int, int], ...]:
        return tuple(
            (name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns)
            for name, s in zip(
                self.shard_names, (os.fstat(shard) for shard in self._shards), strict=True
            )
        )

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

    def close(self) -> None:
        """Closes all files; harmless when repeated."""
        for descriptor in (*self._shards, *([self._directory] if self._directory >= 0 else [])):
            os.close(descriptor)
        self._shards, self._directory = [], -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _read_at(self, tensor: TensorInfo, buffer: memoryview, offset_bytes: int) -> None:
        position, rest = tensor.offset + offset_bytes, buffer
        while rest:
            try:
                count = os.preadv(self._shards[tensor.shard], [rest], position)
            except OSError as error:
                raise self._unreadable(tensor, os.strerror(error.errno or 0)) from error
            if count == 0:
                raise self._unreadable(tensor, "the file became shorter while it was read")
            position, rest = position + count, rest[count:]

    def _unreadable(self, tensor: TensorInfo, why: str) -> BadCheckpointError:
        file = self.shard_names[tensor.shard]
        return BadCheckpointError(f"{file}: tensor {tensor.name} cannot be read: {why}.")

    def _read_generation(self, names: list[str]) -> None:
        record: dict[str, object] = {}
        if GENERATION_FILE in names:
            record = read_json(self._directory, GENERATION_FILE, max_bytes=_MAX_CONFIG_BYTES)
        fields = Fields(record, GENERATION_FILE)
        self.eos_token_ids = frozenset(
            (*self.config.eos_token_ids, *fields.token_ids("eos_token_id"))
        )
        defaults: dict[str, float | int | bool] = {}
        if record.get("do_sample") is not None:
            defaults["do_sample"] = fields.boolean("do_sample", default=False)
        for key, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-3, 100.0),
        ):
            if (value := fields.optional_number(key, low=low, high=high)) is not None:
                defaults[key] = value
        if record.get("top_k") is not None:
            defaults["top_k"] = fields.integer("top_k", low=0, high=1 << 22)
        self.generation: Mapping[str, float | int | bool] = MappingProxyType(defaults)

    def _open_shards(self, names: list[str]) -> dict[str, TensorInfo]:
        """Opens all weight files; returns every tensor they hold."""
        index = None
        if INDEX_FILE in names:
            index = read_json(self._directory, INDEX_FILE, max_bytes=_MAX_INDEX_BYTES)
        self.shard_names = _shard_names(names, index)
        stored: dict[str, TensorInfo] = {}
        for number, name in enumerate(self.shard_names):
            self._shards.append(open_regular(self._directory, name))
            for tensor in read_header(self._shards[number], file=name, shard=number):
                if tensor.name in stored:
                    raise BadCheckpointError(
                        f"{name}: tensor {tensor.name} is in another shard too."
                    )
                stored[tensor.name] = tensor
        if index is not None:
            _check_index(index, stored, self.shard_names)
        return stored

    def _accept(self, stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Checks names and shapes against the config; returns the tensors the model has."""
        expected = expected_tensors(self.config)
        extras = [name for name in stored if name not in expected]
        if missing := [name for name in expected if name not in stored]:
            raise BadCheckpointError(
                f"{CONFIG_FILE} describes {len(expected)} tensors; {len(missing)} are missing, "
                f"first {', '.join(missing[:3])}. Copy all shards of the same model."
            )
        for name, shape in expected.items():
            if stored[name].shape != shape:
                raise BadCheckpointError(
                    f"{self.shard_names[stored[name].shard]}: tensor {name} has shape "
                    f"{list(stored[name].shape)}, {CONFIG_FILE} asks for {list(shape)}."
                )
        self.notes = tuple(self._ignore_extra(stored[name], stored) for name in extras)
        return {name: stored[name] for name in expected}

    def _ignore_extra(self, extra: TensorInfo, stored: dict[str, TensorInfo]) -> str:
        """Returns a note on a harmless tensor; refuses any other."""
        if extra.name.endswith("rotary_emb.inv_freq"):
            return f"{extra.name} ignored: rope frequencies follow from the config"
        if extra.name == LM_HEAD_NAME and self._same_bytes(extra, stored[EMBED_NAME]):
            return f"{extra.name} ignored: equal to the embedding it is tied to"
        raise BadCheckpointError(
            f"{self.shard_names[extra.shard]}: tensor {extra.name} is not part of a "
            f"{self.config.architecture} of this config. Mend the config or drop the tensor."
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


def _shard_names(names: list[str], index: dict[str, object] | None) -> list[str]:
    """Returns the weight files in order; a single file needs no index."""
    present = sorted(n for n in names if n.startswith("model") and n.endswith(".safetensors"))
    if not present:
        raise UnsupportedFormatError(
            "The directory holds no model*.safetensors file. Convert the weights to safetensors."
        )
    if index is None:
        if present != [SINGLE_FILE]:
            raise BadCheckpointError(
                f"{present[0]:.100}: shards without {INDEX_FILE}. Copy the index too."
            )
        return present
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadCheckpointError(f"{INDEX_FILE}: weight_map is not an object of file names.")
    named = sorted(set(weight_map.values()))
    for name in named:
        if name != Path(name).name:
            raise BadCheckpointError(f"{INDEX_FILE}: {name!r:.100} is not a plain file name.")
    if named != present or len(named) > _MAX_SHARDS:
        odd = sorted(set(named) ^ set(present))
        raise BadCheckpointError(
            f"{INDEX_FILE}: names {len(named)} shards, the directory has {len(present)}; "
            f"first difference {odd[0] if odd else named[0]!r:.100}. Copy all shards of one model."
        )
    return named


def _check_index(
    index: dict[str, object], stored: dict[str, TensorInfo], shard_names: list[str]
) -> None:
    """The index and the shards' headers must say the same."""
    weight_map = index["weight_map"]
    assert isinstance(weight_map, dict)
    actual = {name: shard_names[tensor.shard] for name, tensor in stored.items()}
    if odd := sorted(
        k for k in weight_map.keys() | actual.keys() if weight_map.get(k) != actual.get(k)
    ):
        raise BadCheckpointError(
            f"{INDEX_FILE}: disagrees with the shards on {len(odd)} tensors, first {odd[0]!r:.100}."
        )
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in stored.values())
    if stated is not None and stated != total:
        raise BadCheckpointError(
            f"{INDEX_FILE}: total_size is {stated!r:.40}, the shards hold {total}."
        )
