"""Emits the product of float32 rows with weights' stored words: y = x Wᵀ.

A row's dot product runs along the weight's row, block by block: each lane of a vector has its own
sum, and at the end halves of the lanes are added. That order is the same in every tile, so a row's
result does not depend on the batch.

Rows of x are packed by panels, [blocks][rows of the panel][elements of a block], padded with zeros.
Threads take pieces of the weights' rows; several weights may share one x. Biases are added by row,
since variants that share a weight may have biases of their own.

Legend: T rows of x, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llvmlite import ir

from linker_core.engine.cpu.dot_product import DotProduct
from linker_core.engine.cpu.emitter import (
    F32,
    I64,
    POINTER,
    Emitter,
    i64,
    vector,
)
from linker_core.engine.cpu.folding import sums
from linker_core.engine.cpu.jobs import seek
from linker_core.engine.cpu.widening import add_widened, element_of

MAX_BLOCK = 32  # elements of any dot product's block, which divide it
PIECE_ROWS = 48  # rows of a weight that a thread takes at a time: a multiple of every `outs`
_PREFETCH_ELEMENTS = 32  # between two prefetches: a cache line of 16-bit words

# 64-bit words of the record that a region is called with, and of each of its jobs.
TASK = (
    "x",
    "x_stride",  # elements between rows
    "rows",  # which rows of x and y, int64
    "num_rows",
    "width",  # I
    "packed",  # room for the packed rows, see `packed_elements`
    "num_pieces",
    "next_piece",  # 0; counted up by the threads
    "jobs",
)
JOB = (
    "weight",
    "y",
    "y_stride",  # elements between rows
    "num_out",
    "first_piece",
    "bias",  # where it lies; 0 for none
    "bias_by_row",  # 1 if `bias` is where the address of each of the task's rows' own lies
)
_TASK = {name: number for number, name in enumerate(TASK)}
_JOB = {name: number for number, name in enumerate(JOB)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a CPU's vector registers are used.

    Attributes:
        lanes: float32 elements of a vector.
        num_registers: Vector registers.
        panel_rows: Rows of x multiplied at a time, at most.
    """

    lanes: int
    num_registers: int
    panel_rows: int

    def outs(self, rows: int) -> int:
        """Returns how many rows of the weight fit beside `rows` rows of x.

        A register for each sum, one for each weight and one for x.
        """
        most = (self.num_registers - 1) // (rows + 1)
        return max(outs for outs in (1, 2, 3, 4, 6, 8) if outs <= most)


