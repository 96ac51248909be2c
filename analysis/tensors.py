"""Stored tensors as float32 values, read through the checkpoint: exact from all its types."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from linker_core.errors import InvalidRequestError
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.safetensors_header import FLOATS

_RUN_ELEMENTS = 1 << 18
_WORDS: Final[Mapping[str, type[np.generic[Any]]]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
}


def read_tensor(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """Returns a tensor's values in its stored shape.

    Besides the result, memory is one run of elements.

    Raises:
        BadCheckpointError: The file became shorter, or the disk failed.
    """
    shape = checkpoint.tensors[name].shape
    values = np.empty(math.prod(shape), np.float32)
    start = 0
    for run in read_runs(checkpoint, name, run_elements=_RUN_ELEMENTS):
        values[start : start + run.size] = run
        start += run.size
    return values.reshape(shape)


def read_runs(
    checkpoint: Checkpoint, name: str, *, run_elements: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Yields a tensor's values, flat and row-major, in runs of which the last may be shorter.

    Each run is the caller's own.

    Raises:
        BadCheckpointError: The file became shorter, or the disk failed.
    """
    assert run_elements > 0
    tensor = checkpoint.tensors[name]
    item_bytes = FLOATS[tensor.dtype]
    for start in range(0, tensor.nbytes, run_elements * item_bytes):
        words = bytearray(min(run_elements * item_bytes, tensor.nbytes - start))
        checkpoint.read_into(name, memoryview(words), offset_bytes=start)
        yield _decoded(words, tensor.dtype)


def out_of_range(name: str, dtype: str, *, remedy: str) -> InvalidRequestError:
    """Returns the error about a tensor whose changed values its type has no finite numbers for.

    Args:
        name: The tensor's.
        dtype: What its values are to be rounded to.
        remedy: What the user can do, beginning with a verb.
    """
    return InvalidRequestError(
        f"{name}: the base with what is added leaves the range of {dtype}. {remedy}.", param="alpha"
    )


def _decoded(words: bytearray, dtype: str) -> npt.NDArray[np.float32]:
    raw = np.frombuffer(words, _WORDS[dtype])
    if dtype == "BF16":  # the upper half of a float32
        bits = raw.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return raw.astype(np.float32, copy=False)
