"""Sequences over pages of a cache of one layer, attended by the compiled region.

Legend: N tokens of a sequence, T rows of a step, H query heads, K key/value heads, G = H / K,
D head size, P tokens of a page, F features of a fused row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir

from linker_core.engine.cpu.attention_code import emit_attention
from linker_core.engine.cpu.attention_spec import (
    ITEM_ROWS,
    SPAN,
    TASK,
    AttentionSpec,
)
from linker_core.engine.cpu.regions import Code
from tests.linker_core.engine.cpu.compiled import compiled, record, run

SEES_ALL = 1 << 40
_NUM_KV_HEADS = 2


def spec_of(
    *,
    head_dim: int = 16,
    group: int = 2,
    page_tokens: int = 4,
    lanes: int = 16,
    softcap: float | None = None,
) -> AttentionSpec:
    return AttentionSpec(
        head_dim=head_dim,
        group=group,
        page_tokens=page_tokens,
        lanes=lanes,
        num_registers=32 if lanes == 16 else 16,
        softcap=softcap,
    )


@cache
def code_of(spec: AttentionSpec) -> Code:
    def emit(module: ir.Module) -> None:
        emit_attention(module, spec)

    return compiled(emit)


class Sequenced(NamedTuple):
    """One sequence."""

    tokens: torch.Tensor  # [N, F]: the fused row of each position
    pages: npt.NDArray[np.int32]  # where its keys and values go


@dataclass(frozen=True)
class Rows:
    """Positions `start` to `end - 1` of a sequence."""

    sequence: Sequenced
    start: int
    end: int


class PagedLayer:
    """The pages of one layer, none of them written.

    Args:
        spec: What the region is compiled for.
        num_pages: How many pages there are; they are handed out in random order.
        window: Positions that a row sees; None for all.
        seed: Of the pages' order.
    """

    def __init__(
        self, spec: AttentionSpec, *, num_pages: int = 256, window: int | None = None, seed: int = 0
    ) -> None:
        self.spec, self.window = spec, window
        self.num_kv_heads = _NUM_KV_HEADS
        sizes = (num_pages, _NUM_KV_HEADS)
        self.keys = torch.full((*sizes, spec.head_dim, spec.page_tokens), float("nan"))
        self.values = torch.full((*sizes, spec.page_tokens, spec.head_dim), float("nan"))
        self.rotated_TF = torch.empty(0)  # the last step's fused rows, as the region left them
        self.scaling = float(np.float32(spec.head_dim**-0.5))
        self._free = list(np.random.default_rng(seed).permutation(num_pages).astype(np.int32))

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.spec.group

    def sequence(self, num_tokens: int, seed: int) -> Sequenced:
        """Returns a sequence that has pages for all of its tokens."""
        generator = torch.Generator().manual_seed(seed)
        features = (self.num_heads + 2 * self.num_kv_heads) * self.spec.head_dim
        num_pages = -(-num_tokens // self.spec.page_tokens)
        pages = np.array([self._free.pop() for _ in range(num_pages)], dtype=np.int32)
        return Sequenced(torch.randn(num_tokens, features, generator=generator), pages)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin [T, D] as transformers computes them."""
        dim = self.spec.head_dim
        frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = positions.float()[:, None] * frequencies
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()

    def step(self, parts: Sequence[Rows], *, num_threads: int = 1) -> list[torch.Tensor]:
        """Attends some sequences' rows in one region; returns the output of each, [rows, H D]."""
        qkv_TF = torch.cat([part.sequence.tokens[part.start : part.end] for part in parts])
        cos, sin = self.rotation(torch.cat([torch.arange(p.start, p.end) for p in parts]))
        out = torch.full((len(qkv_TF), self.num_heads * self.spec.head_dim), 7.0)
        spans, items, first_row = [], [], 0
        for number, part in enumerate(parts):
            num_rows = part.end - part.start
            pages = part.sequence.pages.ctypes.data
            values = {"first_row": first_row, "num_rows": num_rows, "start": part.start}
            spans.append(record(SPAN, **values, pages=pages))
            items += [[number, row] for row in range(0, num_rows, ITEM_ROWS)]
            first_row += num_rows
        span_words, item_words = np.array(spans, dtype=np.int64), np.array(items, dtype=np.int64)
        task = record(
            TASK,
            qkv=qkv_TF.data_ptr(),
            qkv_stride=qkv_TF.stride(0),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            num_kv_heads=self.num_kv_heads,
            spans=span_words.ctypes.data,
            num_spans=len(spans),
            items=item_words.ctypes.data,
            num_items=len(items),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            scaling=self.scaling,
            window=SEES_ALL if self.window is None else self.window,
        )
        run(code_of(self.spec), self.spec.symbol, task, num_threads=num_threads)
        self.rotated_TF = qkv_TF
        ends = np.cumsum([part.end - part.start for part in parts])
        return list(torch.tensor_split(out, ends[:-1].tolist()))

    def reference(self, sequence: Sequenced) -> torch.Tensor:
        """Returns every row's output in float64, [N, H D], from the definition."""
        num_tokens, dim, heads = len(sequence.tokens), self.spec.head_dim, self.num_heads
        every_NHD = sequence.tokens.view(num_tokens, -1, dim)
        rotated_NHD = self.rotated(every_NHD[:, : heads + self.num_kv_heads]).double()
        group = self.spec.group
        keys_NHD = rotated_NHD[:, heads:].repeat_interleave(group, dim=1)
        values_NHD = every_NHD[:, -self.num_kv_heads :].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("nhd,mhd->hnm", rotated_NHD[:, :heads], keys_NHD) * self.scaling
        if self.spec.softcap is not None:
            scores = self.spec.softcap * torch.tanh(scores / self.spec.softcap)
        position = torch.arange(num_tokens)
        hidden = position[None, :] > position[:, None]
        if self.window is not None:
            hidden |= position[None, :] <= position[:, None] - self.window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hnm,mhd->nhd", weights, values_NHD).flatten(1)

    def rotated(self, x_NHD: torch.Tensor) -> torch.Tensor:
        """Returns x cos + rotate_half(x) sin of positions 0 to N - 1, in float32."""
        cos, sin = (part[:, None] for part in self.rotation(torch.arange(len(x_NHD))))
        low, high = x_NHD.chunk(2, dim=-1)
        return x_NHD * cos + torch.cat((-high, low), dim=-1) * sin
