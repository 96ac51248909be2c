from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linker_core.sharing.rungs import AnyRung, Rung
from linker_core.sharing.thresholds import CONSERVATIVE, Thresholds
from linker_core.tuning.candidates import (
    ALL_BLOCKS,
    INTERIOR,
    Candidates,
    harm_for,
)
from linker_core.tuning.sensitivity import Sensitivity
from linker_core.tuning.storages import Rungs
from linker_core.weights.keys import EMBED_NAME, FINAL_NORM_NAME
from tests.linker_core.tuning.pairs import Pair, make_pair

EVERYTHING = Thresholds(tau_cos=-1.0, tau_frob=9.0, source="explicit")
NOTHING = Thresholds(tau_cos=1.0, tau_frob=0.0, source="explicit")
LEAVES = ("q", "k", "v", "o", "gate", "up", "down")


def candidates(pair: Pair, errors: dict[str, float] | None = None) -> Candidates:
    return Candidates(
        base=pair.base,
        report=pair.report,
        donor=pair.donor,
        variant=pair.variant,
        sensitivities=[Sensitivity(name=n, error=e) for n, e in (errors or {}).items()],
    )


def layer_scales(*scales: float) -> dict[str, float]:
    """Matrices of each block move by its number, biases and norms by 0.01."""
    found: dict[str, float] = {}
    for layer, scale in enumerate(scales):
        for leaf in LEAVES:
            part = "self_attn" if len(leaf) == 1 else "mlp"
            found[f"model.layers.{layer}.{part}.{leaf}_proj.weight"] = scale
        for leaf in "qkv":
            found[f"model.layers.{layer}.self_attn.{leaf}_proj.bias"] = 0.01
        for norm in ("input", "post_attention"):
            found[f"model.layers.{layer}.{norm}_layernorm.weight"] = 0.01
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("candidates")
    return make_pair(folder, layers=4, scale=layer_scales(0.02, 0.08, 0.01, 0.04))


def aliased_layers(pair: Pair, rungs: Rungs) -> set[int]:
    """Blocks all of whose matrices alias; no other matrix of a block may."""
    layers: dict[int, set[AnyRung]] = {}
    for name, rung in rungs.items():
        if name.startswith("model.layers.") and name.endswith("proj.weight"):
            layers.setdefault(int(name.split(".")[2]), set()).add(rung)
    assert rungs.keys() == pair.variant.tensors.keys()
    assert all(len(found) == 1 for found in layers.values())
    return {layer for layer, found in layers.items() if found == {Rung.ALIAS}}


def test_block_sets_are_a_sweep_and_one_that_spares_the_ends(pair: Pair) -> None:
    half = Thresholds(tau_cos=-1.0, tau_frob=pair.report.blocks[3].epsilon, source="explicit")
    found = candidates(pair).blocks(half)
    sets = {candidate.origin: aliased_layers(pair, candidate.rungs) for candidate in found}
    epsilon = pair.report.blocks[0].epsilon
    assert sets == {
        ALL_BLOCKS: {0, 1, 2, 3},
        INTERIOR: {1, 2},
        f"blocks with ε ≤ {epsilon:.4f}": {0, 2},
        "BS Eq. 3, explicit": {0, 2, 3},
    }


def test_block_sets_alias_no_norm_no_bias_and_nothing_outside(pair: Pair) -> None:
    for candidate in candidates(pair).blocks(EVERYTHING):
        for name, rung in candidate.rungs.items():
            if not name.endswith("proj.weight"):
                assert rung is pair.base[name]
                moved = "bias" in name or "layernorm" in name
                assert rung is (Rung.OWN if moved else Rung.ALIAS), name


def test_block_sets_that_are_equal_are_one(pair: Pair) -> None:
    for thresholds, count in ((EVERYTHING, 3), (NOTHING, 3)):
        found = candidates(pair).blocks(thresholds)
        assert [c.origin for c in found[:2]] == [ALL_BLOCKS, INTERIOR]
        assert len(found) == count


@pytest.mark.parametrize(("layers", "spared"), [(1, False), (2, False), (3, True), (4, True)])
def test_ends_are_spared_by_one_candidate_wherever_there_is_an_interior(
    tmp_path: Path, layers: int, spared: bool
) -> None:
    pair = make_pair(tmp_path, layers=layers)
    found = {c.origin: c.rungs for c in candidates(pair).blocks(CONSERVATIVE)}
    assert aliased_layers(pair, found[ALL_BLOCKS]) == set(range(layers))
    assert (INTERIOR in found) == spared
    if spared:
        assert aliased_layers(pair, found[INTERIOR]) == set(range(1, layers - 1))


