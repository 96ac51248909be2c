"""Base plus a scaled kernel as a checkpoint: W_B + alpha K (FM Eq. 5), in the base's own types.

Legend: D elements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.kernel.apply import kernel_runs
from analysis.kernel.kernel import Kernel
from analysis.tensors import out_of_range
from linker_core.errors import InvalidRequestError
from linker_core.residency.changed_copy import Progress, write_changed_copy

RECORD_FILE = "kernel.json"


def export_kernel(
    family: StudiedFamily,
    kernel: Kernel,
    target: Path,
    *,
    scale: float,
    progress: Progress | None = None,
) -> None:
    """Writes the base with scale · K added; what the kernel has no tensor for stays the base's.

    Sums are rounded once, to the nearest value of the base's type, ties to even. `kernel.json` in
    the folder says what was added.

    Args:
        family: Holds the kernel's base and fine-tunes, open.
        kernel: Of this family.
        target: The folder to make, in one that exists.
        scale: FM's alpha, finite.
        progress: Called with bytes of weights written and in all.

    Raises:
        InvalidRequestError: The scale is not finite or leaves the range of the base's type, or the
            target cannot be written.
        BadCheckpointError: A file changed meanwhile.
        ConflictError: The target exists.
        InsufficientCapacityError: The disk is full.
    """
    check_scale(scale)
    record = {"alpha": scale, "base": family.base.path.name, "kernel": kernel.to_json()}
    write_changed_copy(
        family.base,
        target,
        {name: partial(_changed, family, kernel, name, scale) for name in kernel.tensors},
        texts={RECORD_FILE: json.dumps(record, indent=1)},
        progress=progress,
    )


def check_scale(scale: float) -> None:
    """Refuses a scale that nothing can be multiplied with.

    Raises:
        InvalidRequestError: It is not finite.
    """
    if not math.isfinite(scale):
        raise InvalidRequestError(f"The scale is {scale}; give a finite number.", param="alpha")


def _changed(family: StudiedFamily, kernel: Kernel, name: str, scale: float) -> Iterator[bytes]:
    """Yields a tensor's new data."""
    dtype = family.base.tensors[name].dtype
    for base_D, kernel_D in kernel_runs(family, kernel, name):
        words = rounded_words(base_D + scale * kernel_D, dtype)
        if words is None:
            raise out_of_range(name, dtype, remedy=f"Give a smaller scale than {scale:g}")
        yield words.tobytes()


def rounded_words(values_D: NDArray[np.float64], dtype: str) -> NDArray[np.generic] | None:
    """Returns float64 values rounded once to BF16 (as its words), F16 or F32; None beyond range.

    Ties go to even. BF16 is reached through float32 rounded to odd, which remembers in its last bit
    that something was cut off, so the second rounding is as if it were the first.
    """
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            narrow_D = values_D.astype("<f2" if dtype == "F16" else "<f4")
            return narrow_D if np.isfinite(narrow_D).all() else None
        near_D = values_D.astype(np.float32)
    wide_D = near_D.astype(np.float64)
    bits_D = near_D.view(np.uint32)
    bits_D = bits_D - (np.abs(wide_D) > np.abs(values_D))  # towards zero
    bits_D |= wide_D != values_D
    words_D = (bits_D + np.uint32(0x7FFF) + ((bits_D >> np.uint32(16)) & np.uint32(1))) >> 16
    words_D = words_D.astype("<u2")
    return words_D if ((words_D & 0x7F80) != 0x7F80).all() else None
