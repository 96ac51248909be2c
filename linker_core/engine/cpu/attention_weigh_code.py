"""Emits o' = a o + p V over the tokens of a page that a row sees.

What a row does not see is not read: a slot never written may hold a NaN, which no weight of 0
would take away.

Legend: see `attention_spec`.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from linker_core.engine.cpu.attention_spec import AttentionSpec, Block, Pages, View
from linker_core.engine.cpu.emitter import F32, I64, POINTER, Emitter, i64, vector


class Weighing:
    """The functions that weigh a page's values for a block.

    Args:
        module: Where they go.
        spec: What they are compiled for.
        block: Whose weights they take.
        name: What their symbols begin with.
    """

    def __init__(self, module: ir.Module, spec: AttentionSpec, block: Block, name: str) -> None:
        self._spec, self._block = spec, block
        self._of_block = _emit_weigh(module, spec, block.num_vectors, f"{name}_weigh")
        self._of_row = self._of_block
        if block.num_rows > 1:
            self._of_row = _emit_weigh(module, spec, block.num_heads, f"{name}_weigh_row")

    def call(
        self, e: Emitter, numbers: Sequence[ir.Value], values: Pages, views: Sequence[View]
    ) -> None:
        """Weighs one page.

        Args:
            e: Builds the caller.
            numbers: Addresses of p [vectors, P], a [vectors] and o [vectors, D].
            values: Of the page, [P, D].
            views: Which tokens each row sees, counted from the page's first.
        """
        b, tokens = e.builder, self._spec.page_tokens
        if len(views) == 1:
            self._call_row(e, numbers, values, views, 0)
            return
        # The first row sees the least of what comes last, the last row of what comes first.
        whole = b.and_(
            b.icmp_signed("<=", views[-1].first, i64(0)),
            b.icmp_signed(">=", views[0].end, i64(tokens)),
        )
        with b.if_else(whole) as (together, apart):
            with together:
                e.call(self._of_block, *numbers, *values, 0, tokens)
            with apart:
                for row in range(len(views)):
                    self._call_row(e, numbers, values, views, row)

    def _call_row(
        self,
        e: Emitter,
        numbers: Sequence[ir.Value],
        values: Pages,
        views: Sequence[View],
        row: int,
    ) -> None:
        spec = self._spec
        sizes = (spec.page_tokens, 1, spec.head_dim)
        first_vector = row * self._block.num_heads
        own = [e.at(n, first_vector * size, F32) for n, size in zip(numbers, sizes, strict=True)]
        first, end = e.larger(views[row].first, 0), e.minimum(views[row].end, spec.page_tokens)
        e.call(self._of_row, *own, *values, first, end)


def _emit_weigh(module: ir.Module, spec: AttentionSpec, num_vectors: int, name: str) -> ir.Function:
    """(p, a, o, values, following, first, end): weighs a page's tokens `first` to `end - 1`."""
    kinds = [POINTER, POINTER, POINTER, POINTER, POINTER, I64, I64]
    e = Emitter(module, name, kinds, exported=False)
    b, (weights, scales, outputs, values, following, first, end) = e.builder, e.arguments
    dim, lanes, vectors = spec.head_dim, spec.dim_lanes, range(num_vectors)
    kind = vector(F32, lanes)
    columns = range(spec.weigh_columns(num_vectors))

    def place(number: int, k: ir.Value, column: int) -> ir.Value:
        return e.at(outputs, b.add(k, i64(number * dim + column * lanes)), F32)

    with e.loop(0, dim, lanes * len(columns)) as k:
        sums = []
        for number in vectors:
            scale = e.splat(e.load(e.at(scales, number, F32), F32), lanes)
            before = [e.load(place(number, k, column), kind) for column in columns]
            sums.append([e.variable(b.fmul(part, scale)) for part in before])
        with e.loop(first, end) as token:
            offset = b.add(b.mul(token, i64(dim)), k)
            row = e.at(values, offset, F32)
            for column in columns:
                e.prefetch(e.at(following, b.add(offset, i64(column * lanes)), F32))
            parts = [e.load(e.at(row, column * lanes, F32), kind) for column in columns]
            for number in vectors:
                address = e.at(weights, b.add(token, i64(number * spec.page_tokens)), F32)
                weight = e.splat(e.load(address, F32), lanes)
                for part, total in zip(parts, sums[number], strict=True):
                    total.set(e.fma(weight, part, total.get()))
        for number in vectors:
            for column in columns:
                e.store(sums[number][column].get(), place(number, k, column))
    return e.finish()
