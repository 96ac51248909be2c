"""Prices against transformers' logits; what is shared between plans is computed and read once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from linker_core.residency.loader import read_tensor
from linker_core.sharing.price import Price
from linker_core.sharing.rungs import Rung
from linker_core.tuning import memory, pricing, shared_walk, storages
from linker_core.tuning.calibration import CalibrationText
from linker_core.tuning.pricing import _clusters, bootstrap_upper
from linker_core.tuning.storages import Rungs, Storages
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, FINAL_NORM_NAME, LM_HEAD_NAME
from tests.linker_core.tuning.pairs import (
    Pair,
    assembled,
    make_pair,
    random_text,
    response_log_probs,
)
from tests.tiny import ARCHITECTURES

LENGTHS = (40, 9, 25)


class Direct(NamedTuple):
    kl: float
    top1: float
    ppl_ratio: float


def direct(pair: Pair, plan: Rungs, text: CalibrationText) -> Direct:
    """A price worked out from transformers' logits in float64."""
    own, planned = (response_log_probs(pair.oracle(rungs), text) for rungs in (pair.base, plan))
    said = torch.tensor(
        [s.token_ids[p] for s in text.sequences for span in s.responses for p in span]
    ).unsqueeze(1)
    return Direct(
        kl=float((own.exp() * (own - planned)).sum(dim=-1).mean()),
        top1=float((own.argmax(-1) == planned.argmax(-1)).double().mean()),
        ppl_ratio=float((own.gather(1, said) - planned.gather(1, said)).mean().exp()),
    )


def assert_price(price: Price, want: Direct, text: CalibrationText) -> None:
    assert price.kl == pytest.approx(want.kl, rel=1e-3, abs=1e-7)
    assert price.top1 == want.top1
    assert price.ppl_ratio == pytest.approx(want.ppl_ratio, rel=1e-4)
    assert price.tokens == text.num_response_tokens
    assert price.calibration == text.digest
    assert price.kl_upper >= price.kl


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pricing"), scale=0.2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_price_equals_a_direct_computation(tmp_path: Path, architecture: str) -> None:
    pair = make_pair(tmp_path, architecture=architecture, scale=0.2, tie=False)
    text = random_text(LENGTHS)
    plans = [
        pair.aliasing("layers."),
        pair.aliasing("layers.1.mlp", "layers.2.self_attn.q_proj"),
        pair.aliasing(EMBED_NAME, FINAL_NORM_NAME),
        pair.aliasing(LM_HEAD_NAME),
    ]
    for plan, price in zip(plans, pair.pricer(text).price(plans), strict=True):
        want = direct(pair, plan, text)
        assert want.kl > 1e-3
        assert_price(price, want, text)


