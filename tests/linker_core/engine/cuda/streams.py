"""Families of tiny models driven by the runner over some arithmetic.

Legend: T rows of a step, V widest vocabulary among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from linker_core.engine.arithmetic import Arithmetic
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.page_table import PageTable
from linker_core.engine.runner import Chunk, Runner
from linker_core.residency.stored import Stored, StoredRows, StoredTensor
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.engine.families import (
    CPU,
    Family,
    everything,
    kv_shape,
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


def mixed_family(
    folder: Path,
    architecture: str,
    arithmetic: Arithmetic,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[Family, Path]:
    """Donor, fully aliased, all-own, mixed and own rows alone, in slots 0 to 4.

    What the family says of its storages lies on the CPU, wherever it computes.
    """
    base = make_checkpoint(folder / "base", architecture=architecture)
    other = make_variant(folder / "other", base, scale=0.3)
    third = make_variant(folder / "third", base, scale=0.5, seed=2, added_tokens=("<a>",))
    rows = {"model.embed_tokens.weight": range(0, 512, 5)}
    fourth = make_variant(folder / "fourth", base, scale=0.0, rows=rows, seed=3)
    donor = stored_tensors(base)
    by_rows = stored_tensors(
        fourth,
        donor=donor,
        aliased=lambda name: "layers" in name,
        by_rows=lambda name: "embed" in name,
    )
    family = empty_family(base, arithmetic, device=device, dtype=dtype)
    moved: dict[StoredTensor, StoredTensor] = {}
    for stored in (
        donor,
        stored_tensors(other, donor=donor, aliased=everything),
        stored_tensors(other),
        stored_tensors(third, donor=donor, aliased=mixed),
        by_rows,
    ):
        on_device = {name: _moved(entry, device, moved) for name, entry in stored.items()}
        family.runner.bind(len(family.stored), on_device)
        family.stored.append(stored)
    return family, base


def empty_family(
    path: Path, arithmetic: Arithmetic, *, device: torch.device, dtype: torch.dtype
) -> Family:
    """A family of the shape of `path` that nothing is bound to."""
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
    cache = KVCache(replace(kv_shape(config), dtype=dtype), device=device)
    return Family(Runner(config, cache, arithmetic, device=device), cache)


def _moved(entry: Stored, device: torch.device, moved: dict[StoredTensor, StoredTensor]) -> Stored:
    """The same on a device: what is shared stays shared."""
    if device == CPU:
        return entry
    if isinstance(entry, StoredRows):
        return StoredRows(
            base=moved[entry.base],
            own=entry.own.to(device),
            positions=entry.positions.to(device),
            num_rows=entry.num_rows,
        )
    assert isinstance(entry, StoredTensor)
    if entry not in moved:
        moved[entry] = StoredTensor(tensor=entry.tensor.to(device))
    return moved[entry]


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


def check_mixed_batches(family: Family, base: Path, *, tolerance: float = TOLERANCE) -> None:
    """Asserts that prompts and decodes of all variants side by side get their own logits.

    Args:
        family: Of `mixed_family`.
        base: Its donor's checkpoint.
        tolerance: Relative to the largest logit.
    """
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
                got_V = logits_RV[row, : len(want_V)].float().cpu()
                assert relative_error(got_V, want_V) <= tolerance


def check_isolation(family: Family) -> None:
    """Asserts that NaN on one sequence's pages ends that sequence and changes no other's logits."""
    whole, torn = ([Stream(family, n, seed=n) for n in (0, 1, 2)] for _ in range(2))
    for streams in (whole, torn):
        forward(streams, [3, 6, 5])
    spoilt = int(torn[1].table.pages[0])
    family.cache.keys_LNKDP[:, spoilt] = float("nan")
    family.cache.values_LNKPD[:, spoilt] = float("nan")
    for _ in range(3):  # launched, captured and replayed
        want_RV = forward(whole, [1, 1, 1])
        result = family.runner.forward([stream.chunk(1) for stream in torn])
        assert result.finite == [True, False, True]
        for row in (0, 2):
            assert torch.equal(result.logits_RV[row], want_RV[row])
