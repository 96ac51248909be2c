"""Emits the product of float32 rows with coded matrices: y += x Dᵀ, or y = x Dᵀ.

A scale's weights are summed first, lane by lane, then times the scale added to the lane's total; at
the end halves of the lanes are added. That order is the same in every tile, so a row's result does
not depend on the batch.

Rows of x are packed one behind the other, padded with zeros to whole units of codes. Every job is a
matrix with rows of its own; threads take pieces of the matrices' rows.

Legend: T rows of x, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from llvmlite import ir

from linker_core.engine.arithmetic import Code
from linker_core.engine.cpu.coded_steps import CodedSteps, FloatSteps
from linker_core.engine.cpu.decoding import LANES, Decoder, Lookup, load_scale
from linker_core.engine.cpu.emitter import (
    F32,
    I8,
    I16,
    I64,
    POINTER,
    Emitter,
    Variable,
    f32,
    i64,
)
from linker_core.engine.cpu.folding import sums
from linker_core.engine.cpu.jobs import seek
from linker_core.sharing.rungs import CODE_UNIT

PACKED_UNIT = CODE_UNIT  # elements that packed rows are padded to a multiple of
PIECE_ROWS = 48  # rows of a matrix that a thread takes at a time
_MAX_ROWS = {Lookup.AVX512: 6, Lookup.AVX2: 2, Lookup.MEMORY: 2}  # of x, in a tile
_PREFETCH_BYTES = 2048  # how far ahead codes are asked for

# 64-bit words of the record that a region is called with, and of each of its jobs.
TASK = (
    "x",
    "x_stride",  # elements between rows
    "width",  # I
    "packed",  # room for as many rows as x has, each padded
    "packed_rows",  # which rows of x some job has, int64
    "num_packed",
    "num_pieces",
    "next_piece",  # 0; counted up by the threads
    "jobs",
)
JOB = (
    "codes",
    "scales",
    "y",
    "y_stride",  # elements between rows
    "num_out",
    "first_piece",
    "rows",  # which rows of x and y, int64
    "num_rows",
    "adds",  # 1: to what is there; 0: over it
)
_TASK = {name: number for number, name in enumerate(TASK)}
_JOB = {name: number for number, name in enumerate(JOB)}
Totals: TypeAlias = Sequence[Sequence[Variable]]  # by row of x, then of the matrix


class _Row(NamedTuple):
    """Where a row of the matrix lies."""

    codes: ir.Value
    scales: ir.Value


def emit_coded_product(
    module: ir.Module, code: Code, lookup: Lookup, steps: CodedSteps | None = None
) -> None:
    """Adds `coded_product`, to be called on every thread of a region with a task's address.

    Args:
        module: Where it goes.
        code: Of the matrices.
        lookup: How levels are found.
        steps: How runs are multiplied where codes have groups; in float32.
    """
    decoder, max_rows = Decoder(code.bits, lookup), _MAX_ROWS[lookup]
    steps = steps or FloatSteps(decoder)
    tiles = {
        (rows, outs): _emit_tile(module, decoder, steps, code.group, rows=rows, outs=outs)
        for rows in range(1, max_rows + 1)
        for outs in {_outs(rows), 1}
    }
    pack = _emit_pack(module, steps)
    piece = _emit_piece(module, decoder, code.group, tiles)
    e = Emitter(module, "coded_product", [POINTER])
    (task,) = e.arguments
    e.call(pack, task)
    e.barrier()
    job = e.variable(e.field(task, _TASK["jobs"], POINTER))
    num_pieces = e.field(task, _TASK["num_pieces"])
    with e.taken(e.at(task, _TASK["next_piece"], I64), num_pieces) as number:
        seek(e, job, number, num_words=len(JOB), first_piece=_JOB["first_piece"])
        e.call(piece, task, job.get(), number)
    e.finish()


def _outs(rows: int) -> int:
    """Returns of how many of the matrix's rows a tile of `rows` rows of x is."""
    return 2 if rows > 2 else 1


