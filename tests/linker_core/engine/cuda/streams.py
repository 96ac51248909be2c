"""Families of tiny models driven by the runner over some arithmetic.

Legend: T rows of a step, V widest vocabulary among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from linker_core.engine.arithmetic import Arithmetic
from linker_core.engine.page_table import PageTable
from linker_core.engine.runner import Chunk
from tests.linker_core.engine.families import (
    Family,
    build_family,
    everything,
    reference_logits,
    reference_model,
    relative_error,
    stored_tensors,
)
from tests.tiny import make_checkpoint, make_variant

MAX_TOKENS = 40
TOLERANCE = 1e-4


def mixed(name: str) -> bool:
    """Aliases one block's products, other tensors' biases, and some norms."""
    return (
        ("layers.0" in name and name.endswith("proj.weight"))
        or ("layers.1" in name and name.endswith("bias"))
        or "input_layernorm" in name
    )


def mixed_family(folder: Path, architecture: str, arithmetic: Arithmetic) -> tuple[Family, Path]:
    """Donor, fully aliased, all-own, mixed and own rows alone, in slots 0 to 4."""
    base = make_checkpoint(folder / "base", architecture=architecture)
    other = make_variant(folder / "other", base, scale=0.3)
    third = make_variant(folder / "third", base, scale=0.5, seed=2, added_tokens=("<a>",))
    rows = {"model.embed_tokens.weight": range(0, 512, 5)}
    fourth = make_variant(folder / "fourth", base, scale=0.0, rows=rows, seed=3)
    family = build_family(base, arithmetic=arithmetic)
    donor = family.stored[0]
    family.add(stored_tensors(other, donor=donor, aliased=everything))
    family.add(stored_tensors(other))
    family.add(stored_tensors(third, donor=donor, aliased=mixed))
    by_rows = stored_tensors(
        fourth,
        donor=donor,
        aliased=lambda name: "layers" in name,
        by_rows=lambda name: "embed" in name,
    )
    family.add(by_rows)
    return family, base


class Stream:
    """One sequence of random tokens, fed chunk by chunk."""

    def __init__(self, family: Family, slot: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.family, self.slot = family, slot
        self.tokens: list[int] = torch.randint(512, (MAX_TOKENS,), generator=generator).tolist()
        self.table, self.done = PageTable(), 0

    def chunk(self, length: int) -> Chunk:
        start, self.done = self.done, self.done + length
        assert self.family.cache.grow(self.table, self.done)
        return Chunk(
            slot=self.slot,
            token_ids=self.tokens[start : self.done],
            start=start,
            table=self.table,
            num_logits=1,
        )


def forward(streams: Sequence[Stream], lengths: Sequence[int]) -> torch.Tensor:
    """Computes the next so many tokens of each stream; returns a row for each that has any."""
    chunks = [s.chunk(n) for s, n in zip(streams, lengths, strict=True) if n]
    result = streams[0].family.runner.forward(chunks)
    assert all(result.finite)
    return result.logits_RV


def check_mixed_batches(folder: Path, architecture: str, arithmetic: Arithmetic) -> None:
    """Asserts that prompts and decodes of all variants side by side get their own logits."""
    family, base = mixed_family(folder, architecture, arithmetic)
    streams = [Stream(family, number % 5, seed=number) for number in range(6)]
    references = [
        reference_logits(reference_model(base, stored=family.stored[s.slot]), s.tokens)
        if s.slot != 3  # its table is wider than the donor's model
        else None
        for s in streams
    ]
    plan = [
        [5, 11, 1, 7, 0, 3],
        [1, 1, 17, 4, 0, 9],
        *[[1, 1, 1, 1, 1, 1]] * 4,
        [9, 1, 1, 1, 20, 1],
    ]
    for lengths in plan:
        logits_RV = forward(streams, lengths)
        taking = [i for i, n in enumerate(lengths) if n]
        for row, i in enumerate(taking):
            reference = references[i]
            if reference is not None:
                want_V = reference[streams[i].done - 1]
                assert relative_error(logits_RV[row, : len(want_V)], want_V) <= TOLERANCE
