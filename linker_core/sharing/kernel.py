"""The scan's compiled loops: found in the user's cache, or compiled once per machine.

Loading takes a twentieth of the time and a quarter of the memory of importing numba. Addresses go
in as integers, and nothing here checks them: the caller keeps the memory alive and long enough.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from linker_core.machine_code import build_apart, cached_code, load_code

_BUILD_MODULE = "linker_core.sharing.kernel_build"
_BUILD_SOURCE = Path(__file__).with_name("kernel_build.py")
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}  # all ones: not finite
_ADDRESS = ctypes.c_void_p

Sums = Callable[[int, int, int, int], None]  # a, b, elements, where four float64 go


class Kernels:
    """Compiled loops over raw words; every call lets other threads run."""

    def __init__(self, object_code: bytes) -> None:
        self._engine = load_code(object_code)
        counter = (ctypes.c_ssize_t, _ADDRESS, ctypes.c_ssize_t, ctypes.c_uint32)
        self._nonfinite = {
            dtype: self._bind("nonfinite_32" if dtype == "F32" else "nonfinite_16", *counter)
            for dtype in _EXPONENTS
        }
        self._sums = {
            (a, b): self._bind(
                f"sums_{a}_{b}", None, _ADDRESS, _ADDRESS, ctypes.c_ssize_t, _ADDRESS
            )
            for a in _EXPONENTS
            for b in _EXPONENTS
        }
        sizes = (ctypes.c_ssize_t, ctypes.c_ssize_t)
        self._equal_rows = self._bind("equal_rows", ctypes.c_ssize_t, _ADDRESS, _ADDRESS, *sizes)
        self._memcmp = ctypes.CDLL(None).memcmp
        self._memcmp.argtypes = (_ADDRESS, _ADDRESS, ctypes.c_size_t)

    def sums(self, donor_dtype: str, variant_dtype: str) -> Sums:
        """Returns the loop that writes <a, b>, |a|², |b|² and |a - b|² of these types.

        float64 throughout, since a float32 sum over 10**7 terms is wrong by as much as the effect
        that is measured; |a - b|² is summed directly, never expanded.
        """
        found: Sums = self._sums[donor_dtype, variant_dtype]
        return found

    def count_nonfinite(self, dtype: str, address: int, count: int) -> int:
        """Returns how many elements are NaN or infinite."""
        return int(self._nonfinite[dtype](address, count, _EXPONENTS[dtype]))

    def count_equal_rows(self, a: int, b: int, *, rows: int, row_bytes: int) -> int:
        """Returns how many rows have the same bytes; `row_bytes` is even."""
        return int(self._equal_rows(a, b, rows, row_bytes // 2))

    def same_bytes(self, a: int, b: int, nbytes: int) -> bool:
        """Returns whether two pieces of memory are equal."""
        return bool(self._memcmp(a, b, nbytes) == 0)

    def _bind(self, name: str, result: Any, *arguments: Any) -> Any:
        address = self._engine.get_function_address(name)
        assert address, name
        return ctypes.CFUNCTYPE(result, *arguments)(address)


@cache
def load_kernels() -> Kernels:
    """Returns this machine's loops; the first call ever takes some seconds to compile them.

    Raises:
        LinkerError: They could not be compiled here.
    """
    sources = _BUILD_SOURCE.read_bytes() + version("numba").encode()
    return Kernels(cached_code("scan", sources=sources, build=lambda: build_apart(_BUILD_MODULE)))
