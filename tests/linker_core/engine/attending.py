"""Sequences over pages, attended by any arithmetic and by the definition.

Legend: T rows, H query heads, K key/value heads, D head size, S positions, X fused features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linker_core.engine.arithmetic import Arithmetic, AttentionShape, Rotation, Span
from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.page_table import PageTable
from tests.linker_core.engine.families import CPU

MAX_POSITIONS = 64
LAYERS = 2


def shape_of(
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    window: int | None = None,
    softcap: float | None = None,
) -> AttentionShape:
    return AttentionShape(num_heads, num_kv_heads, head_dim, 0.3, window, softcap)


def empty_cache(shape: AttentionShape, *, dtype: torch.dtype = torch.float32) -> KVCache:
    """A cache whose slots hold NaN until they are written."""
    kv_shape = KVShape(
        num_pages=64,
        page_tokens=4,
        num_layers=LAYERS,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
    )
    cache = KVCache(kv_shape, device=CPU)
    cache.keys_LNKDP.fill_(float("nan"))
    cache.values_LNKPD.fill_(float("nan"))
    return cache


def all_rotations(head_dim: int) -> Rotation:
    angles = torch.arange(MAX_POSITIONS).unsqueeze(1) / 7 ** torch.linspace(0, 1, head_dim // 2)
    both = torch.cat((angles, angles), dim=1)
    return Rotation(both.cos(), both.sin())


@dataclass
class Attended:
    """One sequence: the fused rows of its positions, and its pages."""

    qkv_SX: torch.Tensor
    table: PageTable
    done: int = 0


class Attending:
    """Computes sequences chunk by chunk in one cache."""

    def __init__(
        self, arithmetic: Arithmetic, shape: AttentionShape, *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.arithmetic, self.shape, self.dtype = arithmetic, shape, dtype
        self.cache = empty_cache(shape, dtype=dtype)
        self.rotations = all_rotations(shape.head_dim)

    def sequence(self, num_tokens: int, seed: int) -> Attended:
        width = (self.shape.num_heads + 2 * self.shape.num_kv_heads) * self.shape.head_dim
        generator = torch.Generator().manual_seed(seed)
        return Attended(
            torch.randn(num_tokens, width, generator=generator).to(self.dtype), PageTable()
        )

    def step(
        self, parts: Sequence[tuple[Attended, int]], *, layer: int = 1, key: str | None = None
    ) -> list[torch.Tensor]:
        """Attends the next so many rows of each, run under a key; returns them [n, H D]."""
        spans: list[Span] = []
        rows: list[torch.Tensor] = []
        positions: list[int] = []
        for sequence, length in parts:
            start, sequence.done = sequence.done, sequence.done + length
            assert self.cache.grow(sequence.table, sequence.done)
            spans.append(Span(start, length, sequence.table))
            rows.append(sequence.qkv_SX[start : sequence.done])
            positions += range(start, sequence.done)
        qkv_TX = self._buffered("qkv", torch.cat(rows))
        cos_TD, sin_TD = (
            self._buffered(name, part[positions])
            for name, part in zip(("cos", "sin"), self.rotations, strict=True)
        )
        batch = self.arithmetic.prepare(spans, self.cache)
        made: list[torch.Tensor] = []

        def body() -> None:
            rotation = Rotation(cos_TD, sin_TD)
            made.append(
                self.arithmetic.attend(qkv_TX, rotation, batch, layer=layer, shape=self.shape)
            )

        self.arithmetic.run(key, body)
        if made:
            (out_TX,) = made
        else:  # replayed: it lies where it lay before
            width = self.shape.num_heads * self.shape.head_dim
            out_TX = self.arithmetic.buffer("attended", len(qkv_TX), width, qkv_TX)
        out: list[torch.Tensor] = []
        for span in spans:
            out.append(out_TX[: span.num_rows].clone())
            out_TX = out_TX[span.num_rows :]
        assert not len(out_TX)
        return out

    def _buffered(self, name: str, x_TX: torch.Tensor) -> torch.Tensor:
        return self.arithmetic.buffer(name, x_TX.shape[0], x_TX.shape[1], x_TX).copy_(x_TX)

    def exact(self, sequence: Attended) -> torch.Tensor:
        """Returns every row of a whole sequence in float64 [S, H D], from the definition."""
        shape = self.shape
        heads_SHD = sequence.qkv_SX.double().view(len(sequence.qkv_SX), -1, shape.head_dim)
        num_rotated = shape.num_heads + shape.num_kv_heads
        length = len(heads_SHD)
        cos, sin = (part[:length, None].double() for part in self.rotations)
        low, high = heads_SHD[:, :num_rotated].chunk(2, dim=-1)
        turned = heads_SHD[:, :num_rotated] * cos + torch.cat((-high, low), dim=-1) * sin
        group = shape.num_heads // shape.num_kv_heads
        keys = turned[:, shape.num_heads :].repeat_interleave(group, dim=1)
        values = heads_SHD[:, num_rotated:].repeat_interleave(group, dim=1)
        out = torch.empty(length, shape.num_heads, shape.head_dim, dtype=torch.float64)
        for at in range(length):
            first = 0 if shape.window is None else max(0, at + 1 - shape.window)
            scores_HS = torch.einsum(
                "hd,shd->hs", turned[at, : shape.num_heads], keys[first : at + 1]
            )
            scores_HS = scores_HS * shape.scaling
            if shape.softcap is not None:
                scores_HS = shape.softcap * torch.tanh(scores_HS / shape.softcap)
            out[at] = torch.einsum("hs,shd->hd", scores_HS.softmax(-1), values[first : at + 1])
        return out.flatten(1)
