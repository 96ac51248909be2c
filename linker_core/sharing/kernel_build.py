"""Compiles the scan's loops with numba into one object file: `… kernel_build FILE`.

Runs in a process of its own: importing numba takes longer than scanning a small model, and more
memory than a scan may. Every later scan loads the object file alone (`linker_core.sharing.kernel`).

Legend: a is the donor's tensor, b the variant's, both as flat words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from linker_core.machine_code import target_machine

# Sums may be reordered, which is what lets them vectorise; NaN and infinities keep their meaning,
# since they are how non-finite weights show.
_FAST = {"reassoc", "nsz", "contract", "arcp"}
_F16_SCALE = 2.0**112  # float32's exponent bias over float16's


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the object file that `argv` names."""
    (target,) = sys.argv[1:] if argv is None else argv
    Path(target).write_bytes(_object_code())
    return 0


def _reinterpret(_context: Any, _bits: Any) -> Any:
    """Types and generates the reading of 32 bits as a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


_f32: Any = intrinsic(_reinterpret)
_pointer: Any = types.CPointer


def _from_bf16(word: Any) -> Any:
    return np.float64(_f32(np.uint32(np.uint32(word) << np.uint32(16))))


def _from_f16(word: Any) -> Any:
    wide = np.uint32(word)
    bits = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
    bits = np.uint32(bits | ((wide & np.uint32(0x7FFF)) << np.uint32(13)))
    if (wide & np.uint32(0x7C00)) == np.uint32(0x7C00):  # NaN and infinities keep their exponent
        bits = np.uint32(bits | np.uint32(0x7F800000))
    return np.float64(_f32(bits)) * _F16_SCALE  # exact, subnormals too


def _from_f32(word: Any) -> Any:
    return np.float64(word)


_DECODERS = {
    "BF16": (types.uint16, _from_bf16),
    "F16": (types.uint16, _from_f16),
    "F32": (types.float32, _from_f32),
}


def _object_code() -> bytes:
    module = llvm.parse_assembly("")
    module.triple = llvm.get_process_triple()
    for name, compiled in _kernels().items():
        text = compiled.inspect_llvm().replace(compiled.native_name, name)
        module.link_in(llvm.parse_assembly(text))
    code: bytes = target_machine().emit_object(module)
    return code


def _kernels() -> dict[str, Any]:
    kernels = {
        f"sums_{a}_{b}": _compile_sums(*_DECODERS[a], *_DECODERS[b])
        for a in _DECODERS
        for b in _DECODERS
    }
    words16, words32 = _pointer(types.uint16), _pointer(types.uint32)
    for name, words in (("nonfinite_16", words16), ("nonfinite_32", words32)):
        kernels[name] = numba.cfunc(types.intp(words, types.intp, types.uint32))(_count_nonfinite)
    row_signature = types.intp(words16, words16, types.intp, types.intp)
    kernels["equal_rows"] = numba.cfunc(row_signature)(_count_equal_rows)
    return kernels


def _compile_sums(
    type_a: Any, decode_a: Callable[[Any], Any], type_b: Any, decode_b: Callable[[Any], Any]
) -> Any:
    read_a, read_b = (numba.njit(decode, inline="always") for decode in (decode_a, decode_b))

    def sums(a: Any, b: Any, count: Any, out: Any) -> None:
        dot = donor_square = variant_square = delta_square = 0.0
        for i in range(count):
            x = read_a(a[i])
            y = read_b(b[i])
            delta = x - y
            dot += x * y
            donor_square += x * x
            variant_square += y * y
            delta_square += delta * delta
        out[0] = dot
        out[1] = donor_square
        out[2] = variant_square
        out[3] = delta_square

    pointers = (_pointer(type_a), _pointer(type_b))
    signature = types.void(*pointers, types.intp, _pointer(types.float64))
    return numba.cfunc(signature, fastmath=_FAST)(sums)


def _count_nonfinite(words: Any, count: Any, exponent: Any) -> Any:
    found = 0
    for i in range(count):
        found += (words[i] & exponent) == exponent
    return found


def _count_equal_rows(a: Any, b: Any, rows: Any, words: Any) -> Any:
    equal = 0
    for row in range(rows):
        difference = np.uint16(0)
        for i in range(words):  # without an early end, so that it vectorises
            difference = np.uint16(difference | (a[row * words + i] ^ b[row * words + i]))
        equal += difference == 0
    return equal


if __name__ == "__main__":
    sys.exit(main())
