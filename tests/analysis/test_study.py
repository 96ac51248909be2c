"""What is planted into checkpoints comes back out of a study of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.gram import TensorGram, gram_pass
from analysis.null import discoveries
from analysis.pca import pc1_shares, spectrum
from analysis.record import TensorStudy
from analysis.selection import select
from analysis.study import study_tensor
from linker_core.weights.checkpoint import Checkpoint
from tests.analysis.planted import NAMES, Planted, Structure, plant_family

ENOUGH_RUNS = 15  # of few runs, the coin repeats the observed signs too often
UP = "model.layers.0.mlp.up_proj.weight"


def studied(planted: Planted, *, seed: int = 0, num_draws: int = 199) -> list[TensorStudy]:
    """Studies of all tensors that FM looks at."""
    with planted.open() as family:
        return [
            study_tensor(gram, names=planted.names, seed=seed, num_draws=num_draws)
            for gram in gram_pass(family, select(family.base))
        ]


def gram_of(
    deltas_ND: NDArray[np.float64], base_D: NDArray[np.float64], *, name: str = UP, runs: int = 8
) -> TensorGram:
    """The record of deltas that no checkpoint holds."""
    runs_CNd = np.stack(np.split(deltas_ND, runs, axis=1))
    return TensorGram(
        name=name,
        shape=(deltas_ND.shape[1],),
        base_square=float(base_D @ base_D),
        base_dots_N=deltas_ND @ base_D,
        groups_CNN=np.einsum("cid,cjd->cij", runs_CNd, runs_CNd),
        dtypes=("F32",) * (1 + len(deltas_ND)),
    )


def test_study_of_a_family_half_along_one_direction_finds_its_share(small_family: Planted) -> None:
    studies = studied(small_family)

    assert len(studies) == 14
    for study in studies:
        # Equal norms, pairwise cosine 1/2: (1 + 4 · 1/2) / 5; centred, only what is their own.
        assert study.pc1 == pytest.approx(0.6, abs=1e-4)
        assert study.pc1_centred == pytest.approx(0.25, abs=1e-3)
        assert study.cos_mean == pytest.approx(0.5, abs=1e-4)
        assert study.snr == pytest.approx(np.sqrt((0.5 + 0.5 / 5) / (0.5 * 4 / 5)), abs=1e-3)
        assert study.p_value == 1 / 200
        assert study.null95 is not None
        assert study.null95 < 0.6
        assert study.interval is not None
        assert study.interval[0] < 0.6 < study.interval[1]
        assert study.single_source is None
        assert study.epsilons == pytest.approx([0.05] * 5, rel=1e-3)


def test_study_of_axis_of_unequal_reach_finds_the_centred_share(tmp_path: Path) -> None:
    shares = {"one": 0.9, "two": 0.9, "three": 0.0, "four": 0.0, "five": 0.0}
    planted = plant_family(tmp_path, Structure(shares=shares), layers=1)

    for study in studied(planted):
        expected = spectrum(planted.grams_NN[study.name], centred=True, normalised=False)
        assert study.pc1_centred == pytest.approx(expected.pc1, abs=1e-4)
        assert study.loadings == pytest.approx(expected.loadings.tolist(), abs=1e-3)
        if study.num_runs >= ENOUGH_RUNS:
            assert study.p_value_centred == 1 / 200


def test_study_of_noise_is_significant_in_few_tensors(tmp_path: Path) -> None:
    """Random directions of unequal length, through files and the pass over them."""
    structure = Structure(
        num_variants=4, shared=0.0, scales={"one": 0.4, "two": 0.1}, orthogonal=False
    )
    planted = plant_family(tmp_path, structure, layers=6)

    studies = studied(planted)

    for field in ("p_value", "p_value_centred", "p_value_normalised", "p_value_normalised_centred"):
        p_values = np.array([getattr(study, field) for study in studies])
        # 42 tensors: more than six at 5 % happen less than once in a hundred families.
        assert np.count_nonzero(p_values <= 0.05) <= 6
        assert not discoveries(p_values).any()
    assert all(study.pc1_centred is not None and study.pc1_centred > 0.8 for study in studies)


def test_study_with_one_heavy_fine_tune_names_it_as_the_single_source(tmp_path: Path) -> None:
    structure = Structure(shared=0.1, scales={"four": 0.9})
    planted = plant_family(tmp_path, structure, layers=1)

    for study in studied(planted):
        assert study.single_source == "four"
        assert study.loadings_uncentred[3] > 0.99
        assert study.loadings[3] == pytest.approx(0.8, abs=0.01)  # centred it cannot exceed 4/5


def test_study_of_two_has_the_shared_fraction_and_no_pc1(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=2, shared=0.65), layers=1)

    for study in studied(planted):
        assert study.shared_fraction == pytest.approx(0.65**2, abs=1e-3)
        if study.num_runs >= ENOUGH_RUNS:
            assert study.shared_p_value == 1 / 200
            assert study.shared_null95 is not None
            assert study.shared_null95 < 0.3
        assert (study.pc1, study.pc1_centred, study.null95, study.interval) == (None,) * 4
        assert study.loadings == study.loo_cosines == ()


def test_study_of_one_has_norms_and_base_cosines_only(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=1), layers=1)

    for study in studied(planted):
        assert study.epsilons == pytest.approx([0.05], rel=1e-3)
        assert study.base_cosines[0] == pytest.approx(1 - 0.05**2 / 2, abs=2e-3)
        assert study.pc1 is study.shared_fraction is study.cos_mean is study.snr is None


def test_study_of_three_has_no_centred_jackknife(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=3), layers=1)

    study = studied(planted)[0]

    assert study.loo_cosines == ()
    assert len(study.loo_cosines_uncentred) == 3
    assert study.pc1_centred == pytest.approx(0.5, abs=1e-3)


def test_study_measures_each_fine_tune_against_the_base() -> None:
    rng = np.random.default_rng(0)
    base_D = rng.standard_normal(2048)
    deltas_ND = np.array([0.5 * base_D, rng.standard_normal(2048), np.zeros(2048), -base_D])

    study = study_tensor(gram_of(deltas_ND, base_D), names=("a", "b", "c", "d"), seed=0)

    moved_D = base_D + deltas_ND[1]
    cosine = base_D @ moved_D / np.linalg.norm(base_D) / np.linalg.norm(moved_D)
    assert study.base_cosines == pytest.approx((1.0, cosine, 1.0, 0.0))  # d is zero itself
    assert study.epsilons[0] == pytest.approx(0.5)
    assert study.epsilons[2:] == pytest.approx((0.0, 1.0))
    assert study.component == "up"
    assert study.layer == 0


def test_study_of_a_zero_base_has_an_epsilon_of_one_where_a_fine_tune_moved() -> None:
    deltas_ND = np.random.default_rng(0).standard_normal((3, 64))
    deltas_ND[1] = 0.0

    study = study_tensor(gram_of(deltas_ND, np.zeros(64)), names=("a", "b", "c"), seed=0)

    assert study.epsilons == (1.0, 0.0, 1.0)
    assert study.base_cosines == (0.0, 1.0, 0.0)


def test_study_of_copies_of_the_base_has_no_pc1() -> None:
    study = study_tensor(gram_of(np.zeros((3, 64)), np.ones(64)), names=("a", "b", "c"), seed=0)

    assert study.pc1 is study.pc1_centred is study.null95 is study.p_value is None
    assert study.single_source is None
    assert study.effective_rank == 0.0
    assert study.snr == study.cos_mean == 0.0


def test_study_of_many_fine_tunes_draws_a_few_matrices_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    deltas_ND = rng.standard_normal(2048) + 3 * rng.standard_normal((6, 2048))
    gram = gram_of(deltas_ND, rng.standard_normal(2048), runs=16)
    at_once = study_tensor(gram, names=NAMES[:6], seed=0, num_draws=199)
    drawn: list[int] = []
    rests: list[int] = []  # how many matrices had been judged

    def counted(grams_BNN: NDArray[np.float64], **ways: bool) -> NDArray[np.float64]:
        drawn.append(len(grams_BNN))
        return pc1_shares(grams_BNN, **ways)

    monkeypatch.setattr("analysis.study.pc1_shares", counted)
    monkeypatch.setattr("analysis.study._MAX_ENTRIES", 36 * 50)
    in_batches = study_tensor(
        gram, names=NAMES[:6], seed=0, num_draws=199, rest=lambda: rests.append(sum(drawn))
    )

    # Four kinds of PC1, under the null and by bootstrap.
    counts = (48, 48, 48, 48, 7) * 2
    assert drawn == [count for count in counts for _kind in range(4)]
    # After each batch, and each jackknife.
    assert rests == [*np.cumsum(counts) * 4, 1592, 1592]
    assert in_batches.pc1 == at_once.pc1
    assert in_batches.null95 == pytest.approx(at_once.null95, rel=1e-9)
    assert in_batches.interval == pytest.approx(at_once.interval, rel=1e-9)
    assert in_batches.p_value == at_once.p_value == 1 / 200


def test_study_restored_from_json_is_equal(small_family: Planted) -> None:
    for study in studied(small_family, num_draws=19)[:2]:
        text = json.dumps(study.to_json(), allow_nan=False)
        assert TensorStudy.from_json(json.loads(text)) == study


def test_study_depends_on_its_seed_and_on_no_other_tensor(small_family: Planted) -> None:
    everything = studied(small_family, num_draws=49)
    with small_family.open() as family:
        (gram,) = gram_pass(family, [everything[-1].name])

    alone = study_tensor(gram, names=small_family.names, seed=0, num_draws=49)
    other = study_tensor(gram, names=small_family.names, seed=1, num_draws=49)

    assert alone == everything[-1]
    assert other.pc1 == alone.pc1
    assert other.null95 != alone.null95


def test_study_of_the_planted_family_is_of_stored_weights(small_family: Planted) -> None:
    with Checkpoint.open(small_family.base) as base:
        names = select(base)

    assert [study.name for study in studied(small_family, num_draws=19)] == list(names)
