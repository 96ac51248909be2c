"""Emits the sum of coded rows, each times a number: y += t U.

Every element of y is summed over the rows of U in their order, so it does not depend on the batch.
Every job is a matrix with rows of its own; threads take pieces of the matrices' columns.

Legend: T rows of t and y, R rows of U, O columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llvmlite import ir

from linker_core.engine.arithmetic import Code
from linker_core.engine.cpu.decoding import LANES, Decoder, Lookup, load_scale
from linker_core.engine.cpu.emitter import (
    F32,
    I8,
    I16,
    I64,
    POINTER,
    Emitter,
    f32,
    i64,
)
from linker_core.engine.cpu.jobs import seek

PIECE_COLUMNS = 512  # that a thread takes at a time: a multiple of every tile's
_TILE_VECTORS = 4  # so that a tile lies within one group of 4-bit codes
_MAX_ROWS = {Lookup.AVX512: 4, Lookup.AVX2: 1, Lookup.MEMORY: 1}  # of y, in a tile
_PREFETCH_ROWS = 8  # how far ahead codes are asked for

# 64-bit words of the record that a region is called with, and of each of its jobs.
TASK = (
    "num_pieces",
    "next_piece",  # 0; counted up by the threads
    "jobs",
)
JOB = (
    "codes",
    "scales",
    "rank",  # R
    "num_out",  # O
    "t",
    "t_stride",  # elements between rows
    "y",
    "y_stride",
    "rows",  # which rows of t and y, int64
    "num_rows",
    "first_piece",
)
_TASK = {name: number for number, name in enumerate(TASK)}
_JOB = {name: number for number, name in enumerate(JOB)}


def emit_expand(module: ir.Module, code: Code, lookup: Lookup) -> None:
    """Adds `expand`, to be called on every thread of a region with a task's address.

    Args:
        module: Where it goes.
        code: Of the matrices.
        lookup: How levels are found.
    """
    assert code.group % (_TILE_VECTORS * LANES) == 0, "a tile has one scale a row"
    decoder = Decoder(code.bits, lookup)
    tiles = {
        (rows, vectors): _emit_tile(module, decoder, code.group, rows=rows, vectors=vectors)
        for rows in range(1, _MAX_ROWS[lookup] + 1)
        for vectors in (_TILE_VECTORS, 1)
    }
    piece = _emit_piece(module, tiles)
    e = Emitter(module, "expand", [POINTER])
    (task,) = e.arguments
    job = e.variable(e.field(task, _TASK["jobs"], POINTER))
    num_pieces = e.field(task, _TASK["num_pieces"])
    with e.taken(e.at(task, _TASK["next_piece"], I64), num_pieces) as number:
        seek(e, job, number, num_words=len(JOB), first_piece=_JOB["first_piece"])
        e.call(piece, job.get(), number)
    e.finish()


def _emit_piece(module: ir.Module, tiles: Mapping[tuple[int, int], ir.Function]) -> ir.Function:
    """(job, number): one piece of a matrix's columns with all rows of its job."""
    e = Emitter(module, "piece", [POINTER, I64], exported=False)
    b, (job, number) = e.builder, e.arguments
    first = b.mul(b.sub(number, e.field(job, _JOB["first_piece"])), i64(PIECE_COLUMNS))
    stop = e.minimum(b.add(first, i64(PIECE_COLUMNS)), e.field(job, _JOB["num_out"]))
    width = _TILE_VECTORS * LANES
    whole = b.add(first, e.round_down(b.sub(stop, first), width))
    num_rows = e.field(job, _JOB["num_rows"])
    max_rows = max(rows for rows, _ in tiles)
    with e.loop(0, num_rows, max_rows) as first_row:
        left = e.minimum(max_rows, b.sub(num_rows, first_row))
        for of_rows in e.cases(left, max_rows):
            with e.loop(first, whole, width) as column:
                e.call(tiles[of_rows, _TILE_VECTORS], job, first_row, column)
            with e.loop(whole, stop, LANES) as column:
                e.call(tiles[of_rows, 1], job, first_row, column)
    return e.finish()


