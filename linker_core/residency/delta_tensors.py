"""Entries of a delta file -> what is stored of a tensor, over the donor's.

Legend: n rows held as they are, I width.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from linker_core.errors import BadCheckpointError
from linker_core.residency.coding import CodedMatrix
from linker_core.residency.own_memory import OwnMemory
from linker_core.residency.reading import TORCH_DTYPES, fill
from linker_core.residency.stored import Stored, StoredResidual, StoredRows, StoredTensor
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_layout import CodedPart, coded_parts
from linker_core.sharing.rungs import Residual


def load_residual(
    delta: DeltaFile,
    name: str,
    rung: Residual,
    base: Stored | None,
    *,
    shape: tuple[int, ...],
    memory: OwnMemory,
) -> Generator[int, None, StoredResidual]:
    """Moves the parts of a compressed delta to the device.

    Args:
        delta: Where they lie.
        name: Of the tensor.
        rung: What it is on.
        base: What the donor has under that name.
        shape: [rows, I] of the variant's.
        memory: Where they go.

    Yields:
        Bytes of each chunk.

    Raises:
        BadCheckpointError: The donor has no matrix that this is a delta to, or the file changed.
        InsufficientCapacityError: The device cannot allocate a part.
    """
    extra = delta.tensors[f"{name}.extra"]
    num_rows, width = shape
    num_coded = num_rows - extra.shape[0]
    if (
        not isinstance(base, StoredTensor)
        or base.tensor.shape[1:] != (width,)
        or min(base.num_rows, num_rows) != num_coded
    ):
        raise _of_another_donor(name, f"{num_coded} rows of {width} weights in common")
    parts: dict[str, CodedMatrix] = {}
    for part in coded_parts(rung, num_coded, width):
        parts[part.name] = yield from _load_part(delta, name, part, memory)
    extra_nI = yield from load_entry(delta, extra.name, memory)
    return StoredResidual(
        base=base,
        dense=parts.get("dense"),
        down=parts.get("down"),
        up=parts.get("up"),
        extra=extra_nI,
    )


def load_listed_rows(
    delta: DeltaFile,
    name: str,
    base: Stored | None,
    *,
    shape: tuple[int, ...],
    memory: OwnMemory,
) -> Generator[int, None, StoredRows]:
    """Moves the rows of a table that are not the donor's to the device, with their positions.

    Args:
        delta: Where they lie.
        name: Of the table.
        base: What the donor has under that name.
        shape: [rows, I] of the variant's.
        memory: Where they go.

    Yields:
        Bytes of each chunk.

    Raises:
        BadCheckpointError: The donor has no rows like them, the positions are not those of rows
            of the table in ascending order with all that the donor lacks, or the file changed.
        InsufficientCapacityError: The device cannot allocate them.
    """
    num_rows, width = shape
    rows = delta.tensors[f"{name}.rows"]
    if (
        not isinstance(base, StoredTensor)
        or base.tensor.dtype is not TORCH_DTYPES[rows.dtype]
        or base.tensor.shape[1:] != (width,)
    ):
        raise _of_another_donor(name, f"rows of {width} {rows.dtype} weights")
    own_nI = yield from load_entry(delta, rows.name, memory)
    positions_n = yield from load_entry(delta, f"{name}.positions", memory)
    at = positions_n.cpu()
    missing = num_rows - min(num_rows, base.num_rows)
    sound = (
        bool((at[1:] > at[:-1]).all())
        and bool(((at >= 0) & (at < num_rows)).all())
        and int((at >= base.num_rows).sum()) == missing
    )
    if not sound:
        raise BadCheckpointError(
            f"{name}: the positions of its rows are not ascending, lie outside the table, or leave "
            "out rows that the donor lacks. Export the variant again."
        )
    return StoredRows(base=base, own=own_nI, positions=positions_n, num_rows=num_rows)


def load_entry(
    delta: DeltaFile, entry: str, memory: OwnMemory
) -> Generator[int, None, torch.Tensor]:
    """Moves one entry to the device, in its own type.

    Yields:
        Bytes of each chunk.

    Raises:
        BadCheckpointError: The file changed.
        InsufficientCapacityError: The device cannot allocate it.
    """
    tensor = memory.allocate_like(delta.tensors[entry])
    yield from fill(tensor, delta, entry)
    return tensor


def _load_part(
    delta: DeltaFile, name: str, part: CodedPart, memory: OwnMemory
) -> Generator[int, None, CodedMatrix]:
    codes_RB = yield from load_entry(delta, f"{name}.{part.name}.codes", memory)
    if part.bits < 16:
        scales_RG = yield from load_entry(delta, f"{name}.{part.name}.scales", memory)
    else:
        scales_RG = torch.empty(part.rows, 0, dtype=torch.bfloat16, device=memory.device)
    return CodedMatrix(
        bits=part.bits,
        group=part.group,
        width=part.width,
        codes_RB=codes_RB,
        scales_RG=scales_RG,
    )


def _of_another_donor(name: str, needed: str) -> BadCheckpointError:
    return BadCheckpointError(
        f"The delta of {name} is to another donor: it needs {needed}. Load the donor that it was "
        "made for."
    )
