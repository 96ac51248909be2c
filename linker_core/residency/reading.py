"""Words of a checkpoint -> memory of the device, a bounded chunk at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from linker_core.errors import InsufficientCapacityError
from linker_core.weights.checkpoint import Checkpoint

CHUNK_BYTES = 4 << 20
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def allocate(
    shape: Sequence[int], dtype: torch.dtype, *, device: torch.device, what: str
) -> torch.Tensor:
    """Returns uninitialised memory.

    Raises:
        InsufficientCapacityError: The device has none left for `what`.
    """
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # what both allocators raise when they have nothing left
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        raise InsufficientCapacityError(
            f"The device has no {nbytes} bytes for {what}. Remove a model or lower the budget."
        ) from error


def fill(tensor: torch.Tensor, checkpoint: Checkpoint, name: str) -> Generator[int, None, None]:
    """Reads a tensor's words straight into its memory where the host can reach it.

    Yields:
        Bytes of each chunk.

    Raises:
        BadCheckpointError: The file became shorter, or the disk failed.
    """
    flat = tensor.view(-1).view(torch.uint8)
    staging = None
    if tensor.device.type != "cpu":
        staging = host_buffer(min(CHUNK_BYTES, len(flat)), device=tensor.device)
    for start in range(0, len(flat), CHUNK_BYTES):
        target = flat[start : start + CHUNK_BYTES]
        host = target if staging is None else staging[: len(target)]
        checkpoint.read_into(name, host.numpy().data, offset_bytes=start)
        if staging is not None:
            target.copy_(host)
        yield len(target)


def host_buffer(nbytes: int, *, device: torch.device) -> torch.Tensor:
    """Returns bytes on the host, pinned if they are on their way to another device."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
