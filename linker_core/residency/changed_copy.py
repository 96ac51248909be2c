"""Writes a checkpoint again with other values in some of its tensors, in bounded memory.

Files, headers and the order of the data stay as they are; a copy is itself a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from linker_core.errors import BadCheckpointError
from linker_core.residency.new_folder import new_folder
from linker_core.residency.texts import checkpoint_texts, copy_texts
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.files import read_optional
from linker_core.weights.keys import EMBED_NAME
from linker_core.weights.safetensors_header import TensorInfo
from linker_core.weights.shards import INDEX_FILE

_COPY_BYTES = 1 << 20
_MAX_INDEX_BYTES = 16 << 20

# Gives a tensor's new data in pieces, as long in all as the old; the same whenever it is called.
NewData = Callable[[], Iterator[bytes]]
Progress = Callable[[int, int], None]


def write_changed_copy(
    source: Checkpoint,
    target: Path,
    changes: Mapping[str, NewData],
    *,
    texts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a folder that holds the source's model with other values in some tensors.

    The folder appears whole or not at all. Config, tokenizer and template are copied. A head that
    is stored beside the embedding it is tied to stays equal to it.

    Args:
        source: Open; the new data may come from it.
        target: The folder to make, in one that exists.
        changes: Tensor -> its new data, in the source's type and order.
        texts: Name -> content of further files.
        progress: Called with bytes of weights written and in all.

    Raises:
        BadCheckpointError: A file changed meanwhile, or the copy would be no valid checkpoint.
        ConflictError: The target exists.
        InsufficientCapacityError: The disk is full.
        InvalidRequestError: The target cannot be written for another reason.
    """
    identity = source.identity
    places = _places(source, changes)
    total = sum(size for _, _, _, size, _, _ in identity)
    done = 0
    with new_folder(target) as folder:
        copy_texts(checkpoint_texts(source.path), folder)
        index = read_optional(source.path, INDEX_FILE, max_bytes=_MAX_INDEX_BYTES)
        if index is not None:
            (folder / INDEX_FILE).write_bytes(index)
        for name, content in (texts or {}).items():
            (folder / name).write_text(content, "utf-8")
        for shard, name in enumerate(source.shard_names):
            with (folder / name).open("wb") as file:
                for written in _write_shard(source, shard, file, places):
                    done += written
                    if progress is not None:
                        progress(done, total)
        if source.identity != identity:
            raise BadCheckpointError(
                "A weight file changed while it was copied. Leave the checkpoint alone meanwhile, "
                "and try again."
            )
        Checkpoint.open(folder).close()  # config and index were read anew, and may be others now


def _places(
    source: Checkpoint, changes: Mapping[str, NewData]
) -> Sequence[tuple[TensorInfo, NewData]]:
    """Returns what is written and where, in the order of places."""
    places = [(source.tensors[name], data) for name, data in changes.items()]
    if source.tied_head is not None and EMBED_NAME in changes:
        places.append((source.tied_head, changes[EMBED_NAME]))
    return sorted(places, key=lambda place: place[0].offset)


def _write_shard(
    source: Checkpoint,
    shard: int,
    file: BinaryIO,
    places: Iterable[tuple[TensorInfo, NewData]],
) -> Iterator[int]:
    """Writes one weight file in its order; yields bytes as they are written."""
    position = 0
    for tensor, data in places:
        if tensor.shard != shard:
            continue
        yield from _copy(source, shard, file, position, tensor.offset)
        written = 0
        for piece in data():
            written += file.write(piece)
            yield len(piece)
        assert written == tensor.nbytes, f"{tensor.name}: {written} bytes for {tensor.nbytes}"
        position = tensor.offset + tensor.nbytes
    _, _, _, size, _, _ = source.identity[shard]
    yield from _copy(source, shard, file, position, size)


def _copy(source: Checkpoint, shard: int, file: BinaryIO, start: int, stop: int) -> Iterator[int]:
    buffer = memoryview(bytearray(_COPY_BYTES))
    while start < stop:
        piece = buffer[: min(_COPY_BYTES, stop - start)]
        read = source.read_file_bytes(shard, piece, offset=start)
        if read == 0:
            raise BadCheckpointError(
                f"{source.shard_names[shard]}: became shorter while it was copied. Leave the "
                "checkpoint alone meanwhile, and try again."
            )
        file.write(piece[:read])
        start += read
        yield read
