"""What making a delta takes in memory, for those who make one and who reserve it. No torch.

Legend: O coded rows and I width of a matrix, k columns of a sketch, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import CODE_UNIT, AnyRung, Residual, Rung, residual_bytes
from linker_core.weights.safetensors_header import TensorInfo

Tensors = Mapping[str, TensorInfo]

CHUNK_WEIGHTS = 1 << 18  # encoded at a time: 1 MiB in float32
COPIED_BYTES = 4 << 20  # read at a time of what is kept as it is
_AT_ONCE_BYTES = 512 << 20  # that tensors in the making take together; one alone may take more
_FILE_BYTES = 16 << 20  # its header, twice, and a buffer for the digest
OVERSAMPLES = 16  # directions that a sketch has above the rank
_LEAST_SKETCH = 16
_CHUNK_COPIES = 8  # of a chunk in float32: both sides, their difference, codes on their way
_SKETCH_COPIES = 6  # of a sketch, float32, while it is made orthogonal and factors come of it
_FACTOR_COPIES = 8  # of factors, float32, while they are rounded
_ROW_CHUNKS = 4  # of rows that are compared: what is read, and what differs


def encoding_bytes(plan: SharePlan, donor: Tensors, variant: Tensors) -> int:
    """Returns the most bytes of tensors that the writer of a delta holds, however many threads.

    Args:
        plan: What is written.
        donor: The donor's tensors.
        variant: The variant's.
    """
    needs = list(_needs(plan, donor, variant))
    return _FILE_BYTES + min(sum(needs), at_once_bytes(plan, donor, variant))


def at_once_bytes(plan: SharePlan, donor: Tensors, variant: Tensors) -> int:
    """Returns what the tensors in the making may take together; the largest always may be one."""
    return max(_AT_ONCE_BYTES, *_needs(plan, donor, variant), 0)


def tensor_bytes(
    rung: AnyRung, info: TensorInfo, base: TensorInfo | None, *, num_own: int = 0
) -> int:
    """Returns the most that one tensor takes while it is encoded and written.

    Args:
        rung: What it is on.
        info: The variant's.
        base: The donor's, if it has one.
        num_own: Rows that are not the donor's, on rung ROWS.
    """
    if rung is Rung.ALIAS:
        return 0
    if rung is Rung.OWN:
        return min(info.nbytes, COPIED_BYTES)
    assert base is not None
    row_bytes = info.nbytes // info.shape[0]
    if rung is Rung.ROWS:
        chunks = _ROW_CHUNKS * max(COPIED_BYTES, row_bytes)
        return base.nbytes + num_own * (row_bytes + 8) + chunks
    assert isinstance(rung, Residual)
    rows, width = min(info.shape[0], base.shape[0]), info.shape[1]
    chunk = 4 * max(1, CHUNK_WEIGHTS // width) * -(-width // CODE_UNIT) * CODE_UNIT
    sketch = 4 * sketch_size(rung.rank) * (rows + width) if rung.rank else 0
    factors = 4 * rung.rank * (rows + width)
    extra = (info.shape[0] - rows) * row_bytes
    kept = residual_bytes(rung, rows, width) + extra
    return (
        2 * kept  # its parts, and then the whole
        + _CHUNK_COPIES * chunk
        + _SKETCH_COPIES * sketch
        + _FACTOR_COPIES * factors
    )


def sketch_size(rank: int) -> int:
    """Returns how many directions a sketch for a rank has; few sizes serve all ranks."""
    return max(_LEAST_SKETCH, 1 << (rank - 1).bit_length()) + OVERSAMPLES


def _needs(plan: SharePlan, donor: Tensors, variant: Tensors) -> Iterator[int]:
    for name, rung in plan.rungs.items():
        num_own = plan.own_rows.get(name, 0)
        yield tensor_bytes(rung, variant[name], donor.get(name), num_own=num_own)
