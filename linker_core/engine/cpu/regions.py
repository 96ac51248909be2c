"""Regions: compiled functions that every thread of torch's own OpenMP pool runs on one record.

A second pool beside torch's would fight it for the cores, so the kernels ask for torch's.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from linker_core.errors import LinkerError
from linker_core.machine_code import cached_code, compile_module, load_code

_COMPILED_IN = ("residency/coding.py", "sharing/rungs.py")  # levels; how codes lie
_EXTERNALS = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


class Region:
    """One compiled function."""

    def __init__(self, code: Code, name: str) -> None:
        self._code = code  # keeps the function in memory
        self._address = code.address(name)
        self._parallel = _openmp().parallel

    def call(self, record: Sequence[int], *, num_threads: int, counter: int | None = None) -> Call:
        """Returns a call of the region on a record of 64-bit words.

        Args:
            record: Numbers and addresses. What lies behind these is kept alive by the caller.
            num_threads: How many threads run it.
            counter: Which word the threads count up, if there is one.
        """
        words = array("q", record)
        return Call(
            self._parallel, (self._address, words.buffer_info()[0], num_threads, 0), words, counter
        )


class Call(NamedTuple):
    """A region with its record, to be run once or again and again."""

    parallel: Callable[..., None]
    arguments: tuple[int, int, int, int]
    words: array[int]
    counter: int | None

    def run(self) -> None:
        """Runs it to its end; other Python threads may go on."""
        if self.counter is not None:
            self.words[self.counter] = 0
        self.parallel(*self.arguments)


class Code:
    """Regions compiled together."""

    def __init__(self, object_code: bytes) -> None:
        self._engine = load_code(object_code)

    def address(self, name: str) -> int:
        """Returns where a function lies."""
        address: int = self._engine.get_function_address(name)
        assert address, name
        return address


def compile_regions(name: str, emit: Callable[[ir.Module], None]) -> Code:
    """Returns what `emit` adds to a module, compiled at most once per machine.

    Args:
        name: Tells it from everything else of these sources, parameters included.
        emit: Adds functions.

    Raises:
        LinkerError: torch here runs on another OpenMP than GNU's.
    """
    _openmp()

    def build() -> bytes:
        module = ir.Module(name)
        module.triple = llvm.get_process_triple()
        emit(module)
        return compile_module(str(module))

    return Code(cached_code(f"engine-{name}", sources=_sources(), build=build))


@cache
def _sources() -> bytes:
    """Returns all that emits code, and what gives it numbers that are compiled in."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    paths += [Path(__file__).parents[2] / path for path in _COMPILED_IN]
    return b"".join(path.read_bytes() for path in paths)


def require_openmp() -> None:
    """Makes sure that regions can run here.

    Raises:
        LinkerError: torch here runs on another OpenMP than GNU's.
    """
    _openmp()


class _OpenMP:
    """What the regions need of libgomp."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        for name in _EXTERNALS:
            llvm.add_symbol(name, _address_of(library, name))
        prototype = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        )
        self.parallel = prototype(_address_of(library, "GOMP_parallel"))


@cache
def _openmp() -> _OpenMP:
    """Finds the library that torch has loaded.

    Raises:
        LinkerError: There is none.
    """
    assert torch.get_num_threads()  # its pool is torch's to size
    # Other libraries' paths may be in any encoding.
    maps = Path("/proc/self/maps").read_text("utf-8", "surrogateescape")
    paths = [Path(line.split(maxsplit=5)[-1]) for line in maps.rstrip("\n").split("\n")]
    found = [path for path in paths if path.name.startswith("libgomp")]
    if not found:
        raise LinkerError(
            "torch runs without GNU's OpenMP here, which the engine's kernels need. "
            "Install torch from its own Linux wheels."
        )
    # Other packages may have brought theirs, with a pool of its own. Torch's lies in torch/lib or
    # in torch.libs; where there is none, torch shares the system's.
    beside = Path(torch.__file__).parent
    own = [path for path in found if path.is_relative_to(beside)]
    own += [path for path in found if path.is_relative_to(beside.with_name("torch.libs"))]
    return _OpenMP(str([*own, *found][0]))


def _address_of(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address
    return address
