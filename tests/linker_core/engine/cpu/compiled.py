"""Compiles what a test emits, past the cache, and runs it on records written by name."""

from __future__ import annotations

import struct
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir

from linker_core.engine.cpu.regions import Code, Region
from linker_core.machine_code import compile_module


def compiled(emit: Callable[[ir.Module], None]) -> Code:
    """Returns the functions that `emit` adds to a module."""
    module = ir.Module("tested")
    module.triple = llvm.get_process_triple()
    emit(module)
    return Code(compile_module(str(module)))


def run(code: Code, name: str, record: list[int], *, num_threads: int = 1) -> None:
    """Runs one function on every thread of a region."""
    Region(code, name).call(record, num_threads=num_threads).run()


def record(names: tuple[str, ...], **values: int | float) -> list[int]:
    """Returns the words of a record, 0 where nothing is given; a float becomes a float32's bits."""
    assert set(values) <= set(names)
    return [_word(values.get(name, 0)) for name in names]


def _word(value: float) -> int:
    if not isinstance(value, float):
        return value
    return int.from_bytes(struct.pack("<f", value), "little")
