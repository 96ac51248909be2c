"""Compiles the rounding loops with numba into one object file: `… rounding_build FILE`.

Runs in a process of its own, as the scan's loops do (`linker_core.sharing.kernel_build`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types

from linker_core.machine_code import target_machine
from linker_core.residency.coding import LEVELS

# Sums may be reordered, which is what lets them vectorise; NaN and infinities keep their meaning,
# since they are how non-finite weights show.
_FAST = {"reassoc", "nsz", "contract", "arcp"}
_pointer: Any = types.CPointer
_floats = _pointer(types.float32)
_bytes = _pointer(types.uint8)
_size: Any = types.intp


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the object file that `argv` names."""
    (target,) = sys.argv[1:] if argv is None else argv
    Path(target).write_bytes(_object_code())
    return 0


def _object_code() -> bytes:
    module = llvm.parse_assembly("")
    module.triple = llvm.get_process_triple()
    for bits in LEVELS:
        for name, compiled in ((f"fit_{bits}", _fit(bits)), (f"assign_{bits}", _assign(bits))):
            text = compiled.inspect_llvm().replace(compiled.native_name, name)
            module.link_in(llvm.parse_assembly(text))
    code: bytes = target_machine().emit_object(module)
    return code


def _fit(bits: int) -> Any:
    """Finds each group's scale: where the codes that it leads to explain most of the square."""
    positive = LEVELS[bits][2 ** (bits - 1) :]
    level = _ladder(bits, [np.float32(value) for value in positive])
    zero, one = np.float32(0), np.float32(1)

    def fit(
        values: Any, rows: Any, width: Any, group: Any, starts: Any, num_starts: Any,
        refits: Any, scales: Any,
    ) -> None:  # fmt: skip
        groups = (width + group - 1) // group
        for number in range(rows * groups):
            place = (number % groups) * group
            first = (number // groups) * width + place
            count = min(group, width - place)
            square = zero
            for i in range(first, first + count):
                square += values[i] * values[i]
            best = spread = np.float32(np.sqrt(square / np.float32(count)))
            explained = zero
            for trial in range(num_starts + refits):
                scale = spread * starts[trial] if trial < num_starts else best
                inverse = one / scale
                dot = norm = zero
                for i in range(first, first + count):
                    value = abs(values[i] * inverse)
                    reached = level(value)
                    dot += value * reached
                    norm += reached * reached
                root = scale * dot
                if root * root > explained * norm:
                    explained = root * root / norm
                    best = root / norm
            scales[number] = best

    signature = types.void(
        _floats, _size, _size, _size, _floats, _size, _size, _floats
    )  # fmt: skip
    return numba.cfunc(signature, fastmath=_FAST, error_model="numpy")(fit)


def _assign(bits: int) -> Any:
    """Writes the code of the level that each value is nearest to; rows of codes have a stride."""
    half = 2 ** (bits - 1)
    place_of = _ladder(bits, [np.int32(place) for place in range(half)])
    zero, one = np.float32(0), np.float32(1)
    upper, lower = np.int32(half), np.int32(half - 1)

    def assign(
        values: Any, rows: Any, width: Any, group: Any, scales: Any, codes: Any, stride: Any
    ) -> None:
        groups = (width + group - 1) // group
        for number in range(rows * groups):
            place = (number % groups) * group
            row = number // groups
            first, target = row * width + place, row * stride + place
            scale = scales[number]
            inverse = one / scale if scale > zero else zero
            for i in range(min(group, width - place)):
                value = values[first + i] * inverse
                steps = place_of(abs(value))
                codes[target + i] = np.uint8(upper + steps if value > zero else lower - steps)

    signature = types.void(_floats, _size, _size, _size, _floats, _bytes, _size)
    return numba.cfunc(signature, fastmath=_FAST, error_model="numpy")(assign)


def _ladder(bits: int, reached: Sequence[Any]) -> Callable[[Any], Any]:
    """Returns what a magnitude reaches at its nearest level: selects, which vectorise.

    Args:
        bits: Of a code.
        reached: What stands for each positive level, the least first.
    """
    levels = LEVELS[bits][2 ** (bits - 1) :]
    lowest = reached[0]
    rungs: Any = numba.njit(lambda _value: lowest)
    for below, level, what in zip(levels[:-1], levels[1:], reached[1:], strict=True):
        rungs = _rung(rungs, np.float32((below + level) / 2), what)
    ladder: Callable[[Any], Any] = rungs
    return ladder


def _rung(lower: Any, middle: Any, what: Any) -> Any:
    def reach(value: Any) -> Any:
        return what if value > middle else lower(value)

    return numba.njit(reach)


if __name__ == "__main__":
    sys.exit(main())