def _emit_tile(
    module: ir.Module, decoder: Decoder, group: int, *, rows: int, vectors: int
) -> ir.Function:
    """(job, first_row, column): some columns of some rows; one vector may reach beyond the last."""
    name = f"expand_tile_{rows}x{vectors}"
    e = Emitter(module, name, [POINTER, I64, I64], exported=False)
    b, (job, first_row, column) = e.builder, e.arguments
    codes, scales, t, y, row_numbers = (
        e.field(job, _JOB[key], POINTER) for key in ("codes", "scales", "t", "y", "rows")
    )
    rank, num_out, t_stride, y_stride = (
        e.field(job, _JOB[key]) for key in ("rank", "num_out", "t_stride", "y_stride")
    )
    row_bytes = decoder.row_bytes(e, num_out)
    num_scales = b.udiv(e.round_up(num_out, group), i64(group)) if group else i64(1)
    scale_number = b.udiv(column, i64(group)) if group else i64(0)
    numbers = [e.field(row_numbers, b.add(first_row, i64(row))) for row in range(rows)]
    ts = [e.at(t, b.mul(number, t_stride), F32) for number in numbers]
    count = b.sub(num_out, column)
    totals = [[e.variable(e.zeros(LANES)) for _ in range(vectors)] for _ in range(rows)]
    with e.loop(0, rank) as r:
        lies_at = e.at(codes, b.mul(r, row_bytes), I8)
        ahead = e.at(lies_at, b.mul(row_bytes, i64(_PREFETCH_ROWS)), I8)
        e.prefetch(e.at(ahead, b.udiv(b.mul(column, i64(decoder.bits)), i64(8)), I8))
        scale = f32(1.0)
        if decoder.bits < 16:
            of_row = e.at(scales, b.mul(r, num_scales), I16)
            scale = load_scale(e, of_row, scale_number)
        factors = [e.splat(b.fmul(e.load(e.at(t, r, F32), F32), scale), LANES) for t in ts]
        for number in range(vectors):
            place = b.add(column, i64(number * LANES))
            levels = (
                decoder.load(e, lies_at, place)
                if vectors > 1
                else _load_last(e, decoder, lies_at, place, count)
            )
            for factor, of_row in zip(factors, totals, strict=True):
                of_row[number].set(e.fma(factor, levels, of_row[number].get()))
    for number, of_row in zip(numbers, totals, strict=True):
        target = e.at(e.at(y, b.mul(number, y_stride), F32), column, F32)
        if vectors == 1:
            _add_part(e, target, of_row[0].get(), e.minimum(count, LANES))
        else:
            _add(e, target, [total.get() for total in of_row])
    return e.finish()


def _load_last(
    e: Emitter, decoder: Decoder, codes: ir.Value, first: ir.Value, count: ir.Value
) -> ir.Value:
    """Reads one vector, of which only `count` weights may be there."""
    if decoder.bits < 16:
        return decoder.load(e, codes, first)
    b = e.builder
    found = e.variable(e.zeros(LANES))
    with b.if_else(b.icmp_signed("<", count, i64(LANES))) as (then, otherwise):
        with then:
            found.set(decoder.load_part(e, codes, first, count))
        with otherwise:
            found.set(decoder.load(e, codes, first))
    return found.get()


def _add(e: Emitter, target: ir.Value, addends: Sequence[ir.Value]) -> None:
    """Adds vectors to what is there."""
    for number, addend in enumerate(addends):
        place = e.at(target, number * LANES, F32)
        e.store(e.builder.fadd(e.load(place, addend.type), addend), place)


def _add_part(e: Emitter, target: ir.Value, addend: ir.Value, count: ir.Value) -> None:
    """Adds the first `count` elements of a vector."""
    place = e.room(F32, LANES)
    e.store(addend, place)
    with e.loop(0, count) as lane:
        address = e.at(target, lane, F32)
        e.store(e.builder.fadd(e.load(address, F32), e.load(e.at(place, lane, F32), F32)), address)
