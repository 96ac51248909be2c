"""Reads a delta to its last byte, and holds it against the donor that it names.

A NaN in a scale would silence a variant, and a lie about the data would make one of another: both
are found here, in one read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from linker_core.errors import BadCheckpointError
from linker_core.pace import Pace
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_checks import tensor_of
from linker_core.sharing.delta_layout import DELTA_FILE, ITEM_BYTES, POSITIONS_TYPE
from linker_core.sharing.family import check_same_family
from linker_core.sharing.rungs import Residual, Rung
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.safetensors_header import TensorInfo
from linker_core.weights.shapes import expected_tensors

_CHUNK_BYTES = 8 << 20  # a multiple of every type
_ONE_CORE_BYTES = 16 << 10  # so little at once is never hashed by several threads
# The bits of an exponent; all of them set is an infinity or no number.
_EXPONENTS: dict[str, tuple[npt.DTypeLike, int]] = {
    "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)
}  # fmt: skip
_BF16_MINUS_ZERO = 0x8000  # what is above it as an integer is below 0


def check_data(
    delta: DeltaFile,
    *,
    progress: Callable[[int, int], None] | None = None,
    pace: Pace | None = None,
) -> None:
    """Reads all entries in the order of their data.

    Args:
        delta: What is read.
        progress: Called with bytes done and bytes in all.
        pace: Holds back while sequences run, on one core then.

    Raises:
        BadCheckpointError: The data has another digest than the header says, a number is not
            finite, a scale is negative, or positions do not ascend; or the file changed.
    """
    tree, done, pace = blake3(max_threads=blake3.AUTO), 0, pace or Pace()
    shapes = expected_tensors(delta.config)
    for entry in sorted(delta.tensors.values(), key=lambda entry: entry.offset):
        before = -1
        name = tensor_of(entry.name, shapes)
        for chunk in _chunks(delta, entry):
            started = time.monotonic()
            step = _ONE_CORE_BYTES if pace.busy else len(chunk)
            for start in range(0, len(chunk), step):
                tree.update(chunk[start : start + step])
            if entry.dtype == POSITIONS_TYPE:
                before = _check_positions(chunk, before, end=shapes[name][0], name=entry.name)
            elif (floats := _float_type(entry, delta.plan.rungs[name])) is not None:
                _check_numbers(chunk, floats, entry.name)
            done += len(chunk)
            if progress is not None:
                progress(done, delta.nbytes)
            pace.after_work(time.monotonic() - started)
            pace.after_read(len(chunk))
    if tree.hexdigest() != delta.data_digest:
        raise BadCheckpointError(
            f"{DELTA_FILE}: its data is not what its header says (another BLAKE3 digest). The file "
            "is damaged; copy it again."
        )


def check_donor(delta: DeltaFile, donor: Checkpoint) -> None:
    """Holds types and shapes against the donor's, and the bytes that the plan says it lends.

    That it is the donor whose fingerprint the plan names is the caller's to check.

    Raises:
        BadCheckpointError: Another family, or a tensor that the delta cannot build on.
    """
    check_same_family(donor.config, delta.config)
    shapes = expected_tensors(delta.config)
    logical = sum(_logical_bytes(delta, name, shapes[name], donor) for name in shapes)
    if logical != delta.plan.logical_bytes:
        raise BadCheckpointError(
            f"{DELTA_FILE}: plan: logical_bytes is {delta.plan.logical_bytes}, with this donor "
            f"they are {logical}. Export again."
        )


def _logical_bytes(delta: DeltaFile, name: str, shape: tuple[int, ...], donor: Checkpoint) -> int:
    """Returns what a copy of a tensor would take, which fits the donor's."""
    rung, base = delta.plan.rungs[name], donor.tensors.get(name)
    if rung is Rung.OWN:
        return delta.tensors[name].nbytes
    if base is None or base.shape[1:] != shape[1:]:
        raise _unfit(name, "the donor has none like it")
    lacking = max(0, shape[0] - base.shape[0])
    if rung is Rung.ALIAS:
        fits, dtype = base.shape == shape, base.dtype
    elif rung is Rung.ROWS:
        dtype = delta.tensors[f"{name}.rows"].dtype
        fits = dtype == base.dtype and _ends_with_last(
            delta, f"{name}.positions", shape[0], lacking
        )
    else:
        extra = delta.tensors[f"{name}.extra"]
        fits, dtype = extra.shape[0] == lacking, extra.dtype
    if not fits:
        raise _unfit(name, f"the donor's is {base.dtype} {list(base.shape)}")
    return math.prod(shape) * ITEM_BYTES[dtype]


def _ends_with_last(delta: DeltaFile, name: str, num_rows: int, lacking: int) -> bool:
    """Returns whether ascending positions end with the table's last so many rows."""
    entry = delta.tensors[name]
    if not 0 < lacking <= entry.shape[0]:
        return lacking == 0
    first = bytearray(ITEM_BYTES[POSITIONS_TYPE])
    offset = entry.nbytes - lacking * len(first)
    delta.read_into(name, memoryview(first), offset_bytes=offset)
    return int.from_bytes(first, "little", signed=True) == num_rows - lacking


def _unfit(name: str, why: str) -> BadCheckpointError:
    return BadCheckpointError(
        f"{DELTA_FILE}: {name} does not fit: {why}. Name the donor that the delta was made of."
    )


def _float_type(entry: TensorInfo, rung: object) -> str | None:
    """Returns what numbers an entry is made of, or None: every code is as good as another."""
    if entry.dtype in _EXPONENTS:
        return entry.dtype
    is_factor = entry.name.endswith((".down.codes", ".up.codes"))
    assert isinstance(rung, Residual)
    return "BF16" if is_factor and rung.factor_bits == 16 else None


def _check_numbers(chunk: memoryview, dtype: str, name: str) -> None:
    words_type, exponent = _EXPONENTS[dtype]
    words = np.frombuffer(chunk, words_type)
    if bool(((words & exponent) == exponent).any()):
        raise BadCheckpointError(
            f"{DELTA_FILE}: entry {name} has NaN or infinite numbers. Export an earlier step of "
            "the training run."
        )
    if name.endswith(".scales") and bool((words > _BF16_MINUS_ZERO).any()):
        raise BadCheckpointError(f"{DELTA_FILE}: entry {name} has negative scales. Export again.")


def _check_positions(chunk: memoryview, before: int, *, end: int, name: str) -> int:
    """Returns the last position, for the next chunk."""
    positions = np.concatenate(([before], np.frombuffer(chunk, "<i8")))
    if bool((positions[1:] <= positions[:-1]).any()) or positions[-1] >= end:
        raise BadCheckpointError(
            f"{DELTA_FILE}: entry {name} does not ascend from 0 to at most {end - 1}. Export again."
        )
    return int(positions[-1])


def _chunks(delta: DeltaFile, entry: TensorInfo) -> Iterator[memoryview]:
    """Yields an entry's bytes; each chunk is valid until the next."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, entry.nbytes)))
    for start in range(0, entry.nbytes, _CHUNK_BYTES):
        chunk = buffer[: entry.nbytes - start]
        delta.read_into(entry.name, chunk, offset_bytes=start)
        yield chunk
