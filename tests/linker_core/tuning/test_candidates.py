from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linker_core.sharing.plan import Fingerprints, Policy
from linker_core.sharing.planner import plan_rungs
from linker_core.sharing.report import Region
from linker_core.sharing.rungs import AnyRung, Rung, parse_rung
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
Errors = Mapping[str, float]  # by rung
LEAVES = ("q", "k", "v", "o", "gate", "up", "down")


def candidates(pair: Pair, errors: Mapping[str, Errors] | None = None) -> Candidates:
    return Candidates(
        base=pair.base,
        report=pair.report,
        donor=pair.donor,
        variant=pair.variant,
        sensitivities=[
            Sensitivity(name=name, rung=parse_rung(rung), error=error)
            for name, by_rung in (errors or {}).items()
            for rung, error in by_rung.items()
        ],
    )


def unique_bytes(pair: Pair, rungs: Rungs) -> int:
    """What a plan of these rungs takes."""
    return plan_rungs(
        pair.report,
        pair.donor,
        pair.variant,
        rungs,
        policy=Policy.BUDGET,
        fingerprints=Fingerprints("donor", "variant"),
    ).unique_bytes


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


def test_chain_has_what_was_measured_at_its_exact_bytes(pair: Pair) -> None:
    errors = {Q0: {"rank4:4": 1.0, "alias": 8.0}, UP1: {"int4:64": 0.1}}
    chain = candidates(pair, errors).chain
    assert [(step.name, str(step.rung)) for step in chain.steps] == [
        (UP1, "int4:64"),
        (Q0, "rank4:4"),
        (Q0, "alias"),
    ]
    rungs = chain.rungs(3)
    assert rungs == {**pair.base, Q0: Rung.ALIAS, UP1: parse_rung("int4:64")}
    assert chain.most_saved == unique_bytes(pair, pair.base) - unique_bytes(pair, rungs)


def test_chain_without_residuals_has_aliases_alone(pair: Pair) -> None:
    errors = {Q0: {"rank4:4": 1.0, "alias": 3.0}, UP1: {"int4:64": 0.1}, K3: {"alias": 1.0}}
    steps = candidates(pair, errors).without_residuals().steps
    assert {(step.name, step.rung) for step in steps} == {(Q0, Rung.ALIAS), (K3, Rung.ALIAS)}


def test_chain_goes_on_from_rows_that_are_the_donors(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, scale=0.0, rows={EMBED_NAME: range(40, 80)})
    assert pair.base[EMBED_NAME] is Rung.ROWS
    signs = parse_rung("signs:128")
    (step,) = candidates(pair, {EMBED_NAME: {"alias": 0.5, "signs:128": 9.0}}).chain.steps
    assert (step.name, step.rung) == (EMBED_NAME, Rung.ALIAS)
    assert step.saved == unique_bytes(pair, pair.base)
    assert unique_bytes(pair, {**pair.base, EMBED_NAME: signs}) > step.saved  # so it is no offer


def test_weights_make_a_kind_of_matrices_count_more(pair: Pair) -> None:
    made = candidates(pair, {Q0: {"alias": 1.0}, K3: {"alias": 0.6}, UP1: {"alias": 1.8}})
    assert [step.name for step in made.chain.steps] == [Q0, UP1, K3]
    spared = made.weighted({"self_attn": 9.0})
    assert [step.name for step in spared.steps] == [UP1, Q0, K3]


def test_harm_is_the_sum_over_what_is_not_as_it_was(pair: Pair) -> None:
    made = candidates(
        pair, {Q0: {"alias": 3.0, "rank4:4": 0.5}, UP1: {"alias": 2.0}, DOWN2: {"alias": 1.0}}
    )
    assert made.harm(pair.base) == 0
    assert made.harm(pair.aliasing(Q0, DOWN2)) == 4.0
    assert made.harm(pair.aliasing("layers.0.")) == 3.0
    assert made.harm({**pair.base, Q0: parse_rung("rank4:4")}) == 0.5
    assert made.harm(pair.aliasing(EMBED_NAME, FINAL_NORM_NAME)) == 0


def test_outside_the_neighbourhood_nothing_aliases_but_equal_bytes(tmp_path: Path) -> None:
    far = {name: 0.6 for name in layer_scales(1, 1) if name.endswith("proj.weight")}
    pair = make_pair(tmp_path, layers=2, scale=far)
    assert pair.report.region is Region.OUTSIDE
    errors = {name: {"alias": 0.0, "rank4:4": 1.0} for name in (Q0, UP1)}
    made = candidates(pair, errors)
    assert [str(step.rung) for step in made.chain.steps] == ["rank4:4", "rank4:4"]
    assert made.may_be_chosen(made.chain.rungs(2))
    assert made.may_be_chosen(pair.base)
    assert pair.base[EMBED_NAME] is Rung.ALIAS  # which is of equal bytes
    assert not made.may_be_chosen(made.without_residuals().rungs(1) | {Q0: Rung.ALIAS})
    (whole, *_) = made.blocks(CONSERVATIVE)
    assert not made.may_be_chosen(whole.rungs)


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
