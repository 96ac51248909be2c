"""One ragged batch of mixed variants gives each variant's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from linker_core.engine.arithmetic import Product
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.page_table import PageTable
from linker_core.engine.rows import RowGroup
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
from tests.tiny import ARCHITECTURES, make_checkpoint, make_variant

TOLERANCE = 1e-4


def mixed(name: str) -> bool:
    """Aliases one block's products, other tensors' biases, and some norms."""
    return (
        ("layers.0" in name and name.endswith("proj.weight"))
        or ("layers.1" in name and name.endswith("bias"))
        or "input_layernorm" in name
    )


def mixed_family(tmp_path: Path, architecture: str, *, tie: bool = True) -> tuple[Family, Path]:
    """Donor, fully aliased, all-own and mixed variants in slots 0 to 3."""
    base = make_checkpoint(tmp_path / "base", architecture=architecture, tie=tie)
    other = make_variant(tmp_path / "other", base, scale=0.3)
    third = make_variant(tmp_path / "third", base, scale=0.5, seed=2)
    family = build_family(base)
    donor = family.stored[0]
    family.add(stored_tensors(other, donor=donor, aliased=everything))
    family.add(stored_tensors(other))
    family.add(stored_tensors(third, donor=donor, aliased=mixed))
    return family, base


def tokens_of(seed: int, length: int, *, vocab: int = 512) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (length,), generator=generator).tolist()


class Stream:
    """One sequence fed chunk by chunk."""

    def __init__(self, family: Family, slot: int, tokens: list[int]) -> None:
        self.family, self.slot, self.tokens = family, slot, tokens
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


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_mixed_ragged_batches_give_each_variants_own_logits(
    tmp_path: Path, architecture: str, tie: bool
) -> None:
    family, base = mixed_family(tmp_path, architecture, tie=tie)
    streams = [Stream(family, slot % 4, tokens_of(slot, 40)) for slot in range(6)]
    references = [
        reference_logits(reference_model(base, stored=family.stored[s.slot]), s.tokens)
        for s in streams
    ]
    # Prefill chunks and decodes of all variants side by side, across the windows' edges.
    plan = [
        [5, 11, 1, 7, 0, 3],
        [1, 1, 17, 4, 0, 9],
        [9, 1, 1, 1, 20, 1],
        [1, 1, 1, 1, 1, 1],
        [14, 13, 8, 1, 6, 1],
    ]
    for lengths in plan:
        taking = [(i, n) for i, n in enumerate(lengths) if n]
        logits = family.runner.forward([streams[i].chunk(n) for i, n in taking]).logits_RV
        for row, (i, _) in enumerate(taking):
            want = references[i][streams[i].done - 1]
            assert relative_error(logits[row], want) <= TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_scattered_pages_give_the_contiguous_logits(
    tmp_path: Path, architecture: str
) -> None:
    family, base = mixed_family(tmp_path, architecture)
    tokens = tokens_of(9, 40)
    want = reference_logits(reference_model(base), tokens)
    # With just enough pages left for all three, growing side by side scatters them.
    streams = [Stream(family, 0, tokens) for _ in range(3)]
    assert family.cache.grow(PageTable(), 4 * (64 - 30))
    for _ in range(8):
        logits = family.runner.forward([stream.chunk(5) for stream in streams]).logits_RV
        for row, stream in enumerate(streams):
            assert relative_error(logits[row], want[stream.done - 1]) <= TOLERANCE
    assert any((np.diff(stream.table.pages) != 1).any() for stream in streams)
    family.cache.check_integrity()


def test_forward_aliased_variants_share_one_product_per_layer(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", layers=3)
    family = build_family(base)
    donor = family.stored[0]
    for number in range(3):
        path = make_variant(tmp_path / f"v{number}", base, scale=0.1, seed=number + 1)
        family.add(stored_tensors(path, donor=donor, aliased=lambda name: "layers" in name))
    calls: list[tuple[int, int]] = []

    class Counting(CompiledArithmetic):
        def multiply(self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product]) -> None:
            calls.extend((p.weight_OI.data_ptr(), len(rows.indices_n)) for p in products)
            super().multiply(x_TI, rows, products)

    family.runner.context.arithmetic = Counting()
    streams = [Stream(family, slot, tokens_of(slot, 9)) for slot in range(4)]
    family.runner.forward([stream.chunk(2 + stream.slot) for stream in streams])
    for layer in range(3):
        weight = donor[f"model.layers.{layer}.self_attn.q_proj.weight"].base.tensor
        assert calls.count((weight.data_ptr(), 2 + 3 + 4 + 5)) == 1
        assert sum(key == weight.data_ptr() for key, _ in calls) == 1
    # Heads are the variants' own: one product each, over the one row that needs a token.
    heads = {stored["lm_head.weight"].base.tensor.data_ptr() for stored in family.stored}
    assert sorted(rows for key, rows in calls if key in heads) == [1, 1, 1, 1]


def test_forward_vocabularies_of_two_widths_share_a_batch(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", vocab_size=512)
    wide = make_variant(tmp_path / "wide", base, scale=0.1, added_tokens=("<a>", "<b>"))
    family = build_family(base)
    donor = family.stored[0]
    family.add(stored_tensors(wide, donor=donor, aliased=lambda name: "layers" in name))
    streams = [
        Stream(family, 0, tokens_of(1, 6)),
        Stream(family, 1, [513, 512, *tokens_of(2, 4)]),
    ]
    logits = family.runner.forward([stream.chunk(6) for stream in streams]).logits_RV
    assert logits.shape == (2, 514)
    narrow_want = reference_logits(reference_model(base), streams[0].tokens)[-1]
    wide_want = reference_logits(reference_model(wide, stored=family.stored[1]), streams[1].tokens)[
        -1
    ]
    assert relative_error(logits[0, :512], narrow_want) <= TOLERANCE
    assert relative_error(logits[1], wide_want) <= TOLERANCE


def test_forward_only_wanted_rows_reach_the_head(tmp_path: Path) -> None:
    family, base = mixed_family(tmp_path, "qwen2")
    quiet, asking = Stream(family, 0, tokens_of(3, 8)), Stream(family, 2, tokens_of(4, 8))
    silent = quiet.chunk(5)
    silent = Chunk(slot=0, token_ids=silent.token_ids, start=0, table=silent.table, num_logits=0)
    assert family.runner.forward([silent]).logits_RV.numel() == 0
    logits = family.runner.forward([quiet.chunk(3), asking.chunk(8)]).logits_RV
    own = reference_model(base, stored=family.stored[2])
    assert relative_error(logits[1], reference_logits(own, asking.tokens)[-1]) <= TOLERANCE
    donor = reference_model(base)
    assert relative_error(logits[0], reference_logits(donor, quiet.tokens)[-1]) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_forward_variant_of_another_checkpoint_dtype_shares_the_batch(
    tmp_path: Path, dtype: str
) -> None:
    family = build_family(make_checkpoint(tmp_path / "base"))
    other = make_checkpoint(tmp_path / "other", dtype=dtype, seed=3)
    family.add(stored_tensors(other, donor=family.stored[0], aliased=lambda n: "layers.1" in n))
    streams = [Stream(family, slot, tokens_of(slot, 9)) for slot in (0, 1)]
    logits = family.runner.forward([stream.chunk(9) for stream in streams]).logits_RV
    for row, path in enumerate((tmp_path / "base", other)):
        model = reference_model(path, stored=family.stored[row])
        want = reference_logits(model, streams[row].tokens)[-1]
        assert relative_error(logits[row], want) <= TOLERANCE
