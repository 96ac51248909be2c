"""Bounds that hold what they say they hold, and a scan that reads on where they do not decide."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.sharing.report import ScanReport
from linker_core.sharing.sampled_scan import sampled_scan
from linker_core.sharing.sampling import (
    RowSums,
    draw_strata,
    estimate,
    mean_bounds,
    student_quantile,
)
from linker_core.sharing.scan import scan
from linker_core.sharing.thresholds import Thresholds, choose_thresholds
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant

Reals = npt.NDArray[np.float64]
ROWS, COLUMNS = 1200, 24


def even(generator: np.random.Generator) -> Reals:
    return 0.03 * generator.standard_normal((ROWS, COLUMNS))


def growing(generator: np.random.Generator) -> Reals:
    return even(generator) * np.linspace(0.01, 3.0, ROWS)[:, None]


def skewed(generator: np.random.Generator) -> Reals:
    return even(generator) * np.exp(0.5 * generator.standard_normal((ROWS, 1)))


def few_rows_far(generator: np.random.Generator) -> Reals:
    return even(generator) * np.where(generator.random((ROWS, 1)) < 0.05, 5.0, 1.0)


def alternating(generator: np.random.Generator) -> Reals:
    return even(generator) * np.where(np.arange(ROWS) % 2, 0.1, 2.0)[:, None]


def low_rank(generator: np.random.Generator) -> Reals:
    return 0.02 * generator.standard_normal((ROWS, 1)) @ generator.standard_normal((1, COLUMNS))


def row_sums(a: Reals, b: Reals) -> Reals:
    products = (a * b, a * a, b * b, (b - a) ** 2)
    return np.stack([product.sum(axis=1) for product in products], axis=1)


@pytest.mark.parametrize("delta", [even, growing, skewed, few_rows_far, alternating, low_rank])
def test_bounds_hold_the_truth_as_often_as_they_say(
    delta: Callable[[np.random.Generator], Reals],
) -> None:
    trials, cos_held, epsilon_held = 300, 0, 0
    for seed in range(trials):
        generator = np.random.default_rng(seed)
        a = generator.standard_normal((ROWS, COLUMNS))
        sums = row_sums(a, a + delta(generator))
        dot, aa, bb, dd = sums.sum(axis=0)
        strata = draw_strata(ROWS, 0.01, random.Random(seed))
        assert strata is not None
        rows = [RowSums(*sums[row].tolist()) for stratum in strata for row in stratum.rows]
        bounds = mean_bounds([[estimate(strata, rows, count=a.size)]], level=0.99)
        cos_held += bounds.cos.low <= dot / np.sqrt(aa * bb) <= bounds.cos.high
        epsilon_held += bounds.epsilon.low <= np.sqrt(dd / aa) <= bounds.epsilon.high
    assert min(cos_held, epsilon_held) >= 0.98 * trials  # 0.99, and the luck of 300 trials


def test_estimates_are_right_on_average() -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((ROWS, COLUMNS))
    sums = row_sums(a, a + growing(generator))
    found = []
    for seed in range(200):
        strata = draw_strata(ROWS, 0.01, random.Random(seed))
        assert strata is not None
        rows = [RowSums(*sums[row].tolist()) for stratum in strata for row in stratum.rows]
        found.append(estimate(strata, rows, count=a.size).sums.delta_square)
    assert np.mean(found) == pytest.approx(sums[:, 3].sum(), rel=0.02)


def test_strata_cover_all_rows_and_draw_two_of_each() -> None:
    strata = draw_strata(10_007, 0.05, random.Random(3))
    assert strata is not None
    begin = 0
    for stratum in strata:
        assert len(set(stratum.rows)) == 2
        assert all(begin <= row < begin + stratum.num_rows for row in stratum.rows)
        begin += stratum.num_rows
    assert begin == 10_007
    assert 0.05 <= 2 * len(strata) / 10_007 < 0.051
    assert draw_strata(10_007, 0.05, random.Random(3)) == strata
    assert draw_strata(255, 0.01, random.Random(3)) is None


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [(0.99, 1, 63.657), (0.99, 2, 9.925), (0.95, 3, 3.182), (0.99, 10, 3.169), (0.9, 30, 1.697)],
)
def test_student_quantiles_are_those_of_the_tables(
    level: float, freedom: int, quantile: float
) -> None:
    assert student_quantile(level, freedom) == pytest.approx(quantile, abs=6e-4)


BIG = {"hidden": 64, "intermediate": 640, "layers": 3, "vocab_size": 600}
CHOSEN = Thresholds(tau_cos=0.99, tau_frob=0.05, source="explicit")


def sampled(
    donor: Path, variant: Path, *, seed: int = 0, chosen: Thresholds = CHOSEN
) -> ScanReport:
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        return sampled_scan(
            a, b, fraction=0.01, rng=random.Random(seed), choose=lambda _report: chosen
        )


def scanned(donor: Path, variant: Path) -> ScanReport:
    with Checkpoint.open(donor) as a, Checkpoint.open(variant) as b:
        return scan(a, b)


def test_clear_blocks_are_decided_without_reading_them_whole(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", **BIG)  # type: ignore[arg-type]
    report = sampled(donor, make_variant(tmp_path / "v", donor, scale=0.02))
    truth = scanned(donor, tmp_path / "v")
    assert report.bytes_read < 0.6 * truth.bytes_read
    assert report.sample is not None
    assert report.sample.whole_blocks == ()
    for block, true in zip(report.blocks, truth.blocks, strict=True):
        assert block.bounds is not None
        assert block.bounds.epsilon.low <= true.epsilon <= block.bounds.epsilon.high
        assert block.bounds.cos.low <= true.cos <= block.bounds.cos.high
        assert CHOSEN.shares(block) is CHOSEN.shares(true) is True
        assert not block.params["mlp.up_proj.weight"].identical
    assert ScanReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_block_at_a_threshold_is_read_whole_and_decided_exactly(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", **BIG)  # type: ignore[arg-type]
    scale = {
        name: 0.06 if ".1." in name else 0.02
        for name in load_file(donor / "model.safetensors")
        if "layers" in name
    }
    truth = scanned(donor, make_variant(tmp_path / "v", donor, scale=scale))
    exact = Thresholds(tau_cos=0.9, tau_frob=truth.blocks[1].epsilon, source="explicit")
    report = sampled(donor, tmp_path / "v", chosen=exact)
    assert report.sample is not None
    assert report.sample.whole_blocks == (1,)
    assert report.blocks[1] == truth.blocks[1]
    assert [exact.shares(block) for block in report.blocks] == [True, True, True]
    below = Thresholds(tau_cos=0.9, tau_frob=exact.tau_frob * (1 - 1e-12), source="explicit")
    report = sampled(donor, tmp_path / "v", chosen=below)
    assert [below.shares(block) for block in report.blocks] == [True, False, True]


def test_mean_at_the_boundary_rule_reads_everything(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", **BIG)  # type: ignore[arg-type]
    truth = scanned(donor, make_variant(tmp_path / "v", donor, scale=0.1))
    assert abs(truth.mean_epsilon - 0.1) < 1e-3  # as near as bfloat16 lets it
    report = sampled(donor, tmp_path / "v")
    assert report.blocks == truth.blocks
    assert report.region is truth.region
    thresholds = choose_thresholds(report)
    assert thresholds == choose_thresholds(truth)


def test_sample_with_unchanged_rows_reads_that_tensor_whole(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", **BIG)  # type: ignore[arg-type]
    variant = make_variant(tmp_path / "v", donor, scale=0.0)
    state = load_file(variant / "model.safetensors")
    hidden_row = state["model.layers.0.mlp.up_proj.weight"][311]
    hidden_row *= 40.0  # all of the change sits where most samples do not look
    save_file(state, variant / "model.safetensors")
    report, truth = sampled(donor, variant), scanned(donor, variant)
    assert report.blocks == truth.blocks
    assert not CHOSEN.shares(report.blocks[0])


def test_open_block_is_never_decided(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", **BIG)  # type: ignore[arg-type]
    report = sampled(donor, make_variant(tmp_path / "v", donor, scale=0.02))
    at = Thresholds(tau_cos=0.9, tau_frob=report.blocks[0].epsilon, source="explicit")
    assert at.decide(report.blocks[0]) is None
    with pytest.raises(InvalidRequestError, match="cannot tell"):
        at.shares(report.blocks[0])


def test_nonfinite_value_in_what_is_read_is_refused(tmp_path: Path) -> None:
    donor = make_checkpoint(tmp_path / "d", **BIG)  # type: ignore[arg-type]
    variant = make_variant(tmp_path / "v", donor, scale=0.02)
    state = load_file(variant / "model.safetensors")
    state["model.layers.0.input_layernorm.weight"][3] = torch.nan
    save_file(state, variant / "model.safetensors")
    with pytest.raises(BadCheckpointError, match="NaN"):
        sampled(donor, variant)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range_is_refused(tmp_path: Path, fraction: float) -> None:
    donor = make_checkpoint(tmp_path / "d")
    with (
        Checkpoint.open(donor) as a,
        pytest.raises(InvalidRequestError) as caught,
    ):
        sampled_scan(a, a, fraction=fraction, rng=random.Random(0), choose=lambda _report: CHOSEN)
    assert caught.value.param == "sample"
