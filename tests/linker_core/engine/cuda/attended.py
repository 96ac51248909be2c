"""Sequences over one layer's pages, attended by some arithmetic and by torch's in float32.

Legend: T rows of a step, X elements of a fused row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from linker_core.engine.arithmetic import Arithmetic, AttentionShape, Rotation, Span
from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.page_table import PageTable
from linker_core.engine.torch_arithmetic import TorchArithmetic

_NUM_KV_HEADS, _NUM_PAGES = 2, 96


@dataclass(frozen=True)
class Case:
    """A way to attend."""

    group: int
    head_dim: int
    page_tokens: int = 16
    window: int | None = None
    softcap: float | None = None

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            num_heads=_NUM_KV_HEADS * self.group,
            num_kv_heads=_NUM_KV_HEADS,
            head_dim=self.head_dim,
            scaling=self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
        )


CASES = (
    Case(group=1, head_dim=64),
    Case(group=4, head_dim=64, window=24),
    Case(group=7, head_dim=64, page_tokens=4),
    Case(group=1, head_dim=128, softcap=2.0),
    Case(group=4, head_dim=128, page_tokens=8, window=70, softcap=5.0),
    Case(group=7, head_dim=128),
    Case(group=2, head_dim=24, page_tokens=4, window=1),
    Case(group=2, head_dim=256, softcap=2.0),
)
# Rows of each sequence in one step after the other: prompts longer than an item and than a tile,
# chunks of them, decodes beside them and alone.
STEPS = ((70, 3, 1), (1, 1, 1), (9, 1, 30), (0, 1, 0), (1, 1, 1))


class Step(NamedTuple):
    """What a step gave, and what it should have."""

    got_TX: torch.Tensor
    want_TX: torch.Tensor


class Attended:
    """Three sequences whose pages lie in random order, full of NaN until they are written.

    Args:
        case: How they attend.
        arithmetic: Whose results are looked at.
        device: Where everything lies.
        dtype: Of its activations.
    """

    def __init__(
        self, case: Case, arithmetic: Arithmetic, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._case, self._arithmetic, self._plain = case, arithmetic, TorchArithmetic()
        self._device, self._dtype = device, dtype
        self.cache, self.plain_cache = self._new_cache(dtype), self._new_cache(torch.float32)
        self._generator = torch.Generator().manual_seed(0)
        pages = np.random.default_rng(0).permutation(_NUM_PAGES).tolist()
        each = _NUM_PAGES // 3
        self._tables = [PageTable(pages[n * each : (n + 1) * each]) for n in range(3)]
        self._starts = [0, 0, 0]

    def step(self, rows: Sequence[int]) -> Step:
        """Attends the next so many rows of every sequence."""
        spans = []
        for number, num_rows in enumerate(rows):
            if num_rows:
                spans.append(Span(self._starts[number], num_rows, self._tables[number]))
                self._starts[number] += num_rows
        shape = self._case.shape
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv_TX = torch.randn(sum(rows), width, generator=self._generator)
        qkv_TX = qkv_TX.to(self._device, self._dtype)
        rotation = self._rotation(spans)
        outs = []
        for arithmetic, cache in (
            (self._arithmetic, self.cache),
            (self._plain, self.plain_cache),
        ):
            batch = arithmetic.prepare(spans, cache)
            x_TX = qkv_TX.to(cache.shape.dtype, copy=True)
            outs.append(arithmetic.attend(x_TX, rotation, batch, layer=1, shape=shape))
        return Step(*outs)

    def _rotation(self, spans: Sequence[Span]) -> Rotation:
        dim = self._case.head_dim
        frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        parts = [torch.arange(s.start, s.start + s.num_rows) for s in spans]
        angles = torch.cat(parts).float()[:, None] * frequencies
        both = torch.cat((angles, angles), dim=-1).to(self._device)
        return Rotation(both.cos(), both.sin())

    def _new_cache(self, dtype: torch.dtype) -> KVCache:
        shape = KVShape(
            num_pages=_NUM_PAGES,
            page_tokens=self._case.page_tokens,
            num_layers=2,
            num_kv_heads=_NUM_KV_HEADS,
            head_dim=self._case.head_dim,
            dtype=dtype,
        )
        cache = KVCache(shape, device=self._device)
        cache.keys_LNKDP.fill_(float("nan"))
        cache.values_LNKPD.fill_(float("nan"))
        return cache


def check_attention(attended: Attended, *, tolerance: float) -> None:
    """Asserts that every step gives what it should, and writes what it should and nothing else."""
    for rows in STEPS:
        got_TX, want_TX = attended.step(rows)
        torch.testing.assert_close(got_TX.float(), want_TX, rtol=tolerance, atol=tolerance)
        for got, want in (
            (attended.cache.keys_LNKDP, attended.plain_cache.keys_LNKDP),
            (attended.cache.values_LNKPD, attended.plain_cache.values_LNKPD),
        ):
            torch.testing.assert_close(
                got.float(), want, rtol=tolerance, atol=tolerance, equal_nan=True
            )