def test_block_sets_begin_with_all_and_with_the_interior(tmp_path: Path) -> None:
    """Whoever prices the first few prices these."""
    pair = make_pair(tmp_path, layers=3, scale=layer_scales(0.08, 0.02, 0.08))
    found = candidates(pair).blocks(CONSERVATIVE)  # half of three is the interior, too
    assert [candidate.origin for candidate in found[:2]] == [ALL_BLOCKS, INTERIOR]


Q0, UP1, DOWN2, K3 = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.3.self_attn.k_proj.weight",
)


def test_order_is_by_error_per_byte(pair: Pair) -> None:
    nbytes = {name: pair.variant.tensors[name].nbytes for name in (Q0, UP1)}
    assert nbytes[Q0] < nbytes[UP1]
    dearer = 0.9 * nbytes[UP1] / nbytes[Q0]
    assert dearer > 1  # a larger error, but less of it a byte
    order = candidates(pair, {Q0: 1.0, UP1: dearer, DOWN2: 0.0}).order
    assert [sensitivity.name for sensitivity in order] == [DOWN2, UP1, Q0]


def test_prefix_aliases_the_weights_of_least_harm(pair: Pair) -> None:
    made = candidates(pair, {Q0: 3.0, UP1: 2.0, DOWN2: 1.0})
    assert made.prefix(0).rungs == pair.base
    for length in range(4):
        candidate = made.prefix(length)
        chosen = {sensitivity.name for sensitivity in made.order[:length]}
        assert candidate.origin == f"{length} weights of least harm"
        assert candidate.rungs == {**pair.base, **dict.fromkeys(chosen, Rung.ALIAS)}


def test_harm_is_the_sum_over_what_aliases(pair: Pair) -> None:
    made = candidates(pair, {Q0: 3.0, UP1: 2.0, DOWN2: 1.0})
    assert made.harm(pair.base) == 0
    assert made.harm(pair.aliasing(Q0, DOWN2)) == 4.0
    assert made.harm(pair.aliasing("layers.0.")) == 3.0
    assert made.harm(pair.aliasing(EMBED_NAME, FINAL_NORM_NAME)) == 0


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=4))
def test_prefix_of_harm_is_the_longest_that_stays_within(pair: Pair, errors: list[float]) -> None:
    made = candidates(pair, dict(zip((Q0, UP1, DOWN2, K3), errors, strict=False)))
    harms = [made.harm(made.prefix(length).rungs) for length in range(len(errors) + 1)]
    for length, harm in enumerate(harms):
        assert made.prefix_of_harm(harm) == length
        assert made.prefix_of_harm(math.nextafter(harm, 0.0)) == max(0, length - 1)
    assert made.prefix_of_harm(math.inf) == len(errors)


def test_prefix_of_harm_takes_what_does_none_for_nothing(pair: Pair) -> None:
    assert candidates(pair, {Q0: 0.0, UP1: 0.0, DOWN2: 1.0}).prefix_of_harm(0.0) == 2


harms = st.floats(1e-8, 1e2)


@given(
    factor=st.floats(1e-4, 1e4),
    power=st.floats(1.0, 2.0),
    kl=st.floats(1e-6, 10.0),
    measured=st.lists(harms, min_size=2, max_size=5, unique_by=lambda harm: round(math.log(harm))),
)
def test_harm_for_recovers_a_power_law(
    factor: float, power: float, kl: float, measured: list[float]
) -> None:
    points = [(harm, factor * harm**power) for harm in measured]
    assert harm_for(kl, points) == pytest.approx((kl / factor) ** (1 / power), rel=1e-6)


@given(
    kl=st.floats(1e-9, 1e2),
    points=st.lists(st.tuples(harms, st.floats(1e-9, 1e2)), min_size=1, max_size=5),
)
def test_harm_for_stays_finite_and_on_the_right_side(
    kl: float, points: list[tuple[float, float]]
) -> None:
    harm = harm_for(kl, points)
    assert 0 < harm < math.inf
    nearest = min(points, key=lambda point: abs(math.log(point[1] / kl)))
    if nearest[1] > kl:
        assert harm <= nearest[0]
    if nearest[1] < kl:
        assert harm >= nearest[0]


def test_harm_for_a_single_point_assumes_that_the_kl_saturates() -> None:
    """Between what independent errors and errors of one direction would give."""
    harm = harm_for(0.01, [(2.0, 1.0)])
    assert 2.0 / 100 < harm < 2.0 / 100**0.5


def test_harm_for_a_measured_kl_is_its_harm() -> None:
    assert harm_for(0.01, [(5.0, 1.0), (0.3, 0.01)]) == 0.3