def test_price_is_the_same_in_chunks_of_logits(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    text, plan = random_text(LENGTHS), pair.aliasing("layers.")
    (want,) = pair.pricer(text).price([plan])
    assert 4 * 512 * text.num_response_tokens <= memory.LOGITS_CHUNK_BYTES  # it was one chunk
    monkeypatch.setattr(shared_walk, "LOGITS_CHUNK_BYTES", 4 * 512 * 7)
    monkeypatch.setattr(pricing, "_COMPARED_BYTES", 4 * 512 * 3)
    (got,) = pair.pricer(text).price([plan])
    assert got.kl == pytest.approx(want.kl, rel=1e-5)
    assert got.top1 == want.top1
    assert got.ppl_ratio == pytest.approx(want.ppl_ratio, rel=1e-6)


def test_several_answers_in_a_sequence_are_priced_and_nothing_else(pair: Pair) -> None:
    (sequence,) = random_text([40]).sequences
    spans = (range(3, 9), range(20, 40))
    few = type(sequence)(
        token_ids=sequence.token_ids, responses=spans, kind="talk", text_digest="0"
    )
    text, plan = assembled([few]), pair.aliasing("layers.")
    (price,) = pair.pricer(text).price([plan])
    assert price.tokens == 26
    assert_price(price, direct(pair, plan, text), text)


def test_price_with_more_tokens_than_the_donor(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, scale=0.2, added_tokens=["<|a|>", "<|b|>"])
    text, plan = random_text(LENGTHS, low=480, high=514), pair.aliasing("layers.0.", "layers.1.")
    assert max(token for s in text.sequences for token in s.token_ids) >= 512
    (price,) = pair.pricer(text).price([plan])
    assert_price(price, direct(pair, plan, text), text)


def test_own_rungs_cost_nothing(tmp_path: Path) -> None:
    scale = {"model.layers.0.mlp.up_proj.weight": 0.2, EMBED_NAME: 0.0}
    pair = make_pair(tmp_path, scale=scale, rows={EMBED_NAME: [5, 6]})
    base = pair.base
    assert {base[EMBED_NAME], base["model.layers.0.mlp.up_proj.weight"]} == {Rung.ROWS, Rung.OWN}
    everything_own: Rungs = dict.fromkeys(base, Rung.OWN)
    for price in pair.pricer(random_text(LENGTHS)).price([base, everything_own]):
        assert (price.kl, price.kl_upper, price.top1, price.ppl_ratio) == (0.0, 0.0, 1.0, 1.0)


def test_plans_share_what_they_compute_until_they_part(pair: Pair) -> None:
    pricer = pair.pricer(random_text(LENGTHS))
    last = [pair.aliasing("layers.2.mlp"), pair.aliasing("layers.2.self_attn")]
    prices = pricer.price(last)
    assert pricer.block_passes == 1 + 1 + 3  # the variant itself is the third of the last block
    assert pricer.forward_passes == pytest.approx(5 / 3)
    alone = [pair.pricer(random_text(LENGTHS)).price([plan])[0] for plan in last]
    for mine, theirs in zip(prices, alone, strict=True):
        assert mine.kl == pytest.approx(theirs.kl, rel=1e-4)


def test_plans_that_parted_are_computed_apart_to_the_end(pair: Pair) -> None:
    pricer = pair.pricer(random_text(LENGTHS))
    pricer.price([pair.aliasing("layers.0."), pair.aliasing("layers.0.", "layers.2.")])
    assert pricer.block_passes == 2 + 2 + 3


def test_plan_equal_to_the_reference_costs_no_pass(pair: Pair) -> None:
    pricer = pair.pricer(random_text(LENGTHS))
    (price,) = pricer.price([pair.base])
    assert (price.kl, pricer.block_passes) == (0.0, 3)


def test_reference_is_computed_once(pair: Pair) -> None:
    plans = [pair.aliasing("layers.0."), pair.aliasing("layers.")]
    pricer = pair.pricer(random_text(LENGTHS))
    first = [pricer.price([plan])[0] for plan in plans]
    assert pricer.block_passes == 3 * 3
    together = pair.pricer(random_text(LENGTHS)).price(plans)
    for mine, theirs in zip(first, together, strict=True):
        assert mine.kl == pytest.approx(theirs.kl, rel=1e-4)


def test_no_plans_cost_no_pass(pair: Pair) -> None:
    pricer = pair.pricer(random_text(LENGTHS))
    assert pricer.price([]) == []
    assert pricer.block_passes == 0


def test_head_alone_costs_no_block(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, scale=0.2, tie=False)
    pricer = pair.pricer(random_text(LENGTHS))
    (price,) = pricer.price([pair.aliasing(LM_HEAD_NAME, FINAL_NORM_NAME)])
    assert price.kl > 1e-3
    assert pricer.block_passes == 3


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Counts reads by directory and tensor."""
    reads: Counter[tuple[str, str]] = Counter()

    def counted(checkpoint: Checkpoint, name: str, *, device: torch.device) -> torch.Tensor:
        reads[checkpoint.path.name, name] += 1
        return read_tensor(checkpoint, name, device=device)

    monkeypatch.setattr(storages, "read_tensor", counted)
    return reads


@pytest.mark.parametrize("tie", [True, False])
def test_each_checkpoint_is_read_once_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tie: bool
) -> None:
    pair = make_pair(tmp_path, scale=0.2, tie=tie)
    reads = spy_on_reads(monkeypatch)
    pricer = pair.pricer(random_text(LENGTHS))
    every = list(pair.variant.tensors)
    plans: list[Rungs] = [pair.aliasing(name) for name in every]
    pricer.price(plans)
    assert reads == Counter((side, name) for side in ("donor", "variant") for name in every)
    reads.clear()
    pricer.price(plans[:2])
    assert max(reads.values()) == 1


def test_reads_are_reported_in_bytes(pair: Pair) -> None:
    nbytes: list[int] = []
    reader = pair.reader(nbytes.append)
    for layer in (None, 0, 1, 2):
        for plan in (pair.base, pair.aliasing("layers.", EMBED_NAME, FINAL_NORM_NAME)):
            reader.storages(layer, plan)
    assert sum(nbytes) == pair.donor.nbytes + pair.variant.nbytes


def test_identical_tensors_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = "model.layers.1.mlp.up_proj.weight"
    pair = make_pair(tmp_path, scale={changed: 0.2})
    reads = spy_on_reads(monkeypatch)
    everything_own: Rungs = dict.fromkeys(pair.base, Rung.OWN)
    pair.pricer(random_text(LENGTHS)).price([pair.aliasing(changed), everything_own])
    want = [("donor", name) for name in pair.variant.tensors]
    assert reads == Counter([*want, ("variant", changed)])


def clustered(
    seed: int, *, num_clusters: int = 60
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Tokens around 1.0; those of one sequence lie off by the same amount."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(20, 120, size=num_clusters)
    offsets = generator.normal(1.0, 0.3, size=num_clusters)
    clusters = np.repeat(np.arange(num_clusters), sizes)
    return offsets[clusters] + generator.normal(0.0, 0.5, size=len(clusters)), clusters


def test_upper_end_of_a_constant_is_the_constant() -> None:
    _, clusters = clustered(0)
    assert bootstrap_upper(np.full(len(clusters), 0.25), clusters) == pytest.approx(0.25, rel=1e-12)
    assert bootstrap_upper(np.zeros(len(clusters)), clusters) == 0.0


def test_upper_end_lies_above_the_mean() -> None:
    for seed in range(20):
        values, clusters = clustered(seed)
        assert bootstrap_upper(values, clusters) > values.mean()


def test_upper_end_covers_the_true_mean_at_about_its_rate() -> None:
    """One side of a 95 % interval: 97.5 %, a little less for the few clusters it is drawn from."""
    covered = [bootstrap_upper(*clustered(seed)) >= 1.0 for seed in range(400)]
    assert 0.95 <= np.mean(covered) <= 0.995


def test_upper_end_knows_that_tokens_of_a_sequence_go_together() -> None:
    values, clusters = clustered(3)
    apart = bootstrap_upper(values, np.arange(len(values)))
    assert bootstrap_upper(values, clusters) - values.mean() > 3 * (apart - values.mean())


def test_upper_end_does_not_care_for_sequences_without_tokens() -> None:
    values, clusters = clustered(3)
    assert bootstrap_upper(values, 2 * clusters + 5) == bootstrap_upper(values, clusters)


@pytest.fixture(scope="module")
def half_moved(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A variant whose embedding differs in the upper half of the tokens alone."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = {EMBED_NAME: range(256, 512)}
    return make_pair(folder, layers=1, tie=False, scale={}, rows=rows)


def two_kinds(num_upper: int, *, kinds: Sequence[str]) -> CalibrationText:
    """Sequences of 40 tokens: 20 of lower ids, then some of upper ones; 30 are responses."""
    lower = random_text([40] * 20, kinds=kinds[:1], high=256).sequences
    upper = random_text([40] * num_upper, kinds=kinds[1:], low=256, seed=1).sequences
    return assembled([*lower, *upper])


def kl_of_upper(price: Price, text: CalibrationText, num_upper: int) -> float:
    """The mean over the upper sequences; what the lower ones cost is nothing."""
    return price.kl * text.num_response_tokens / (30 * num_upper)


def test_budget_is_held_against_the_kind_that_suffers_most(half_moved: Pair) -> None:
    text = two_kinds(14, kinds=["calm", "moved"])  # 420 tokens
    plan = half_moved.aliasing(EMBED_NAME)
    (price,) = half_moved.pricer(text).price([plan])
    suffered = kl_of_upper(price, text, 14)
    assert suffered > 2 * price.kl > 0.01
    assert price.kl_upper > suffered
    (blind,) = half_moved.pricer(two_kinds(14, kinds=["talk", "talk"])).price([plan])
    assert blind.kl == price.kl
    assert price.kl < blind.kl_upper < suffered


def test_kind_of_too_few_tokens_says_nothing(half_moved: Pair) -> None:
    plan = half_moved.aliasing(EMBED_NAME)
    prices = [
        half_moved.pricer(two_kinds(13, kinds=kinds)).price([plan])[0]  # 390 tokens
        for kinds in (["calm", "moved"], ["talk", "talk"])
    ]
    assert prices[0].kl_upper == prices[1].kl_upper
    assert prices[0].kl_upper < kl_of_upper(prices[0], two_kinds(13, kinds=["a", "b"]), 13)


def test_logits_that_overflow_cost_more_than_any_budget(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Walk.logits, itertools.count()

    def overflowing(walk: Walk, stored: Storages, hidden_nH: torch.Tensor) -> torch.Tensor:
        logits = plain(walk, stored, hidden_nH)
        return logits if next(calls) % 2 == 0 else logits * float("inf")  # every planned chunk

    monkeypatch.setattr(Walk, "logits", overflowing)
    (price,) = pair.pricer(random_text(LENGTHS)).price([pair.aliasing("mlp")])
    assert price.kl_upper >= price.kl > 100
    assert math.isfinite(price.kl_upper)
    assert math.isfinite(price.ppl_ratio)
    assert price.top1 < 1


def test_few_answers_are_told_apart_by_runs_of_tokens() -> None:
    one_answer = np.zeros(128, dtype=np.int64)
    assert len(np.unique(_clusters(one_answer))) == 4
    many_answers = np.repeat(np.arange(8), 16)
    assert (_clusters(many_answers) == many_answers).all()
