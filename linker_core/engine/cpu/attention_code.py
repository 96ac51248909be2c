"""Emits attention over pages: one region rotates, writes and attends a step's rows in one layer.

Legend: see `attention_spec`.
"""

from __future__ import annotations

from llvmlite import ir

from linker_core.engine.cpu.attention_block_code import emit_block
from linker_core.engine.cpu.attention_spec import (
    ITEM,
    ITEM_ROWS,
    SPAN,
    AttentionSpec,
    Block,
    span_field,
    task_field,
    task_field_address,
)
from linker_core.engine.cpu.attention_write_code import emit_write
from linker_core.engine.cpu.emitter import I64, POINTER, Emitter, i64

_BLOCK_HEADS = ITEM_ROWS  # query heads of a block, at most


def emit_attention(module: ir.Module, spec: AttentionSpec) -> None:
    """Adds `spec.symbol`, to be called on every thread of a region with a task's address."""
    write, attend = emit_write(module, spec), _emit_item(module, spec)
    e = Emitter(module, spec.symbol, [POINTER])
    b, (task,) = e.builder, e.arguments
    e.call(write, task)
    e.barrier()  # any row may read what any thread has written
    num_kv_heads = task_field(e, task, "num_kv_heads")
    items, spans = (task_field(e, task, name, POINTER) for name in ("items", "spans"))
    stop = b.mul(task_field(e, task, "num_items"), num_kv_heads)
    with e.taken(task_field_address(e, task, "next_item"), stop) as number:
        item = e.at(items, b.mul(b.sdiv(number, num_kv_heads), i64(len(ITEM))), I64)
        span = e.at(spans, b.mul(e.field(item, ITEM.index("span")), i64(len(SPAN))), I64)
        row = e.field(item, ITEM.index("row"))
        e.call(attend, task, span, row, b.srem(number, num_kv_heads))
    e.finish()


def _emit_item(module: ir.Module, spec: AttentionSpec) -> ir.Function:
    """(task, span, row, kv head): attends an item's rows, with whole blocks while there are."""
    blocks = {
        (rows, heads): emit_block(module, spec, Block(num_rows=rows, num_heads=heads))
        for rows in {spec.block_rows, 1}
        for heads in set(_head_blocks(spec.group))
    }
    kinds = [POINTER, POINTER, I64, I64]
    e = Emitter(module, f"{spec.symbol}_item", kinds, exported=False)
    b, (task, span, first, kv_head) = e.builder, e.arguments
    count = e.minimum(ITEM_ROWS, b.sub(span_field(e, span, "num_rows"), first))
    whole = e.round_down(count, spec.block_rows)
    parts = [(spec.block_rows, i64(0), whole)]
    if spec.block_rows > 1:
        parts.append((1, whole, count))
    for rows, start, stop in parts:
        with e.loop(start, stop, rows) as offset:
            head = 0
            for heads in _head_blocks(spec.group):
                e.call(blocks[rows, heads], task, span, b.add(first, offset), kv_head, head)
                head += heads
    return e.finish()


def _head_blocks(group: int) -> list[int]:
    """Returns how many heads of a group each of its blocks has: as evenly as can be."""
    num_blocks = -(-group // _BLOCK_HEADS)
    return [(group + i) // num_blocks for i in range(num_blocks)]
