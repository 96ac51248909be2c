"""Emits the attention of a few rows and heads that read each page together.

The softmax is taken as the pages come. With s the scores of a page, for each row and head:

    m' = max(m, max s)    a = e**(m - m')    p = e**(s - m')    l' = a l + Σ p    o' = a o + p V

and o / l at the end (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").
Every number is computed for each row and head by the same operations in the same order, whatever
else is in the block and wherever the pages lie: from the first page that the row sees to its own.
Pages that only other rows of the block see change nothing: a = 1 and p = 0.

Legend: see `attention_spec`; a block's vectors are its rows' heads, row by row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llvmlite import ir

from linker_core.engine.cpu.attention_spec import (
    AttentionSpec,
    Block,
    Pages,
    View,
    head_pages,
    span_field,
    task_field,
)
from linker_core.engine.cpu.attention_weigh_code import Weighing
from linker_core.engine.cpu.emitter import F32, I32, I64, POINTER, Emitter, Variable, i64, vector
from linker_core.engine.cpu.folding import folded, sums
from linker_core.engine.cpu.vector_math import exponential, tanh


class _State(NamedTuple):
    """A block's numbers; the first three on the stack, the others in registers."""

    queries: ir.Value  # [vectors, D], scaled
    weights: ir.Value  # [vectors, P]: p of the page at hand
    scales: ir.Value  # [vectors]: a of the page at hand
    outputs: ir.Value  # [vectors, D]: o
    maxima: Variable  # m; a lane for each vector
    totals: list[Variable]  # l of each vector, by the tokens' lanes


def emit_block(module: ir.Module, spec: AttentionSpec, block: Block) -> ir.Function:
    """(task, span, row, kv head, first head of the group): attends a block's rows."""
    name = f"{spec.symbol}_block_{block.num_rows}x{block.num_heads}"
    weighing = Weighing(module, spec, block, name)
    e = Emitter(module, name, [POINTER, POINTER, I64, I64, I64], exported=False)
    b, (task, span, row, kv_head, group_head) = e.builder, e.arguments
    code = _BlockCode(e, spec, block)
    first_row = b.add(span_field(e, span, "first_row"), row)
    first_head = b.add(b.mul(kv_head, i64(spec.group)), group_head)
    state = code.begin(task, first_row, first_head)
    views = code.views(b.add(span_field(e, span, "start"), row), task_field(e, task, "window"))
    pages = span_field(e, span, "pages", POINTER)
    tokens = i64(spec.page_tokens)
    last = b.udiv(b.sub(views[-1].end, i64(1)), tokens)
    with e.loop(b.udiv(views[0].first, tokens), b.add(last, i64(1))) as number:
        start = b.mul(number, tokens)
        here = [View(b.sub(view.first, start), b.sub(view.end, start)) for view in views]
        numbers = (number, e.minimum(b.add(number, i64(1)), last))
        keys, values = (
            Pages(*(code.place_of_page(task, which, pages, n, kv_head) for n in numbers))
            for which in ("keys", "values")
        )
        scores = code.scores(state, keys, here)
        code.take(state, scores)
        weighing.call(e, (state.weights, state.scales, state.outputs), values, here)
    code.end(state, task, first_row, first_head)
    return e.finish()


