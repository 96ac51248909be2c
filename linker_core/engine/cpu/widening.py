"""Emits the reading of weights' words, of any type that checkpoints have, as float32.

Every BF16 and F16 is a float32: nothing is rounded. Types are named as safetensors names them.
"""

from __future__ import annotations

from llvmlite import ir

from linker_core.engine.cpu.emitter import F16, F32, I16, I32, Emitter, vector


def element_of(dtype: str) -> ir.Type:
    """Returns what a weight's word is loaded as."""
    return {"BF16": I16, "F16": F16, "F32": F32}[dtype]


def load_widened(e: Emitter, address: ir.Value, dtype: str, lanes: int) -> ir.Value:
    """Reads words as float32."""
    return _widened(e, e.load(address, vector(element_of(dtype), lanes)), dtype)


def load_part_widened(
    e: Emitter, address: ir.Value, dtype: str, count: ir.Value, lanes: int
) -> ir.Value:
    """Reads `count` words, fewer than `lanes`, and no more; the other lanes are zero."""
    return _widened(e, e.load_part(address, element_of(dtype), count, lanes), dtype)


def add_widened(
    e: Emitter, target: ir.Value, words: ir.Value, dtype: str, *, count: ir.Value, lanes: int
) -> None:
    """Adds `count` words to float32 in memory."""
    b, element = e.builder, element_of(dtype)
    whole = e.round_down(count, lanes)
    with e.loop(0, whole, lanes) as k:
        address = e.at(target, k, F32)
        addend = load_widened(e, e.at(words, k, element), dtype, lanes)
        e.store(b.fadd(e.load(address, addend.type), addend), address)
    with e.loop(whole, count) as k:
        address = e.at(target, k, F32)
        addend = e.lane(load_widened(e, e.at(words, k, element), dtype, 1), 0)
        e.store(b.fadd(e.load(address, F32), addend), address)


def _widened(e: Emitter, words: ir.Value, dtype: str) -> ir.Value:
    b, lanes = e.builder, words.type.count
    if dtype == "BF16":
        wide = b.zext(words, vector(I32, lanes))
        return b.bitcast(b.shl(wide, ir.Constant(wide.type, [16] * lanes)), vector(F32, lanes))
    return b.fpext(words, vector(F32, lanes)) if dtype == "F16" else words
