"""What was planted is found, and what was not is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.diagnostics import Diagnostic, Kind, diagnose
from analysis.study import study_tensor
from tests.analysis.planted import Planted, Structure, plant_family
from tests.analysis.test_study import gram_of, studied

UP = "model.layers.1.mlp.up_proj.weight"


def found_in(planted: Planted, **kl_to_base: float) -> dict[str, dict[Kind, str]]:
    """Reasons by fine-tune and kind."""
    findings = diagnose(
        studied(planted, num_draws=19), names=planted.names, kl_to_base=kl_to_base or None
    )
    return by_model(findings)


def by_model(findings: list[Diagnostic]) -> dict[str, dict[Kind, str]]:
    reasons: dict[str, dict[Kind, str]] = {}
    for one in findings:
        reasons.setdefault(one.model, {})[one.kind] = one.reason
    return reasons


def test_an_ordinary_family_has_no_findings(tmp_path: Path) -> None:
    """Five fine-tunes of BS's typical size, a fifth of each along one direction."""
    planted = plant_family(tmp_path, Structure(shared=0.18, scale=0.08), dtype="bfloat16")

    assert found_in(planted) == {}


def test_a_fine_tune_lost_in_rounding_is_degenerate(tmp_path: Path) -> None:
    structure = Structure(shared=0.18, scale=0.08, scales={"two": 5e-4})
    planted = plant_family(tmp_path, structure, dtype="bfloat16")

    found = found_in(planted)

    assert list(found) == ["two"]
    assert set(found["two"]) == {Kind.DEGENERATE, Kind.NEAR_UNITY}
    assert "rounding" in found["two"][Kind.DEGENERATE]


def test_a_small_but_healthy_fine_tune_is_not_degenerate(tmp_path: Path) -> None:
    """BS's Mistral: ε 0.006, cosine 0.99998, and FM's norm far below its siblings'."""
    structure = Structure(shared=0.18, scale=0.08, scales={"two": 0.006})
    planted = plant_family(tmp_path, structure, dtype="bfloat16")

    found = found_in(planted)

    assert set(found["two"]) == {Kind.NEAR_UNITY}
    assert "No fault by itself" in found["two"][Kind.NEAR_UNITY]


def test_a_small_fine_tune_in_float32_is_not_degenerate(tmp_path: Path) -> None:
    structure = Structure(shared=0.18, scale=0.08, scales={"two": 5e-4})

    assert Kind.DEGENERATE not in found_in(plant_family(tmp_path, structure))["two"]


def test_a_fine_tune_that_changed_one_tensor_alone_is_not_degenerate(tmp_path: Path) -> None:
    structure = Structure(shared=0.0, scales={"two": 1e-6}, factors={("two", UP): 5e4})
    planted = plant_family(tmp_path, structure, dtype="bfloat16")

    assert Kind.DEGENERATE not in found_in(planted)["two"]


def test_a_copy_of_the_base_is_degenerate(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(scales={"three": 0.0}, shared=0.18))

    assert "the base's own" in found_in(planted)["three"][Kind.DEGENERATE]


def test_a_fine_tune_that_answers_like_its_base_is_degenerate(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(shared=0.18, scale=0.08))

    found = found_in(planted, one=0.004, two=0.2)

    assert list(found) == ["one"]
    assert "0.004 nats" in found["one"][Kind.DEGENERATE]


def test_a_fine_tune_far_from_the_base_is_continued_pretraining(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(shared=0.18, scale=0.08, scales={"four": 0.35}))

    found = found_in(planted)

    assert "ε 0.350" in found["four"][Kind.CONTINUED_PRETRAINING]
    assert [name for name in found if Kind.CONTINUED_PRETRAINING in found[name]] == ["four"]


