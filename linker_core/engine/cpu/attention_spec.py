"""What the attention kernels are compiled for, and the records they are called with.

Pages of one layer: keys [pages, K, D, P], so that a vector holds one dimension of several tokens,
and values [pages, K, P, D], so that it holds several dimensions of one token; both float32.

Legend: T rows of the batch, H query heads, K key/value heads, D head size, P tokens of a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from linker_core.engine.cpu.emitter import F32, I64, POINTER, Emitter, vector

ITEM_ROWS = 8  # rows of a sequence that a thread takes at a time, for one key/value head

# 64-bit words of the record that a region is called with.
TASK = (
    "qkv",  # [T, (H + 2 K) D]: queries, keys, values; queries and keys are rotated in place
    "qkv_stride",  # elements between rows
    "cos",  # [T, D], dense
    "sin",
    "keys",  # the layer's pages
    "values",
    "num_kv_heads",
    "spans",
    "num_spans",
    "items",
    "num_items",
    "next_item",  # 0; counted up by the threads
    "out",  # [T, H D]
    "out_stride",
    "scaling",  # a float32's bits
    "window",  # positions that a row sees, its own included
)
# Rows `first_row` to `first_row + num_rows - 1` are a sequence's positions from `start`.
SPAN = ("first_row", "num_rows", "start", "pages")  # pages: int32, in the order of the tokens
# Up to `ITEM_ROWS` rows of a span, from the `row`-th.
ITEM = ("span", "row")
_TASK = {name: number for number, name in enumerate(TASK)}
_SPAN = {name: number for number, name in enumerate(SPAN)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one model's attention looks like.

    Attributes:
        head_dim: D, even.
        group: Query heads that share a key/value head.
        page_tokens: P, a power of two.
        lanes: float32 elements of a vector, a power of two.
        num_registers: Vector registers.
        softcap: c of s = c tanh(s / c), if there is one.
    """

    head_dim: int
    group: int
    page_tokens: int
    lanes: int
    num_registers: int
    softcap: float | None = None

    @property
    def symbol(self) -> str:
        """The name of its region."""
        cap = "" if self.softcap is None else f"_cap{self.softcap!r}"
        return f"attention_d{self.head_dim}_g{self.group}_p{self.page_tokens}{cap}"

    @property
    def block_rows(self) -> int:
        """Rows whose queries read a page together."""
        return max(1, ITEM_ROWS // self.group)

    @property
    def token_lanes(self) -> int:
        """Tokens of a page in one vector."""
        return min(self.lanes, self.page_tokens)

    @property
    def dim_lanes(self) -> int:
        """Dimensions of a head in one vector: no vector is only part full."""
        return math.gcd(self.lanes, self.head_dim)

    @property
    def half_lanes(self) -> int:
        """The same where the two halves of a head are rotated."""
        return math.gcd(self.lanes, self.head_dim // 2)

    @property
    def score_chains(self) -> int:
        """Sums that a score is taken in, each of every so many-th dimension."""
        return 2 if self.num_registers >= 2 * (ITEM_ROWS + 1) + 1 else 1

    def weigh_columns(self, num_vectors: int) -> int:
        """Returns how many vectors of a token's value are weighed at a time.

        A register for each sum, one for each of them and one for a weight.
        """
        num_parts = self.head_dim // self.dim_lanes
        fitting = (self.num_registers - 1) // (num_vectors + 1)
        return next(n for n in (4, 2, 1) if n <= max(1, fitting) and num_parts % n == 0)

    @property
    def page_elements(self) -> int:
        """Elements of one head's keys, or values, in a page."""
        return self.head_dim * self.page_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive rows of a sequence and consecutive heads of a group."""

    num_rows: int
    num_heads: int

    @property
    def num_vectors(self) -> int:
        """Query vectors."""
        return self.num_rows * self.num_heads


class Pages(NamedTuple):
    """Addresses of one head's keys or values in two pages."""

    here: ir.Value
    following: ir.Value  # of the page that is read next: asked for while this one is computed


class View(NamedTuple):
    """What a row sees: tokens `first` to `end - 1`."""

    first: ir.Value
    end: ir.Value


def task_field(e: Emitter, task: ir.Value, name: str, kind: ir.Type = I64) -> ir.Value:
    """Reads a field of the task."""
    return e.field(task, _TASK[name], kind)


def task_field_address(e: Emitter, task: ir.Value, name: str) -> ir.Value:
    """Returns where a field of the task lies."""
    return e.at(task, _TASK[name], I64)


def span_field(e: Emitter, span: ir.Value, name: str, kind: ir.Type = I64) -> ir.Value:
    """Reads a field of a span."""
    return e.field(span, _SPAN[name], kind)


def head_pages(
    e: Emitter, spec: AttentionSpec, task: ir.Value, which: str, page: ir.Value, head: ir.Value
) -> ir.Value:
    """Returns where one head's keys or values lie in a page."""
    b = e.builder
    number = b.add(b.mul(page, task_field(e, task, "num_kv_heads")), head)
    block = ir.ArrayType(F32, spec.page_elements)
    return e.at(task_field(e, task, which, POINTER), number, block)


def copy(e: Emitter, source: ir.Value, target: ir.Value, *, count: int, lanes: int) -> None:
    """Copies `count` float32 elements, a multiple of `lanes`."""
    with e.loop(0, count, lanes) as k:
        e.store(e.load(e.at(source, k, F32), vector(F32, lanes)), e.at(target, k, F32))
