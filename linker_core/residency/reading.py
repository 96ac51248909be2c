"""Words of a checkpoint or a delta file -> memory of the device, a bounded chunk at a time."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Generator, Sequence

import torch

from linker_core.errors import InsufficientCapacityError
from linker_core.sharing.delta import DeltaFile
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.safetensors_header import TensorInfo

CHUNK_BYTES = 4 << 20
HUGE_PAGE_BYTES = 2 << 20
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I64": torch.int64,
}

Source = Checkpoint | DeltaFile


def allocate(
    shape: Sequence[int], dtype: torch.dtype, *, device: torch.device, what: str
) -> torch.Tensor:
    """Returns memory of no particular content.

    Raises:
        InsufficientCapacityError: The device has none left for `what`.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        if device.type == "cpu" and nbytes >= HUGE_PAGE_BYTES:
            return torch.frombuffer(map_host_memory(nbytes), dtype=dtype).view(torch.Size(shape))
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, OSError) as error:  # what the allocators raise when nothing is left
        raise InsufficientCapacityError(
            f"The device has no {nbytes} bytes for {what}. Remove a model or lower the budget."
        ) from error


def allocate_like(info: TensorInfo, *, device: torch.device) -> torch.Tensor:
    """Returns memory for a tensor of a file, in its type.

    Raises:
        InsufficientCapacityError: The device has none left for it.
    """
    return allocate(info.shape, TORCH_DTYPES[info.dtype], device=device, what=info.name)


def fill(tensor: torch.Tensor, source: Source, name: str) -> Generator[int, None, None]:
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
        source.read_into(name, host.numpy().data, offset_bytes=start)
        if staging is not None:
            target.copy_(host)
        yield len(target)


class FileRows:
    """A matrix of a file, whose rows are read each time that they are asked for.

    Args:
        source: Which stays open meanwhile.
        name: Of the matrix.
    """

    def __init__(self, source: Source, name: str) -> None:
        self._source = source
        self._info = source.tensors[name]
        self.shape: Sequence[int] = self._info.shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Returns a run of rows on the host.

        Raises:
            BadCheckpointError: The file became shorter, or the disk failed.
        """
        first, end, step = rows.indices(self.shape[0])
        assert step == 1
        rows_nI = torch.empty((end - first, self.shape[1]), dtype=TORCH_DTYPES[self._info.dtype])
        words = rows_nI.view(-1).view(torch.uint8)
        at = first * self.shape[1] * rows_nI.element_size()
        self._source.read_into(self._info.name, words.numpy().data, offset_bytes=at)
        return rows_nI


def map_host_memory(nbytes: int) -> mmap.mmap:
    """Returns bytes that go back to the system when the last tensor over them goes.

    In huge pages where the system has them: weights are then in place in a third of the time.

    Raises:
        OSError: There are none left.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def host_buffer(nbytes: int, *, device: torch.device) -> torch.Tensor:
    """Returns bytes on the host, pinned if they are on their way to another device."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