def _emit_pack(module: ir.Module, steps: CodedSteps) -> ir.Function:
    """(task): this thread's share of the rows that some job has, each to its own number's place."""
    e = Emitter(module, "pack", [POINTER], exported=False)
    b, (task,) = e.builder, e.arguments
    x, packed, rows = (e.field(task, _TASK[key], POINTER) for key in ("x", "packed", "packed_rows"))
    x_stride, width, num_packed = (
        e.field(task, _TASK[key]) for key in ("x_stride", "width", "num_packed")
    )
    whole = e.round_down(width, PACKED_UNIT)
    last = e.room(F32, PACKED_UNIT)
    with e.loop(e.thread_number(), num_packed, e.num_threads()) as number:
        row = e.field(rows, number)
        source = e.at(x, b.mul(row, x_stride), F32)
        target = e.at(packed, b.mul(row, e.round_up(width, PACKED_UNIT)), F32)
        with e.loop(0, whole, PACKED_UNIT) as k:
            steps.pack(e, e.at(source, k, F32), e.at(target, k, F32))
        with b.if_then(b.icmp_signed("<", whole, width)):
            for first in range(0, PACKED_UNIT, LANES):
                e.store(e.zeros(LANES), e.at(last, first, F32))
            with e.loop(whole, width) as k:
                e.store(e.load(e.at(source, k, F32), F32), e.at(last, b.sub(k, whole), F32))
            steps.pack(e, last, e.at(target, whole, F32))
    return e.finish()


def _emit_piece(
    module: ir.Module,
    decoder: Decoder,
    group: int,
    tiles: Mapping[tuple[int, int], ir.Function],
) -> ir.Function:
    """(task, job, number): one piece of a matrix with all rows of its job."""
    e = Emitter(module, "piece", [POINTER, POINTER, I64], exported=False)
    b, (task, job, number) = e.builder, e.arguments
    width, packed = e.field(task, _TASK["width"]), e.field(task, _TASK["packed"], POINTER)
    codes, scales, y, rows = (
        e.field(job, _JOB[key], POINTER) for key in ("codes", "scales", "y", "rows")
    )
    y_stride, num_rows, adds = (e.field(job, _JOB[key]) for key in ("y_stride", "num_rows", "adds"))
    first_out = b.mul(b.sub(number, e.field(job, _JOB["first_piece"])), i64(PIECE_ROWS))
    stop_out = e.minimum(b.add(first_out, i64(PIECE_ROWS)), e.field(job, _JOB["num_out"]))
    row_bytes = decoder.row_bytes(e, width)
    num_scales = b.udiv(e.round_up(width, group), i64(group)) if group else i64(1)
    max_rows = max(rows for rows, _ in tiles)
    with e.loop(0, num_rows, max_rows) as first:

        def run(outs: int, of_rows: int, start: ir.Value, stop: ir.Value) -> None:
            with e.loop(start, stop, outs) as out:
                e.call(
                    tiles[of_rows, outs],
                    *(packed, e.at(rows, first, I64), width),
                    *(e.at(codes, b.mul(out, row_bytes), I8), row_bytes),
                    *(e.at(scales, b.mul(out, num_scales), I16), num_scales),
                    *(e.at(y, out, F32), y_stride, adds),
                )

        left = e.minimum(max_rows, b.sub(num_rows, first))
        for of_rows in e.cases(left, max_rows):
            outs = _outs(of_rows)
            whole = b.add(first_out, e.round_down(b.sub(stop_out, first_out), outs))
            run(outs, of_rows, first_out, whole)
            if outs > 1:
                run(1, of_rows, whole, stop_out)
    return e.finish()


