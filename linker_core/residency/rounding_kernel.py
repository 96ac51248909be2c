"""The rounding loops of CPUs: found in the user's cache, or compiled once per machine.

Legend: R rows, W width, G groups of a row, P a multiple of 128 that is at least W.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from linker_core.machine_code import build_apart, cached_code, load_code
from linker_core.residency.coding import LEVELS
from linker_core.sharing.rungs import CODE_UNIT, num_groups

_BUILD_MODULE = "linker_core.residency.rounding_build"
_SOURCES = ("rounding_build.py", "coding.py")  # the levels are compiled in
_ADDRESS = ctypes.c_void_p
_SIZE = ctypes.c_ssize_t
_SHARE = 1 << 17  # values that are worth a thread


class RoundingLoops:
    """Compiled loops over float32 rows; rows are shared out to as many threads as torch has."""

    def __init__(self, object_code: bytes) -> None:
        self._engine = load_code(object_code)
        rows = (_ADDRESS, _SIZE, _SIZE, _SIZE)
        self._fit = {
            bits: self._bind(f"fit_{bits}", *rows, _ADDRESS, _SIZE, _SIZE, _ADDRESS)
            for bits in LEVELS
        }
        self._assign = {
            bits: self._bind(f"assign_{bits}", *rows, _ADDRESS, _ADDRESS, _SIZE) for bits in LEVELS
        }

    def fit(
        self,
        values_RW: torch.Tensor,
        *,
        bits: int,
        group: int,
        starts: Sequence[float],
        refits: int,
    ) -> torch.Tensor:
        """Returns the scale of each group, float32 [R, G]; see `rounding.fitted_scales`."""
        rows, width = values_RW.shape
        first_scales = (ctypes.c_float * len(starts))(*starts)
        scales_RG = torch.empty((rows, num_groups(width, group)))

        def run(part: slice) -> None:
            values, scales = values_RW[part], scales_RG[part]
            self._fit[bits](
                *(values.data_ptr(), len(values), width, group),
                *(ctypes.addressof(first_scales), len(starts), refits, scales.data_ptr()),
            )

        _share_out(run, values_RW)
        return scales_RG

    def assign(
        self, values_RW: torch.Tensor, scales_RG: torch.Tensor, *, bits: int, group: int
    ) -> torch.Tensor:
        """Returns the code of the nearest level of each value, uint8 [R, P]; zeros behind W.

        Args:
            values_RW: float32, contiguous.
            scales_RG: float32, contiguous, finite.
            bits: Of a code.
            group: Values of a row that share a scale.
        """
        rows, width = values_RW.shape
        stride = -(-width // CODE_UNIT) * CODE_UNIT
        make = torch.empty if stride == width else torch.zeros
        codes_RP = make((rows, stride), dtype=torch.uint8)

        def run(part: slice) -> None:
            values, scales, codes = values_RW[part], scales_RG[part], codes_RP[part]
            self._assign[bits](
                *(values.data_ptr(), len(values), width, group),
                *(scales.data_ptr(), codes.data_ptr(), stride),
            )

        _share_out(run, values_RW)
        return codes_RP

    def _bind(self, name: str, *arguments: Any) -> Any:
        address = self._engine.get_function_address(name)
        assert address, name
        return ctypes.CFUNCTYPE(None, *arguments)(address)


@cache
def load_rounding_loops() -> RoundingLoops:
    """Returns this machine's loops; the first call ever takes some seconds to compile them.

    Raises:
        LinkerError: They could not be compiled here.
    """
    sources = [Path(__file__).with_name(name).read_bytes() for name in _SOURCES]
    sources.append(version("numba").encode())
    return RoundingLoops(
        cached_code("rounding", sources=b"".join(sources), build=lambda: build_apart(_BUILD_MODULE))
    )


def _share_out(run: Callable[[slice], None], values_RW: torch.Tensor) -> None:
    """Runs a loop over all rows, in threads where there is enough for each."""
    rows = len(values_RW)
    threads = max(1, min(torch.get_num_threads(), values_RW.numel() // _SHARE, rows))
    step = -(-rows // threads)
    parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    if threads == 1:
        run(slice(0, rows))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, parts))
