"""The rows of an embedding or head that are not the donor's: found by comparison, only they stay.

Legend: R rows of a chunk, n own rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from linker_core.errors import BadCheckpointError
from linker_core.residency.reading import CHUNK_BYTES, TORCH_DTYPES, allocate, host_buffer
from linker_core.residency.stored import Stored, StoredRows, StoredTensor
from linker_core.weights.checkpoint import Checkpoint

# Rows are compared as integers, so that -0.0 is not 0.0; the widest that a row is made of.
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def load_rows(
    checkpoint: Checkpoint, name: str, base: Stored | None, *, num_own: int
) -> Generator[int, None, StoredRows]:
    """Moves the rows whose bytes differ from the donor's row of the same index, or that it lacks.

    All rows are read, a chunk at a time, and compared where the donor's lie. Besides the own rows
    and their positions the device holds two chunks meanwhile.

    Args:
        checkpoint: The variant's.
        name: Of a tensor [rows, H].
        base: What the donor has under that name.
        num_own: How many rows are expected.

    Yields:
        Bytes kept of each chunk.

    Raises:
        BadCheckpointError: The donor has no such rows, or another number of rows differs.
        InsufficientCapacityError: The device cannot allocate them.
    """
    info = checkpoint.tensors[name]
    dtype = TORCH_DTYPES[info.dtype]
    num_rows, hidden = info.shape
    if (
        not isinstance(base, StoredTensor)
        or base.tensor.dtype != dtype
        or base.tensor.shape[1:] != (hidden,)
    ):
        raise BadCheckpointError(
            f"The plan takes rows of {name} from the donor, which has none like them. Scan again."
        )
    device = base.tensor.device
    own_nH = allocate((num_own, hidden), dtype, device=device, what=name)
    positions_n = allocate((num_own,), torch.int64, device=device, what=name)
    found = 0
    for first, words_RH in _chunks(checkpoint, name, device=device):
        differing = _differing(words_RH, base.tensor[first : first + len(words_RH)])
        end = found + len(differing)
        if end > num_own:
            break
        torch.index_select(words_RH, 0, differing, out=own_nH[found:end])
        torch.add(differing, first, out=positions_n[found:end])
        yield own_nH[found:end].nbytes + positions_n[found:end].nbytes
        found = end
    else:
        if found == num_own:
            return StoredRows(base=base, own=own_nH, positions=positions_n, num_rows=num_rows)
    raise BadCheckpointError(
        f"Of {name} the plan expects {num_own} rows that are not the donor's, and another number "
        "differs. Scan again."
    )


def _chunks(
    checkpoint: Checkpoint, name: str, *, device: torch.device
) -> Generator[tuple[int, torch.Tensor], None, None]:
    """Yields runs of rows on the device, each with the index of its first; one memory for all."""
    info = checkpoint.tensors[name]
    num_rows, hidden = info.shape
    row_bytes = info.nbytes // num_rows
    chunk_rows = min(num_rows, max(1, CHUNK_BYTES // row_bytes))
    host = host_buffer(chunk_rows * row_bytes, device=device)
    buffer = host if device.type == "cpu" else torch.empty_like(host, device=device)
    for first in range(0, num_rows, chunk_rows):
        nbytes = min(chunk_rows, num_rows - first) * row_bytes
        checkpoint.read_into(name, host[:nbytes].numpy().data, offset_bytes=first * row_bytes)
        if buffer is not host:
            buffer[:nbytes].copy_(host[:nbytes])
        yield first, buffer[:nbytes].view(TORCH_DTYPES[info.dtype]).view(-1, hidden)


def _differing(words_RH: torch.Tensor, base_RH: torch.Tensor) -> torch.Tensor:
    """Returns the indices of rows that are not `base_RH`'s, which may have fewer, int64 [n]."""
    row_bytes = words_RH.shape[1] * words_RH.element_size()
    integer = next(dtype for size, dtype in _INTEGERS.items() if row_bytes % size == 0)
    both = len(base_RH)
    differs = torch.ones(len(words_RH), dtype=torch.bool, device=words_RH.device)
    differs[:both] = (words_RH[:both].view(integer) != base_RH.view(integer)).any(dim=1)
    return differs.nonzero().view(-1)
