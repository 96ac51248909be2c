"""What a checkpoint is, as one digest that keys cached scans, plans and tenant isolation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from blake3 import blake3

from linker_core.errors import BadCheckpointError
from linker_core.pace import Pace
from linker_core.weights.checkpoint import Checkpoint

_CHUNK_BYTES = 4 << 20
_MAPPED_CHUNK_BYTES = 16 << 20  # enough of it for every core
_ONE_CORE_BYTES = 16 << 10  # so little at once is never split over threads


def fingerprint(
    checkpoint: Checkpoint,
    *,
    progress: Callable[[int, int], None] | None = None,
    pace: Pace | None = None,
    mapped: bool = False,
) -> str:
    """Returns SHA-256 over config, tensor table and a BLAKE3 tree over each weight file's bytes.

    Equal fingerprints mean equal config, names, shapes, types and data; the same tensors in other
    shards have another one. One read of the files, a few MiB of memory.

    Args:
        checkpoint: An open checkpoint.
        progress: Called with bytes done and bytes in all.
        pace: Holds back while sequences run, on one core then.
        mapped: Hash on all cores through maps: a file that is cut short then ends this process.

    Raises:
        BadCheckpointError: A file changed its size since it was opened.
    """
    digest = hashlib.sha256(json.dumps(asdict(checkpoint.config), sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape}".encode())
    sizes = [entry[3] for entry in checkpoint.identity]
    done, pace = 0, pace or Pace()
    for shard, size in enumerate(sizes):
        tree, offset = blake3(max_threads=blake3.AUTO), 0
        for chunk in _chunks(checkpoint, shard, mapped=mapped):
            started = time.monotonic()
            step = _ONE_CORE_BYTES if pace.busy else len(chunk)
            for start in range(0, len(chunk), step):
                tree.update(chunk[start : start + step])
            offset += len(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, sum(sizes))
            pace.after_work(time.monotonic() - started)
            pace.after_read(len(chunk))
        if offset != size:
            raise BadCheckpointError(
                f"{checkpoint.shard_names[shard]}: changed its size while it was read."
            )
        digest.update(b"\n" + tree.digest())
    return digest.hexdigest()


def _chunks(checkpoint: Checkpoint, shard: int, *, mapped: bool) -> Iterator[memoryview]:
    """Yields a weight file's bytes; each chunk is valid until the next."""
    if mapped:
        with memoryview(checkpoint.map_file(shard)) as view:
            for start in range(0, len(view), _MAPPED_CHUNK_BYTES):
                yield view[start : start + _MAPPED_CHUNK_BYTES]
        return
    offset, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    while count := checkpoint.read_file_bytes(shard, buffer, offset=offset):
        yield buffer[:count]
        offset += count