def packed_elements(tiling: Tiling, *, num_rows: int, width: int, num_threads: int) -> int:
    """Returns how many elements of four bytes packing takes."""
    padded = -(-width // MAX_BLOCK) * MAX_BLOCK
    return padded * (num_rows if num_rows > tiling.panel_rows else num_rows * num_threads)


def emit_product(module: ir.Module, dot: DotProduct, *, dtype: str, tiling: Tiling) -> None:
    """Adds `product`, to be called on every thread of a region with a task's address.

    Args:
        module: Where it goes.
        dot: How blocks are multiplied.
        dtype: Of weights and biases, as safetensors names it.
        tiling: Of the CPU.
    """
    tiles: dict[tuple[int, int], ir.Function] = {}
    for rows in range(1, tiling.panel_rows + 1):
        for outs in {tiling.outs(rows), 1}:
            tiles[rows, outs] = _emit_tile(module, dot, dtype, tiling.lanes, rows=rows, outs=outs)
    pack = _emit_pack(module, dot)
    piece = _emit_piece(module, dot, dtype, tiling, tiles)
    _emit_region(module, dot, tiling, pack, piece)


def _emit_region(
    module: ir.Module, dot: DotProduct, tiling: Tiling, pack: ir.Function, piece: ir.Function
) -> None:
    """The whole of a thread's work: pack, then pieces until none is left."""
    e = Emitter(module, "product", [POINTER])
    b, (task,) = e.builder, e.arguments
    x, rows, packed = (e.field(task, _TASK[key], POINTER) for key in ("x", "rows", "packed"))
    x_stride, num_rows, width = (
        e.field(task, _TASK[key]) for key in ("x_stride", "num_rows", "width")
    )
    padded = e.round_up(width, dot.block)
    is_few = b.icmp_signed("<=", num_rows, i64(tiling.panel_rows))
    thread, num_threads = e.thread_number(), e.num_threads()
    # One panel is packed by every thread for itself, which is sooner done than waiting.
    own = e.at(packed, b.mul(thread, b.mul(num_rows, padded)), dot.packed)
    packed = b.select(is_few, own, packed)
    step = i64(tiling.panel_rows)
    first_panel = b.select(is_few, i64(0), b.mul(thread, step))
    with e.loop(first_panel, num_rows, b.mul(num_threads, step)) as first:
        count = e.minimum(tiling.panel_rows, b.sub(num_rows, first))
        target = e.at(packed, b.mul(first, padded), dot.packed)
        e.call(pack, x, x_stride, e.at(rows, first, I64), count, width, target)
    with b.if_then(b.not_(is_few)):
        e.barrier()
    job = e.variable(e.field(task, _TASK["jobs"], POINTER))
    num_pieces = e.field(task, _TASK["num_pieces"])
    with e.taken(e.at(task, _TASK["next_piece"], I64), num_pieces) as number:
        seek(e, job, number, num_words=len(JOB), first_piece=_JOB["first_piece"])
        e.call(piece, job.get(), number, packed, rows, num_rows, width)
    e.finish()


def _emit_pack(module: ir.Module, dot: DotProduct) -> ir.Function:
    """(x, x_stride, rows, count, width, target): packs `count` rows as one panel."""
    kinds = [POINTER, I64, POINTER, I64, I64, POINTER]
    e = Emitter(module, "pack", kinds, exported=False)
    b, (x, x_stride, rows, count, width, target) = e.builder, e.arguments
    whole = e.round_down(width, dot.block)
    with e.loop(0, count) as row:
        source = e.at(x, b.mul(e.field(rows, row), x_stride), F32)
        out = e.at(target, b.mul(row, i64(dot.block)), dot.packed)
        with e.loop(0, whole, dot.block) as k:
            values = e.load(e.at(source, k, F32), vector(F32, dot.block))
            dot.pack(e, values, e.at(out, b.mul(k, count), dot.packed))
        with b.if_then(b.icmp_signed("<", whole, width)):
            rest = e.load_part(e.at(source, whole, F32), F32, b.sub(width, whole), dot.block)
            dot.pack(e, rest, e.at(out, b.mul(whole, count), dot.packed))
    return e.finish()


def _emit_piece(
    module: ir.Module,
    dot: DotProduct,
    dtype: str,
    tiling: Tiling,
    tiles: Mapping[tuple[int, int], ir.Function],
) -> ir.Function:
    """(job, number, packed, rows, num_rows, width): one piece of a weight with all rows of x."""
    kinds = [POINTER, I64, POINTER, POINTER, I64, I64]
    e = Emitter(module, "piece", kinds, exported=False)
    b, (job, number, packed, rows, num_rows, width) = e.builder, e.arguments
    weight, y = (e.field(job, _JOB[key], POINTER) for key in ("weight", "y"))
    y_stride, num_out = (e.field(job, _JOB[key]) for key in ("y_stride", "num_out"))
    first_out = b.mul(b.sub(number, e.field(job, _JOB["first_piece"])), i64(PIECE_ROWS))
    count = e.minimum(PIECE_ROWS, b.sub(num_out, first_out))
    weight = e.at(weight, b.mul(first_out, width), element_of(dtype))
    y = e.at(y, first_out, F32)
    padded = e.round_up(width, dot.block)
    with e.loop(0, num_rows, tiling.panel_rows) as first:
        panel = e.at(packed, b.mul(first, padded), dot.packed)
        panel_rows = e.at(rows, first, I64)

        def run(outs: int, of_rows: int, start: ir.Value, stop: ir.Value) -> None:
            with e.loop(start, stop, outs) as out:
                e.call(
                    tiles[of_rows, outs],
                    *(panel, e.at(weight, b.mul(out, width), element_of(dtype)), width),
                    *(e.at(y, out, F32), y_stride, panel_rows),
                )

        left = e.minimum(tiling.panel_rows, b.sub(num_rows, first))
        for of_rows in e.cases(left, tiling.panel_rows):
            outs = tiling.outs(of_rows)
            whole = e.round_down(count, outs)
            run(outs, of_rows, i64(0), whole)
            if outs > 1:
                run(1, of_rows, whole, count)
    bias = e.field(job, _JOB["bias"], POINTER)
    with b.if_then(b.icmp_signed("!=", e.field(job, _JOB["bias"]), i64(0))):
        by_row = b.icmp_signed("!=", e.field(job, _JOB["bias_by_row"]), i64(0))
        with e.loop(0, num_rows) as row:
            own = e.own_address(bias, by_row, row)
            target = e.at(y, b.mul(e.field(rows, row), y_stride), F32)
            words = e.at(own, first_out, element_of(dtype))
            add_widened(e, target, words, dtype, count=count, lanes=tiling.lanes)
    return e.finish()


def _emit_tile(
    module: ir.Module, dot: DotProduct, dtype: str, lanes: int, *, rows: int, outs: int
) -> ir.Function:
    """(panel, weight, width, y, y_stride, rows): all sums of some rows of x and of the weight."""
    kinds = [POINTER, POINTER, I64, POINTER, I64, POINTER]
    e = Emitter(module, f"tile_{rows}x{outs}", kinds, exported=False)
    b, (panel, weight, width, y, y_stride, row_numbers) = e.builder, e.arguments
    element = element_of(dtype)
    totals = [[e.variable(e.zeros(lanes)) for _ in range(outs)] for _ in range(rows)]
    starts = [e.at(weight, b.mul(width, i64(out)), element) for out in range(outs)]

    def add(k: ir.Value, words: list[ir.Value]) -> None:
        x = e.at(panel, b.mul(k, i64(rows)), dot.packed)
        for row in range(rows):
            for out in range(outs):
                total = totals[row][out]
                total.set(dot.add(e, total.get(), words[out], e.at(x, row * dot.block, dot.packed)))

    def step(k: ir.Value) -> None:
        add(k, [dot.load(e, e.at(start, k, element)) for start in starts])

    unrolled, whole = e.round_down(width, _PREFETCH_ELEMENTS), e.round_down(width, dot.block)
    with e.loop(0, unrolled, _PREFETCH_ELEMENTS) as k:
        ahead = b.add(k, b.mul(width, i64(outs)))  # the same place in the next tile
        for start in starts:
            e.prefetch(e.at(start, ahead, element))
        for offset in range(0, _PREFETCH_ELEMENTS, dot.block):
            step(b.add(k, i64(offset)))
    with e.loop(unrolled, whole, dot.block) as k:
        step(k)
    with b.if_then(b.icmp_signed("<", whole, width)):
        rest = b.sub(width, whole)
        add(whole, [dot.load_part(e, e.at(start, whole, element), rest) for start in starts])
    for row in range(rows):
        target = e.at(y, b.mul(e.field(row_numbers, row), y_stride), F32)
        for out, total in enumerate(sums(e, [total.get() for total in totals[row]])):
            e.store(total, e.at(target, out, F32))
    return e.finish()
