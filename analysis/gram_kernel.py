"""The compiled loops of the Gram pass, and which of them cover N fine-tunes.

A loop holds its sums in registers, so it takes a few fine-tunes only; more are taken in groups, and
each pair of groups has a loop. Addresses go in as integers, and nothing here checks them: the
caller keeps the memory alive and long enough.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import combinations, combinations_with_replacement, product
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from analysis import gram_code
from analysis.gram_code import FUNCTION, TileCode, emit_tile
from linker_core.engine.cpu import emitter, widening
from linker_core.machine_code import cached_code, compile_module, host_features, load_code

_ADDRESS = ctypes.c_void_p


class Tile(NamedTuple):
    """Some of the sums. Models: 0 is the base, i > 0 the i-th fine-tune."""

    models: tuple[int, ...]  # that it reads, the base first
    products: tuple[tuple[int, int], ...]  # pairs of models, i ≤ j; 0 stands for W_B, i for Δ_i


class TileLoop:
    """One compiled loop; calls let other threads run."""

    def __init__(self, object_code: bytes) -> None:
        self._engine = load_code(object_code)  # keeps the function in memory
        address = self._engine.get_function_address(FUNCTION)
        assert address
        sizes = (ctypes.c_int64, ctypes.c_int64)
        self._call = ctypes.CFUNCTYPE(None, _ADDRESS, *sizes, _ADDRESS)(address)

    def add(self, words: Sequence[int], *, count: int, run: int, sums: int) -> None:
        """Adds the products of a stretch of elements to the sums of its runs.

        Args:
            words: Where the stretch begins in each of the tile's models.
            count: Elements of the stretch.
            run: Elements of a run; the last may be shorter.
            sums: Where float64 sums are, [runs, products].
        """
        addresses = (ctypes.c_void_p * len(words))(*words)
        self._call(ctypes.addressof(addresses), count, run, sums)


def tiles(num_variants: int) -> tuple[Tile, ...]:
    """Returns tiles that hold every pair of models once, <W_B, W_B> and <W_B, Δ_i> included."""
    assert num_variants > 0
    variants = np.arange(1, num_variants + 1)
    num_groups = -(-num_variants // _vectors().group)
    groups = [tuple(map(int, group)) for group in np.array_split(variants, num_groups)]
    found = []
    for number, group in enumerate(groups):
        pairs = combinations_with_replacement((0, *group), 2)
        found.append(Tile((0, *group), tuple(p for p in pairs if number == 0 or p != (0, 0))))
    found += [Tile((0, *a, *b), tuple(product(a, b))) for a, b in combinations(groups, 2)]
    return tuple(found)


def tile_loop(tile: Tile, dtypes: Sequence[str]) -> TileLoop:
    """Returns the loop of a tile; the first on this machine compiles it within a second.

    Args:
        tile: One of `tiles`.
        dtypes: Each model's type of the tensor, the base's first.
    """
    local = {model: number for number, model in enumerate(tile.models)}
    return _loop(
        TileCode(
            dtypes=tuple(dtypes[model] for model in tile.models),
            products=tuple((local[i], local[j]) for i, j in tile.products),
            lanes=_vectors().lanes,
        )
    )


@cache
def _loop(code: TileCode) -> TileLoop:
    def build() -> bytes:
        module = ir.Module(FUNCTION)
        module.triple = llvm.get_process_triple()
        emit_tile(module, code)
        return compile_module(str(module))

    return TileLoop(cached_code("gram", sources=_sources() + repr(code).encode(), build=build))


@cache
def _sources() -> bytes:
    files = [module.__file__ for module in (gram_code, emitter, widening)]
    return b"".join(Path(file).read_bytes() for file in files if file is not None)


class Vectors(NamedTuple):
    """How the loops use this CPU's registers."""

    lanes: int  # float64 of a vector
    group: int  # fine-tunes whose sums fit into the registers: 21 sums of 5, 10 of 3


@cache
def _vectors() -> Vectors:
    wide = "+avx512f" in host_features()[1].split(",")
    return Vectors(lanes=8, group=5) if wide else Vectors(lanes=4, group=3)
