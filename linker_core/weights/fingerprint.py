"""What a checkpoint is, as one digest that keys cached scans, plans and tenant isolation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

from blake3 import blake3

from linker_core.errors import BadCheckpointError
from linker_core.weights.checkpoint import Checkpoint

_CHUNK_BYTES = 4 << 20


def fingerprint(
    checkpoint: Checkpoint, *, progress: Callable[[int, int], None] | None = None
) -> str:
    """Returns SHA-256 over config, tensor table and a BLAKE3 tree over each weight file's bytes.

    Equal fingerprints mean equal config, names, shapes, types and data; the same tensors in other
    shards have another one. One read of the files, a few MiB of memory.

    Args:
        checkpoint: An open checkpoint.
        progress: Called with bytes done and bytes in all.

    Raises:
        BadCheckpointError: A file changed its size since it was opened.
    """
    digest = hashlib.sha256(json.dumps(asdict(checkpoint.config), sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape}".encode())
    sizes = [entry[3] for entry in checkpoint.identity]
    done, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    for shard, size in enumerate(sizes):
        tree = blake3()
        offset = 0
        while count := checkpoint.read_file_bytes(shard, buffer, offset=offset):
            tree.update(buffer[:count])
            offset += count
            done += count
            if progress is not None:
                progress(done, sum(sizes))
        if offset != size:
            raise BadCheckpointError(
                f"{checkpoint.shard_names[shard]}: changed its size while it was read."
            )
        digest.update(b"\n" + tree.digest())
    return digest.hexdigest()