class _BlockCode:
    """Emits the parts of a block's function."""

    def __init__(self, e: Emitter, spec: AttentionSpec, block: Block) -> None:
        self._e, self._spec, self._block = e, spec, block
        self._token_starts = range(0, spec.page_tokens, spec.token_lanes)

    def begin(self, task: ir.Value, first_row: ir.Value, first_head: ir.Value) -> _State:
        """Reads the queries; nothing has been seen."""
        e, spec, block = self._e, self._spec, self._block
        dim, lanes, count = spec.head_dim, spec.dim_lanes, block.num_vectors
        padded = 1 << (count - 1).bit_length()
        state = _State(
            queries=e.room(F32, count * dim),
            weights=e.room(F32, count * spec.page_tokens),
            scales=e.room(F32, padded),
            outputs=e.room(F32, count * dim),
            maxima=e.variable(ir.Constant(vector(F32, padded), [-math.inf] * padded)),
            totals=[e.variable(e.zeros(spec.token_lanes)) for _ in range(count)],
        )
        scaling = e.splat(task_field(e, task, "scaling", F32), lanes)
        for number in range(count):
            query = self._place(task, "qkv", number, first_row, first_head)
            with e.loop(number * dim, (number + 1) * dim, lanes) as k:
                part = e.load(
                    e.at(query, e.builder.sub(k, i64(number * dim)), F32), vector(F32, lanes)
                )
                e.store(e.builder.fmul(part, scaling), e.at(state.queries, k, F32))
                e.store(e.zeros(lanes), e.at(state.outputs, k, F32))
        return state

    def place_of_page(
        self, task: ir.Value, which: str, pages: ir.Value, number: ir.Value, kv_head: ir.Value
    ) -> ir.Value:
        """Returns where one head's keys or values lie in a sequence's page."""
        e = self._e
        page = e.builder.sext(e.load(e.at(pages, number, I32), I32), I64)
        return head_pages(e, self._spec, task, which, page, kv_head)

    def views(self, position: ir.Value, window: ir.Value) -> list[View]:
        """Returns what each row sees; the first is at `position`."""
        b = self._e.builder
        views = []
        for row in range(self._block.num_rows):
            end = b.add(position, i64(row + 1))
            views.append(View(self._e.larger(b.sub(end, window), 0), end))
        return views

    def scores(self, state: _State, keys: Pages, views: list[View]) -> list[list[ir.Value]]:
        """Returns each vector's scores of a page, minus infinity where its row does not see."""
        parts = [self._part_scores(state, keys, views, start) for start in self._token_starts]
        return [list(of_vector) for of_vector in zip(*parts, strict=True)]

    def _part_scores(
        self, state: _State, keys: Pages, views: list[View], start: int
    ) -> list[ir.Value]:
        """Returns each vector's scores of `token_lanes` tokens from the `start`-th of a page."""
        e, spec, b = self._e, self._spec, self._e.builder
        lanes, chains = spec.token_lanes, spec.score_chains
        vectors = range(self._block.num_vectors)
        sums = [[e.variable(e.zeros(lanes)) for _ in range(chains)] for _ in vectors]
        with e.loop(0, spec.head_dim, chains) as first:
            for chain in range(chains):
                d = b.add(first, i64(chain))
                offset = b.add(b.mul(d, i64(spec.page_tokens)), i64(start))
                e.prefetch(e.at(keys.following, offset, F32))
                key = e.load(e.at(keys.here, offset, F32), vector(F32, lanes))
                for number in vectors:
                    place = e.at(state.queries, b.add(d, i64(number * spec.head_dim)), F32)
                    total = sums[number][chain]
                    total.set(e.fma(key, e.splat(e.load(place, F32), lanes), total.get()))
        visible = [self._visible(view, start) for view in views]
        hidden = ir.Constant(vector(F32, lanes), [-math.inf] * lanes)
        scores = []
        for number in vectors:
            score = sums[number][0].get()
            for other in sums[number][1:]:
                score = b.fadd(score, other.get())
            seen = visible[number // self._block.num_heads]
            scores.append(b.select(seen, self._capped(score), hidden))
        return scores

    def _visible(self, view: View, start: int) -> ir.Value:
        """Returns which of a page's tokens from the `start`-th a row sees."""
        e, b, lanes = self._e, self._e.builder, self._spec.token_lanes
        tokens = ir.Constant(vector(I32, lanes), list(range(start, start + lanes)))
        first, end = (e.splat(b.trunc(bound, I32), lanes) for bound in view)
        return b.and_(b.icmp_signed(">=", tokens, first), b.icmp_signed("<", tokens, end))

    def _capped(self, score: ir.Value) -> ir.Value:
        e, b, cap = self._e, self._e.builder, self._spec.softcap
        if cap is None:
            return score
        limit = e.constant(cap, score)
        return b.fmul(tanh(e, b.fdiv(score, limit)), limit)

    def take(self, state: _State, scores: list[list[ir.Value]]) -> None:
        """Takes a page's scores into m and l; leaves p and a on the stack."""
        e, b, lanes = self._e, self._e.builder, self._spec.token_lanes
        largest = []
        for parts in scores:
            most = parts[0]
            for part in parts[1:]:
                most = e.maximum(most, part)
            largest.append(most)
        before = state.maxima.get()
        after = e.maximum(folded(e, largest, e.maximum), before)
        state.maxima.set(after)
        # A row that has seen nothing yet has a maximum of minus infinity, and no difference to it.
        nothing = b.fcmp_ordered("==", after, e.constant(-math.inf, after))
        level = b.select(nothing, e.constant(0.0, after), after)
        scale = exponential(e, b.fsub(before, level))
        e.store(scale, state.scales)
        for number, parts in enumerate(scores):
            shift = e.splat(e.lane(level, number), lanes)
            total = b.fmul(state.totals[number].get(), e.splat(e.lane(scale, number), lanes))
            for start, part in zip(self._token_starts, parts, strict=True):
                weight = exponential(e, b.fsub(part, shift))
                offset = number * self._spec.page_tokens + start
                e.store(weight, e.at(state.weights, offset, F32))
                total = b.fadd(total, weight)
            state.totals[number].set(total)

    def end(self, state: _State, task: ir.Value, first_row: ir.Value, first_head: ir.Value) -> None:
        """Writes o / l."""
        e, spec, b = self._e, self._spec, self._e.builder
        dim, lanes = spec.head_dim, spec.dim_lanes
        totals = sums(e, [total.get() for total in state.totals])
        for number, total in enumerate(totals):
            out = self._place(task, "out", number, first_row, first_head)
            share = e.splat(b.fdiv(ir.Constant(F32, 1.0), total), lanes)
            source = e.at(state.outputs, number * dim, F32)
            with e.loop(0, dim, lanes) as k:
                part = e.load(e.at(source, k, F32), vector(F32, lanes))
                e.store(b.fmul(part, share), e.at(out, k, F32))

    def _place(
        self, task: ir.Value, field: str, number: int, first_row: ir.Value, first_head: ir.Value
    ) -> ir.Value:
        """Returns where a vector lies in the fused rows, or in the output's."""
        e, b = self._e, self._e.builder
        row = b.add(first_row, i64(number // self._block.num_heads))
        head = b.add(first_head, i64(number % self._block.num_heads))
        offset = b.mul(row, task_field(e, task, f"{field}_stride"))
        offset = b.add(offset, b.mul(head, i64(self._spec.head_dim)))
        return e.at(task_field(e, task, field, POINTER), offset, F32)
