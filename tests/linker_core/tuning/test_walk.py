"""The walk against transformers' own models, for several plans at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from linker_core.tuning import walk as walk_module
from linker_core.tuning.memory import activation_bytes
from linker_core.tuning.storages import Rungs
from linker_core.tuning.walk import Walk
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.tuning.pairs import Pair, make_pair
from tests.tiny import ARCHITECTURES

LENGTHS = (1, 30, 7, 17)  # beyond the sliding windows of 12, and beyond a page


def token_ids(num: int = sum(LENGTHS), vocab_size: int = 512) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    ids: list[int] = torch.randint(3, vocab_size, (num,), generator=generator).tolist()
    return ids


def walked(
    pair: Pair, plans: Sequence[Rungs], walk: Walk, ids: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Last hidden states [T, H] and logits [T, V] under each plan, all walked together."""
    reader = pair.reader()
    states = [walk.embed(reader.storages(None, plan), ids) for plan in plans]
    for layer in range(walk.config.num_layers):
        states = walk.block(layer, [reader.storages(layer, plan) for plan in plans], states)
    logits = [
        walk.logits(reader.storages(None, plan), state)
        for plan, state in zip(plans, states, strict=True)
    ]
    return list(zip(states, logits, strict=True))


def expected(model: PreTrainedModel, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers computes for the sequences, one by one."""
    hidden: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    inner: Any = model.model
    handle = inner.norm.register_forward_pre_hook(lambda _norm, given: hidden.append(given[0][0]))
    first = 0
    for length in LENGTHS:
        with torch.inference_mode():
            part = torch.tensor([ids[first : first + length]])
            logits.append(model(part, use_cache=False).logits[0])
        first += length
    handle.remove()
    return torch.cat(hidden), torch.cat(logits)


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def mixed_plans(pair: Pair) -> list[Rungs]:
    """The variant; a block, single weights, and what lies outside the blocks aliased."""
    head = [LM_HEAD_NAME] if LM_HEAD_NAME in pair.variant.tensors else [EMBED_NAME]
    return [
        pair.base,
        pair.aliasing("layers.1."),
        pair.aliasing("layers.0.mlp.up_proj", "layers.2.self_attn.k_proj.weight"),
        pair.aliasing(EMBED_NAME),
        pair.aliasing(*head, "model.norm", "1.input_layernorm"),
    ]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_walk_equals_transformers_under_every_plan(
    tmp_path: Path, architecture: str, tie: bool
) -> None:
    pair = make_pair(tmp_path, architecture=architecture, tie=tie, scale=0.3)
    plans, ids = mixed_plans(pair), token_ids()
    found = walked(pair, plans, pair.walk(LENGTHS), ids)
    for plan, (hidden, logits) in zip(plans, found, strict=True):
        want_hidden, want_logits = expected(pair.oracle(plan), ids)
        assert_equal(hidden, want_hidden)
        assert_equal(logits, want_logits)
    own = found[0][1]
    assert all(float((own - logits).abs().max()) > 0.01 for _, logits in found[1:])


def test_walk_equals_transformers_where_tokens_were_added(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, added_tokens=["<|a|>", "<|b|>"])
    plan = pair.aliasing("layers.1.")
    ids = [*token_ids()[:-2], 512, 513]
    ((hidden, logits),) = walked(pair, [plan], pair.walk(LENGTHS), ids)
    want_hidden, want_logits = expected(pair.oracle(plan), ids)
    assert logits.shape == (len(ids), 514)
    assert_equal(hidden, want_hidden)
    assert_equal(logits, want_logits)


def num_batches(walk: Walk, pair: Pair, ids: Sequence[int]) -> int:
    seen: list[int] = []
    storages = pair.reader().storages(0, pair.base)
    state = walk.embed(pair.reader().storages(None, pair.base), ids)
    walk.block(0, [storages], [state], watch=lambda rows: seen.append(len(rows)))
    assert sum(seen) == len(ids)
    return len(seen)


@pytest.mark.parametrize("rows", [1, 40, 100])
def test_walk_is_the_same_in_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    pair = make_pair(tmp_path, scale=0.3)
    plans, ids = mixed_plans(pair), token_ids()
    whole = pair.walk(LENGTHS)
    assert num_batches(whole, pair, ids) == 1
    want = walked(pair, plans, whole, ids)
    row_bytes = activation_bytes(pair.variant.config)
    monkeypatch.setattr(walk_module, "_ACTIVATION_BYTES", rows * row_bytes)
    parts = pair.walk(LENGTHS)
    # As many whole sequences as fit, and at least one: (1), (30), (7 + 17) where the limit is 30.
    assert num_batches(parts, pair, ids) == {1: 3, 40: 2, 100: 1}[rows]
    for (hidden, logits), (want_hidden, want_logits) in zip(
        walked(pair, plans, parts, ids), want, strict=True
    ):
        assert_equal(hidden, want_hidden)
        assert_equal(logits, want_logits)


@pytest.mark.parametrize("rows", [1, 1000])
def test_state_that_serves_several_equals_separate_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    pair = make_pair(tmp_path, scale=0.3)
    plans = mixed_plans(pair)[:4]
    reader, ids = pair.reader(), token_ids()
    row_bytes = activation_bytes(pair.variant.config)
    monkeypatch.setattr(walk_module, "_ACTIVATION_BYTES", rows * row_bytes)
    walk = pair.walk(LENGTHS)
    storages = [reader.storages(1, plan) for plan in plans]
    one, two = (walk.embed(reader.storages(None, plans[i]), ids) for i in (0, 3))
    parents = [one, two, one, two]
    want = walk.block(1, storages, [parent.clone() for parent in parents])
    got = walk.block(1, storages, parents)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert [state is parent for state, parent in zip(got, parents, strict=True)] == [
        False, False, True, True,
    ]  # fmt: skip


def test_walk_leaves_no_storage_bound(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    walk = pair.walk(LENGTHS)
    for _ in range(2):  # a slot that is still bound may not be bound again
        walked(pair, mixed_plans(pair)[:2], walk, token_ids())
    for layer in range(3):
        assert all(not leaf.stored for leaf in walk.linear_leaves(layer).values())


def test_cache_holds_the_raggedest_text(tmp_path: Path) -> None:
    """Every sequence of one token takes a page of its own."""
    pair = make_pair(tmp_path, layers=1)
    lengths = [1] * 40 + [33]
    walk = pair.walk(lengths)
    reader = pair.reader()
    state = walk.embed(reader.storages(None, pair.base), token_ids(sum(lengths)))
    (out,) = walk.block(0, [reader.storages(0, pair.base)], [state])
    assert out.isfinite().all()