def test_one_fine_tune_that_is_pc1_is_the_single_source(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(shared=0.18, scale=0.05, scales={"five": 0.24}))

    found = found_in(planted)

    assert [name for name in found if Kind.SINGLE_SOURCE in found[name]] == ["five"]
    assert "14 of 14 tensors" in found["five"][Kind.SINGLE_SOURCE]


def test_single_source_of_the_centred_pc1_alone_is_told_by_its_numbers() -> None:
    """Eight fine-tunes that agree almost entirely, one of which has something of its own."""
    rng = np.random.default_rng(0)
    names = tuple("abcdefgh")
    deltas_ND = 10 * rng.standard_normal(4096) + 0.1 * rng.standard_normal((8, 4096))
    deltas_ND[3] += 3 * rng.standard_normal(4096)
    gram = gram_of(deltas_ND, 100 * rng.standard_normal(4096))
    study = study_tensor(gram, names=names, seed=0, num_draws=19)

    reason = by_model(diagnose([study], names=names))["d"][Kind.SINGLE_SOURCE]

    assert study.pc1_centred is not None
    assert study.loadings_uncentred[3] < 0.2  # the uncentred PC1 is what all share
    assert "in 1 of them once the mean is taken off" in reason
    assert f"loading {study.loadings[3]:.2f}): there PC1 is {study.pc1_centred:.1%}" in reason


def test_two_fine_tunes_close_to_each_other_are_a_monoculture(tmp_path: Path) -> None:
    shares = {"one": 0.0, "two": 0.0, "three": 0.0, "four": 0.7, "five": 0.7}
    planted = plant_family(tmp_path, Structure(shares=shares, scale=0.08))

    found = found_in(planted)

    assert set(found) == {"four", "five"}
    assert "0.70 with five" in found["four"][Kind.MONOCULTURE]
    assert "0.70 with four" in found["five"][Kind.MONOCULTURE]


def test_fine_tunes_that_are_all_close_are_a_monoculture(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=3, shared=0.8, scale=0.08))

    found = found_in(planted)

    assert all(set(kinds) == {Kind.MONOCULTURE} for kinds in found.values())
    assert len(found) == 3


def test_a_tensor_that_moved_far_beyond_the_rest_is_an_outlier(tmp_path: Path) -> None:
    structure = Structure(shared=0.18, scale=0.02, factors={("three", UP): 9.0})
    planted = plant_family(tmp_path, structure)

    reason = found_in(planted)["three"][Kind.OUTLIER]

    assert reason.startswith("1 of 14 tensors")
    assert UP in reason
    assert "9 times" in reason


def test_a_tensor_that_moves_far_in_every_fine_tune_is_no_outlier(tmp_path: Path) -> None:
    factors = {(name, UP): 9.0 for name in Structure().names}
    planted = plant_family(tmp_path, Structure(shared=0.18, scale=0.02, factors=factors))

    assert found_in(planted) == {}


def test_an_outlier_among_two_fine_tunes_is_found_by_its_projection(tmp_path: Path) -> None:
    structure = Structure(num_variants=2, shared=0.1, scale=0.02, factors={("two", UP): 9.0})
    planted = plant_family(tmp_path, structure, layers=4)

    found = found_in(planted)

    assert [name for name in found if Kind.OUTLIER in found[name]] == ["two"]


def test_an_outlier_among_tensors_that_mostly_stay_is_judged_by_those_that_moved() -> None:
    rng = np.random.default_rng(0)
    studies = []
    for layer in range(12):
        deltas_ND = rng.standard_normal((3, 512))
        deltas_ND[1] *= layer > 5
        gram = gram_of(
            deltas_ND,
            30 * rng.standard_normal(512),
            name=f"model.layers.{layer}.mlp.up_proj.weight",
        )
        studies.append(study_tensor(gram, names=("a", "b", "c"), seed=0, num_draws=19))

    kinds = by_model(diagnose(studies, names=("a", "b", "c")))

    assert not any(Kind.OUTLIER in found for found in kinds.values())
