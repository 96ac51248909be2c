"""The null: how often it takes noise for structure, and that it keeps what is planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.null import (
    cosine_null95,
    discoveries,
    generator,
    interval,
    judge,
    resampled,
    sign_flips,
)
from analysis.pca import cosines, pc1_shares
from analysis.selection import select
from analysis.tensors import read_tensor

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator], Floats]
NUM_RUNS, ROWS, COLUMNS = 16, 32, 64  # two rows of a 32 x 64 matrix are one run
KINDS = [(False, False), (True, False), (False, True), (True, True)]


def grouped(deltas_ND: Floats) -> Floats:
    """<Δi, Δj> of each run."""
    runs_CNd = np.stack(np.split(deltas_ND, NUM_RUNS, axis=1))
    return np.asarray(np.einsum("cid,cjd->cij", runs_CNd, runs_CNd))


def normal(rng: np.random.Generator) -> Floats:
    return rng.standard_normal((4, ROWS * COLUMNS))


def heavy_tails(rng: np.random.Generator) -> Floats:
    return rng.standard_t(2.0, (5, ROWS * COLUMNS))


def unequal_sizes(rng: np.random.Generator) -> Floats:
    return np.array([[20.0], [3.0], [1.0], [0.1]]) * normal(rng)


def low_rank(rng: np.random.Generator) -> Floats:
    left = rng.standard_normal((4, ROWS, 2))
    return np.asarray((left @ rng.standard_normal((4, 2, COLUMNS))).reshape(4, -1))


def few_rows(rng: np.random.Generator) -> Floats:
    sizes = rng.lognormal(0.0, 2.0, (ROWS, 1))  # the same rows are large in every fine-tune
    return np.asarray((sizes * rng.standard_normal((3, ROWS, COLUMNS))).reshape(3, -1))


def alike_within_runs(rng: np.random.Generator) -> Floats:
    size = ROWS * COLUMNS // NUM_RUNS
    pattern = rng.standard_normal(size)  # one pattern in all runs of all fine-tunes, signs by coin
    return np.asarray((rng.choice([-1.0, 1.0], (4, NUM_RUNS, 1)) * pattern).reshape(4, -1))


def rounded(rng: np.random.Generator) -> Floats:
    return np.round(0.4 * normal(rng))  # most weights keep their word


NOISES: list[Noise] = [
    normal, heavy_tails, unequal_sizes, low_rank, few_rows, alike_within_runs, rounded,
]  # fmt: skip


@pytest.mark.parametrize(("centred", "normalised"), KINDS)
@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
def test_null_of_noise_is_rejected_no_more_often_than_its_level(
    noise: Noise, *, centred: bool, normalised: bool
) -> None:
    num_families, num_draws, level = 400, 59, 0.05
    p_values = []
    for seed in range(num_families):
        rng = np.random.default_rng([seed, num_families])
        groups_CNN = grouped(noise(rng))
        grams_BNN = np.concatenate([
            groups_CNN.sum(axis=0)[None],
            sign_flips(groups_CNN, num_draws=num_draws, rng=rng),
        ])  # fmt: skip
        shares_B = pc1_shares(grams_BNN, centred=centred, normalised=normalised)
        p_values.append(judge(float(shares_B[0]), shares_B[1:]).p_value)

    # Four standard deviations of a binomial above the level: 0.094 of 400 families.
    bound = level + 4 * np.sqrt(level * (1 - level) / num_families)
    assert np.mean(np.array(p_values) <= level) <= bound
    assert np.mean(p_values) > 0.35  # uniform on its steps: about one half, more where ties are


@pytest.mark.parametrize(("centred", "normalised"), KINDS)
def test_null_of_a_planted_axis_is_rejected_at_the_least_p(
    *, centred: bool, normalised: bool
) -> None:
    """Fine-tunes vary along one axis, with either sign, beside twenty times its energy in noise."""
    rng = np.random.default_rng(7)
    axis_D = rng.standard_normal(64 * 1024)
    deltas_ND = np.array([[1.0], [-1.0], [0.8], [-0.7], [0.3]]) * 0.25 * axis_D
    groups_CNN = grouped(deltas_ND + rng.standard_normal(deltas_ND.shape))
    grams_BNN = sign_flips(groups_CNN, num_draws=199, rng=rng)
    ways = {"centred": centred, "normalised": normalised}

    observed = pc1_shares(groups_CNN.sum(axis=0)[None], **ways)[0]
    verdict = judge(float(observed), pc1_shares(grams_BNN, **ways))

    assert verdict.p_value == 1 / 200
    assert verdict.observed > verdict.null95


def test_null_of_one_heavy_fine_tune_is_as_high_as_its_pc1() -> None:
    rng = np.random.default_rng(3)
    groups_CNN = grouped(np.array([[12.0], [1.0], [1.0], [1.0]]) * normal(rng))

    observed = float(pc1_shares(groups_CNN.sum(axis=0)[None], centred=True, normalised=False)[0])
    draws_B = pc1_shares(
        sign_flips(groups_CNN, num_draws=199, rng=rng), centred=True, normalised=False
    )
    verdict = judge(observed, draws_B)

    assert verdict.observed > 0.97  # more than FM ever saw
    assert verdict.null95 == pytest.approx(verdict.observed, abs=0.01)
    assert verdict.p_value > 0.05


def test_null_takes_a_chance_direction_through_all_runs_for_structure() -> None:
    """What the module says that it does not cover: it holds for runs that are independent."""
    rng = np.random.default_rng(5)
    patterns = rng.standard_normal((3, 1, COLUMNS))
    groups_CNN = grouped(np.repeat(patterns, ROWS, axis=1).reshape(3, -1))
    ways = {"centred": False, "normalised": True}

    observed = float(pc1_shares(groups_CNN.sum(axis=0)[None], **ways)[0])
    verdict = judge(observed, pc1_shares(sign_flips(groups_CNN, num_draws=199, rng=rng), **ways))

    assert verdict.p_value < 0.05


def test_sign_flips_keep_norms_and_average_to_nothing_between_fine_tunes() -> None:
    groups_CNN = grouped(normal(np.random.default_rng(1)))
    num_draws = 4000

    grams_BNN = sign_flips(groups_CNN, num_draws=num_draws, rng=np.random.default_rng(2))

    gram_NN = groups_CNN.sum(axis=0)
    for draw_NN in grams_BNN[:50]:
        np.testing.assert_array_equal(np.diag(draw_NN), np.diag(gram_NN))
        np.testing.assert_array_equal(draw_NN, draw_NN.T)
    deviations_NN = np.sqrt(np.sum(groups_CNN**2, axis=0))
    off = ~np.eye(4, dtype=bool)
    means_NN = np.abs(grams_BNN.mean(axis=0))[off]
    assert (means_NN < 5 * deviations_NN[off] / np.sqrt(num_draws)).all()
    np.testing.assert_allclose(grams_BNN.std(axis=0)[off], deviations_NN[off], rtol=0.06)


def test_sign_flips_of_one_run_keep_each_product_but_for_its_sign() -> None:
    groups_CNN = grouped(normal(np.random.default_rng(1))).sum(axis=0, keepdims=True)

    grams_BNN = sign_flips(groups_CNN, num_draws=20, rng=np.random.default_rng(2))

    np.testing.assert_allclose(np.abs(grams_BNN), np.abs(np.repeat(groups_CNN, 20, axis=0)))


def test_sign_flips_of_many_fine_tunes_in_steps_are_possible_matrices() -> None:
    """So many pairs that the signs of all draws are not held at once."""
    deltas_ND = np.random.default_rng(0).standard_normal((40, NUM_RUNS * 64))

    grams_BNN = sign_flips(grouped(deltas_ND), num_draws=100, rng=np.random.default_rng(1))

    least_B = np.linalg.eigvalsh(grams_BNN)[:, 0]
    assert (least_B > -1e-9).all()  # inner products of 40 vectors, however their runs are flipped
    assert len(np.unique(grams_BNN[:, 0, 1])) > 90


def test_cosine_null95_is_exceeded_by_unrelated_deltas_one_time_in_twenty() -> None:
    over = []
    for seed in range(400):
        groups_CNN = grouped(normal(np.random.default_rng([seed, 9])))
        found_NN = cosines(groups_CNN.sum(axis=0))
        over.append((found_NN > cosine_null95(groups_CNN))[np.triu_indices(4, k=1)].mean())

    assert np.mean(over) == pytest.approx(0.05, abs=0.02)


def test_cosine_null95_of_a_zero_delta_is_zero() -> None:
    deltas_ND = normal(np.random.default_rng(0))
    deltas_ND[2] = 0.0

    bounds_NN = cosine_null95(grouped(deltas_ND))

    assert bounds_NN[2].tolist() == [0.0] * 4
    assert bounds_NN[0, 1] > 0.0


@pytest.mark.parametrize("num_runs", [1, 2, 3])
def test_cosine_null95_of_few_runs_is_no_more_than_a_cosine_can_be(num_runs: int) -> None:
    groups_CNN = np.stack([np.outer([1.0, 2.0], [1.0, 2.0])] * num_runs)

    found = cosine_null95(groups_CNN)[0, 1]

    # The standard deviation of C equal products' sum is 1/sqrt(C) of it: 1 is passed below three.
    assert found == pytest.approx(min(1.0, 1.6449 / num_runs**0.5), rel=1e-4)


def test_resampled_grams_spread_around_the_observed_one() -> None:
    groups_CNN = grouped(normal(np.random.default_rng(4)))

    grams_BNN = resampled(groups_CNN, num_draws=4000, rng=np.random.default_rng(5))

    gram_NN = groups_CNN.sum(axis=0)
    errors_NN = groups_CNN.std(axis=0) * np.sqrt(NUM_RUNS)
    assert (np.abs(grams_BNN.mean(axis=0) - gram_NN) < 5 * errors_NN / np.sqrt(4000)).all()
    np.testing.assert_allclose(grams_BNN.std(axis=0), errors_NN, rtol=0.06)


def test_interval_of_equal_runs_has_no_width() -> None:
    one_NN = grouped(normal(np.random.default_rng(4)))[0]
    grams_BNN = resampled(
        np.repeat(one_NN[None], NUM_RUNS, axis=0), num_draws=50, rng=np.random.default_rng(5)
    )

    observed, *_ = pc1_shares(one_NN[None], centred=True, normalised=False)
    low, high = interval(observed, pc1_shares(grams_BNN, centred=True, normalised=False))

    assert high - low == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("shared", "centred", "least"), [(0.5, False, 0.85), (0.5, True, 0.6), (0.0, False, 0.5)]
)
def test_interval_holds_the_true_share(shared: float, least: float, *, centred: bool) -> None:
    """Also of equal deltas without an axis of their own, where every draw is above it."""
    num_models, held = 4, 0
    true = 1 / (num_models - 1) if centred else (1 + (num_models - 1) * shared) / num_models
    for seed in range(100):
        rng = np.random.default_rng(seed)
        common_D = rng.standard_normal(ROWS * COLUMNS)
        groups_CNN = grouped(np.sqrt(shared) * common_D + np.sqrt(1 - shared) * normal(rng))
        observed, *_ = pc1_shares(groups_CNN.sum(axis=0)[None], centred=centred, normalised=False)
        draws = resampled(groups_CNN, num_draws=200, rng=rng)
        low, high = interval(observed, pc1_shares(draws, centred=centred, normalised=False))
        held += low <= true <= high

    assert held >= 100 * least


@pytest.mark.parametrize(
    ("observed", "draws", "expected"),
    [(0.01, (0.0, 0.2), (0.0, 0.015)), (0.99, (0.8, 1.0), (0.985, 1.0))],
)
def test_interval_stays_between_nothing_and_all(
    observed: float, draws: tuple[float, float], expected: tuple[float, float]
) -> None:
    found = interval(observed, np.linspace(*draws, 41))

    assert tuple(found) == pytest.approx(expected)


def test_judge_counts_the_observed_number_among_the_draws() -> None:
    draws_B = np.linspace(0.0, 0.98, 99)

    assert judge(2.0, draws_B).p_value == 1 / 100
    assert judge(-1.0, draws_B).p_value == 1.0
    assert judge(0.98, draws_B).p_value == 2 / 100  # as large counts against
    assert judge(2.0, draws_B).null95 == pytest.approx(0.931)


def test_discoveries_follow_benjamini_and_hochberg() -> None:
    # Their example of 1995, fifteen comparisons: the first four stand at 5 %.
    p_values = np.array([
        0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262,
        0.5719, 0.6528, 0.7590, 1.0000,
    ])  # fmt: skip

    assert np.flatnonzero(discoveries(p_values)).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(discoveries(p_values[::-1])).tolist() == [11, 12, 13, 14]
    assert not discoveries(np.array([0.2, 0.9])).any()
    assert len(discoveries(np.array([]))) == 0


def test_generator_depends_on_the_name_and_the_seed_alone() -> None:
    first = generator(1, "model.layers.0.mlp.up_proj.weight").random(4)

    assert (generator(1, "model.layers.0.mlp.up_proj.weight").random(4) == first).all()
    assert (generator(2, "model.layers.0.mlp.up_proj.weight").random(4) != first).all()
    assert (generator(1, "model.layers.1.mlp.up_proj.weight").random(4) != first).all()


@pytest.mark.shared
def test_null_of_real_deltas_on_shuffled_rows_and_columns_is_rejected_at_its_level(
    shared: Path,
) -> None:
    """All structure of real fine-tunes but what ties them to each other: where it lies."""
    folder, level = shared / "families" / "mini-qwen2", 0.05
    variants = {name: folder / name for name in ("instruct", "chat", "math", "code")}
    p_values = []
    with StudiedFamily.open(folder / "base", variants) as family:
        for number, name in enumerate(select(family.base)[::4]):
            base = read_tensor(family.base, name).astype(np.float64)
            deltas = [read_tensor(one, name) - base for one in family.variants.values()]
            for seed in range(4):
                rng = np.random.default_rng([seed, number])
                shuffled = [
                    delta[rng.permutation(len(delta))][:, rng.permutation(delta.shape[1])].ravel()
                    for delta in deltas
                ]
                groups_CNN = grouped(np.stack(shuffled))
                grams_BNN = sign_flips(groups_CNN, num_draws=59, rng=rng)
                for centred, normalised in KINDS:
                    ways = {"centred": centred, "normalised": normalised}
                    observed = float(pc1_shares(groups_CNN.sum(axis=0)[None], **ways)[0])
                    p_values.append(judge(observed, pc1_shares(grams_BNN, **ways)).p_value)

    # 56 shuffled tensors, each judged four ways: four standard deviations of 56 independent ones.
    assert np.mean(np.array(p_values) <= level) <= level + 4 * np.sqrt(level * (1 - level) / 56)
    assert np.mean(p_values) > 0.35
