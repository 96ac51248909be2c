from __future__ import annotations

import random

import pytest
import torch

from linker_core.engine.cpu.attention_spec import AttentionSpec
from tests.linker_core.engine.cpu.paged import PagedLayer, Rows, Sequenced, spec_of

_SPECS = {
    "one head each": spec_of(group=1),
    "two heads a group": spec_of(group=2, head_dim=8),
    "seven heads a group": spec_of(group=7, head_dim=64, page_tokens=16),
    "twelve heads a group": spec_of(group=12, head_dim=8),
    "a head of 24": spec_of(group=3, head_dim=24, page_tokens=16),
    "a head of 128": spec_of(group=4, head_dim=128, page_tokens=32),
    "pages of one token": spec_of(group=2, page_tokens=1),
    "pages of 64 tokens": spec_of(group=5, page_tokens=64),
    "vectors of eight": spec_of(group=7, head_dim=24, page_tokens=16, lanes=8),
    "vectors of four": spec_of(group=1, head_dim=12, page_tokens=8, lanes=4),
    "capped": spec_of(group=2, head_dim=16, page_tokens=16, softcap=1.5),
}
_WINDOWS = (None, 1, 5, 23)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _chunked(
    layer: PagedLayer, sequence: Sequenced, ends: list[int], *, num_threads: int = 1
) -> torch.Tensor:
    """Computes a sequence alone, in chunks that end where told."""
    starts = [0, *ends[:-1]]
    chunks = [Rows(sequence, start, end) for start, end in zip(starts, ends, strict=True)]
    return torch.cat([layer.step([chunk], num_threads=num_threads)[0] for chunk in chunks])


@pytest.mark.parametrize("window", _WINDOWS)
@pytest.mark.parametrize("name", list(_SPECS))
def test_attention_over_shuffled_pages_is_the_definition(name: str, window: int | None) -> None:
    layer = PagedLayer(_SPECS[name], window=window)
    sequences = [layer.sequence(length, seed) for seed, length in enumerate((1, 37, 90))]
    found = layer.step([Rows(s, 0, len(s.tokens)) for s in sequences], num_threads=2)
    for out, sequence in zip(found, sequences, strict=True):
        assert _error(out, layer.reference(sequence)) < 2e-6


@pytest.mark.parametrize("window", _WINDOWS)
@pytest.mark.parametrize("name", list(_SPECS))
def test_a_row_is_the_same_in_any_chunks_batch_pages_and_threads(
    name: str, window: int | None
) -> None:
    lengths = (45, 1, 70, 33)
    alone = PagedLayer(_SPECS[name], window=window, seed=1)
    sequences = [alone.sequence(length, seed) for seed, length in enumerate(lengths)]
    whole = [alone.step([Rows(s, 0, len(s.tokens))])[0] for s in sequences]
    rows = [_chunked(alone, s, list(range(1, len(s.tokens) + 1))) for s in sequences]
    mixed = _mixed_batches(_SPECS[name], window, lengths, random.Random(name))
    for number in range(len(lengths)):
        assert torch.equal(rows[number], whole[number])
        assert torch.equal(mixed[number], whole[number])


def _mixed_batches(
    spec: AttentionSpec, window: int | None, lengths: tuple[int, ...], rng: random.Random
) -> list[torch.Tensor]:
    """Computes all sequences together: random chunks, orders and threads, other pages."""
    layer = PagedLayer(spec, window=window, seed=2)
    sequences = [layer.sequence(length, seed) for seed, length in enumerate(lengths)]
    done = [0] * len(lengths)
    outs: list[list[torch.Tensor]] = [[] for _ in lengths]
    while any(end < length for end, length in zip(done, lengths, strict=True)):
        order = [n for n in range(len(lengths)) if done[n] < lengths[n] and rng.random() < 0.8]
        rng.shuffle(order)
        if not order:
            continue
        parts = []
        for n in order:
            end = min(lengths[n], done[n] + rng.choice((1, 1, 3, 8, 21)))
            parts.append(Rows(sequences[n], done[n], end))
            done[n] = end
        found = layer.step(parts, num_threads=rng.choice((1, 2, 3)))
        for n, out in zip(order, found, strict=True):
            outs[n].append(out)
    return [torch.cat(parts) for parts in outs]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", ["one head each", "seven heads a group", "capped"])
def test_what_is_not_a_number_reaches_no_row_that_does_not_see_it(
    name: str, window: int | None
) -> None:
    clean, faulty = (PagedLayer(_SPECS[name], window=window) for _ in range(2))
    outs = []
    for layer, fault in ((clean, False), (faulty, True)):
        sequences = [layer.sequence(40, seed) for seed in range(3)]
        if fault:
            sequences[1].tokens[22] = float("nan")
        outs.append(layer.step([Rows(s, 0, 40) for s in sequences], num_threads=2))
    (first, middle, last), (same, bad, other) = outs
    assert torch.equal(same, first)
    assert torch.equal(other, last)
    end = 40 if window is None else 22 + window
    assert torch.equal(bad[:22], middle[:22])
    assert bad[22:end].isnan().all()
    assert torch.equal(bad[end:], middle[end:])


def test_keys_and_queries_are_rotated_as_transformers_does_and_written_to_their_slots() -> None:
    layer = PagedLayer(_SPECS["a head of 24"])
    sequence = layer.sequence(21, 0)
    layer.step([Rows(sequence, 0, 21)], num_threads=2)
    every_NHD = sequence.tokens.view(21, -1, 24)
    heads = layer.num_heads
    expected_NHD = layer.rotated(every_NHD[:, : heads + 2])
    assert torch.equal(layer.rotated_TF.view(21, -1, 24)[:, : heads + 2], expected_NHD)
    pages = torch.from_numpy(sequence.pages).long()
    keys_NKD = layer.keys[pages].permute(0, 3, 1, 2).flatten(0, 1)
    values_NKD = layer.values[pages].permute(0, 2, 1, 3).flatten(0, 1)
    assert torch.equal(keys_NKD[:21], expected_NHD[:, heads:])
    assert torch.equal(values_NKD[:21], every_NHD[:, heads + 2 :])
    assert keys_NKD[21:].isnan().all()
    assert values_NKD[21:].isnan().all()
    others = torch.ones(len(layer.keys), dtype=torch.bool)
    others[pages] = False
    assert layer.keys[others].isnan().all()
    assert layer.values[others].isnan().all()


@pytest.mark.parametrize("size", [1e-3, 30.0])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_large_and_small_scores_are_exact_enough(size: float, softcap: float | None) -> None:
    layer = PagedLayer(spec_of(group=2, head_dim=16, page_tokens=16, softcap=softcap))
    sequence = layer.sequence(64, 0)
    sequence.tokens[:, : layer.num_heads * 16] *= size
    (found,) = layer.step([Rows(sequence, 0, 64)])
    # A score of 100 is off by 1e-5 before the softmax begins.
    assert _error(found, layer.reference(sequence)) < (2e-5 if size > 1 else 2e-6)
