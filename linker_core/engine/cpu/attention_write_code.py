"""Emits what comes before attention: rotation of queries and keys, and writing to the pages.

Legend: see `attention_spec`.
"""

from __future__ import annotations

from llvmlite import ir

from linker_core.engine.cpu.attention_spec import (
    SPAN,
    AttentionSpec,
    copy,
    head_pages,
    span_field,
    task_field,
)
from linker_core.engine.cpu.emitter import F32, I32, I64, POINTER, Emitter, i64, vector


def emit_write(module: ir.Module, spec: AttentionSpec) -> ir.Function:
    """(task): rotates and writes this thread's share of all rows."""
    rotate, write = _emit_rotate(module, spec), _emit_write_row(module, spec)
    e = Emitter(module, f"{spec.symbol}_write", [POINTER], exported=False)
    b, (task,) = e.builder, e.arguments
    thread, num_threads = e.thread_number(), e.num_threads()
    spans = task_field(e, task, "spans", POINTER)
    with e.loop(0, task_field(e, task, "num_spans")) as number:
        span = e.at(spans, b.mul(number, i64(len(SPAN))), I64)
        first_row = span_field(e, span, "first_row")
        # Row r of the batch is that of thread r mod `num_threads`.
        before = b.srem(first_row, num_threads)
        ahead = b.srem(b.add(b.sub(thread, before), num_threads), num_threads)
        with e.loop(ahead, span_field(e, span, "num_rows"), num_threads) as row:
            e.call(rotate, task, b.add(first_row, row))
            e.call(write, task, span, row)
    return e.finish()


def _emit_rotate(module: ir.Module, spec: AttentionSpec) -> ir.Function:
    """(task, row): x cos + rotate_half(x) sin, for all queries and keys of a row.

    Rounded as transformers rounds it: nothing is fused.
    """
    e = Emitter(module, f"{spec.symbol}_rotate", [POINTER, I64], exported=False)
    b, (task, row) = e.builder, e.arguments
    dim, half, lanes = spec.head_dim, spec.head_dim // 2, spec.half_lanes
    qkv = task_field(e, task, "qkv", POINTER)
    x = e.at(qkv, b.mul(row, task_field(e, task, "qkv_stride")), F32)
    cos, sin = (
        e.at(task_field(e, task, name, POINTER), b.mul(row, i64(dim)), F32)
        for name in ("cos", "sin")
    )
    num_heads = b.mul(task_field(e, task, "num_kv_heads"), i64(spec.group + 1))

    def part(base: ir.Value, offset: ir.Value) -> ir.Value:
        return e.load(e.at(base, offset, F32), vector(F32, lanes))

    with e.loop(0, num_heads) as number:
        head = e.at(x, b.mul(number, i64(dim)), F32)
        with e.loop(0, half, lanes) as k:
            j = b.add(k, i64(half))
            low, high = part(head, k), part(head, j)
            turned_low = b.fsub(b.fmul(low, part(cos, k)), b.fmul(high, part(sin, k)))
            turned_high = b.fadd(b.fmul(high, part(cos, j)), b.fmul(low, part(sin, j)))
            e.store(turned_low, e.at(head, k, F32))
            e.store(turned_high, e.at(head, j, F32))
    return e.finish()


def _emit_write_row(module: ir.Module, spec: AttentionSpec) -> ir.Function:
    """(task, span, row): writes the keys and values of a span's row to its page."""
    kinds = [POINTER, POINTER, I64]
    e = Emitter(module, f"{spec.symbol}_write_row", kinds, exported=False)
    b, (task, span, row) = e.builder, e.arguments
    dim, tokens = spec.head_dim, spec.page_tokens
    num_kv_heads = task_field(e, task, "num_kv_heads")
    position = b.add(span_field(e, span, "start"), row)
    pages = span_field(e, span, "pages", POINTER)
    page = b.sext(e.load(e.at(pages, b.udiv(position, i64(tokens)), I32), I32), I64)
    slot = b.urem(position, i64(tokens))
    offset = b.mul(b.add(span_field(e, span, "first_row"), row), task_field(e, task, "qkv_stride"))
    x = e.at(task_field(e, task, "qkv", POINTER), offset, F32)
    first_key = b.mul(num_kv_heads, i64(spec.group))
    with e.loop(0, num_kv_heads) as head:
        key = e.at(x, b.mul(b.add(first_key, head), i64(dim)), F32)
        value = e.at(key, b.mul(num_kv_heads, i64(dim)), F32)
        keys = e.at(head_pages(e, spec, task, "keys", page, head), slot, F32)
        values = head_pages(e, spec, task, "values", page, head)
        with e.loop(0, dim) as d:
            e.store(e.load(e.at(key, d, F32), F32), e.at(keys, b.mul(d, i64(tokens)), F32))
        target = e.at(values, b.mul(slot, i64(dim)), F32)
        copy(e, value, target, count=dim, lanes=spec.dim_lanes)
    return e.finish()