def _emit_tile(
    module: ir.Module, decoder: Decoder, steps: CodedSteps, group: int, *, rows: int, outs: int
) -> ir.Function:
    """Emits all sums of some rows of x and of the matrix.

    (packed, rows, width, codes, row_bytes, scales, num_scales, y, y_stride, adds)
    """
    kinds = [POINTER, POINTER, I64, POINTER, I64, POINTER, I64, POINTER, I64, I64]
    e = Emitter(module, f"coded_tile_{rows}x{outs}", kinds, exported=False)
    b = e.builder
    packed, row_numbers, width, codes, row_bytes, scales, num_scales, y, y_stride, adds = (
        e.arguments
    )
    padded = e.round_up(width, PACKED_UNIT)
    numbers = [e.field(row_numbers, row) for row in range(rows)]
    xs = [e.at(packed, b.mul(number, padded), F32) for number in numbers]
    lies = [
        _Row(
            e.at(codes, b.mul(row_bytes, i64(out)), I8),
            e.at(scales, b.mul(num_scales, i64(out)), I16),
        )
        for out in range(outs)
    ]
    totals = [[e.variable(e.zeros(LANES)) for _ in range(outs)] for _ in range(rows)]
    if group:
        # Weights behind a row's end have no scale of their own, and zeros in x.
        last = b.sub(num_scales, i64(1))
        bits = decoder.bits
        _add_groups(e, steps, Code(bits, group), xs, lies, totals, width=width, last=last)
    else:
        _add_all(e, decoder, xs, lies, totals, width=width)
    is_sum = b.icmp_signed("!=", adds, i64(0))
    for number, of_row in zip(numbers, totals, strict=True):
        target = e.at(y, b.mul(number, y_stride), F32)
        for out, total in enumerate(sums(e, [total.get() for total in of_row])):
            place = e.at(target, out, F32)
            scaled = total
            if decoder.bits == 8:
                scaled = b.fmul(total, load_scale(e, lies[out].scales, 0))
            before = e.variable(f32(0.0))
            with b.if_then(is_sum):
                before.set(e.load(place, F32))
            e.store(b.fadd(before.get(), scaled), place)
    return e.finish()


def _add_groups(
    e: Emitter,
    steps: CodedSteps,
    code: Code,
    xs: Sequence[ir.Value],
    lies: Sequence[_Row],
    totals: Totals,
    *,
    width: ir.Value,
    last: ir.Value,
) -> None:
    """Adds the sum of each group's products times its scale, or of a part of a long group.

    Args:
        e: Where it goes.
        steps: How runs are multiplied.
        code: Of the matrix.
        xs: Where packed rows lie.
        lies: Where the matrix's rows lie.
        totals: Take the sums.
        width: Of a row.
        last: Number of a row's last scale.
    """
    b, length = e.builder, min(code.group, CODE_UNIT)
    run_bytes = CODE_UNIT * code.bits // 8
    with e.loop(0, width, CODE_UNIT) as k:
        offset = b.mul(b.udiv(k, i64(CODE_UNIT)), i64(run_bytes))
        runs = [e.at(row.codes, offset, I8) for row in lies]
        x_runs = [e.at(x, k, F32) for x in xs]
        for run in runs:
            e.prefetch(e.at(run, _PREFETCH_BYTES, I8))
        for start in range(0, CODE_UNIT, length):
            number = e.minimum(b.udiv(b.add(k, i64(start)), i64(code.group)), last)
            parts = steps.parts(e, x_runs, runs, range(start, start + length))
            for out, row in enumerate(lies):
                scale = e.splat(load_scale(e, row.scales, number), LANES)
                for of_row, part in zip(totals, parts, strict=True):
                    of_row[out].set(e.fma(scale, part[out], of_row[out].get()))


def _add_all(
    e: Emitter,
    decoder: Decoder,
    xs: Sequence[ir.Value],
    lies: Sequence[_Row],
    totals: Totals,
    *,
    width: ir.Value,
) -> None:
    """Adds the products of rows that have one scale or none."""
    b = e.builder

    def step(k: ir.Value, count: ir.Value | None) -> None:
        for out, row in enumerate(lies):
            words = (
                decoder.load(e, row.codes, k)
                if count is None
                else decoder.load_part(e, row.codes, k, count)
            )
            for x, of_row in zip(xs, totals, strict=True):
                value = e.load(e.at(x, k, F32), words.type)
                of_row[out].set(e.fma(words, value, of_row[out].get()))

    whole = e.round_down(width, LANES)
    with e.loop(0, whole, LANES) as k:
        step(k, None)
    with b.if_then(b.icmp_signed("<", whole, width)):
        step(whole, b.sub(width, whole))
