from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.sharing.plan import Fingerprints, Policy
from linker_core.sharing.planner import plan_rungs
from linker_core.sharing.report import Region
from linker_core.sharing.rungs import AnyRung, Residual, Rung, parse_rung
from linker_core.tuning import tuner
from linker_core.tuning.candidates import ALL_BLOCKS, INTERIOR
from linker_core.tuning.least import least_bytes
from linker_core.tuning.request import TuneGoal, TuneRequest
from linker_core.tuning.result import TuneResult
from linker_core.tuning.storages import Rungs
from linker_core.tuning.tuner import UNCHANGED, tune
from linker_core.weights.keys import EMBED_NAME
from tests.linker_core.tuning.pairs import Pair, make_pair

BUDGET_KL = 0.02
UP = "model.layers.1.mlp.up_proj.weight"
Tuned = Callable[[float], TuneResult]


def request(pair: Pair, goal: TuneGoal, *, calibration: Path | None = None) -> TuneRequest:
    return TuneRequest(
        donor=str(pair.donor.path),
        variant=str(pair.variant.path),
        report=pair.report.to_json(),
        donor_fingerprint="donor",
        goal=goal,
        calibration=None if calibration is None else str(calibration),
    )


def given(rungs: Rungs) -> TuneGoal:
    return TuneGoal(rungs={name: str(rung) for name, rung in rungs.items()})


def without_seconds(result: TuneResult) -> dict[str, Any]:
    record = result.to_json()
    assert record.pop("seconds") > 0
    return record


def unique_bytes(pair: Pair, rungs: Mapping[str, AnyRung]) -> int:
    """What the server's own plan of these rungs takes."""
    return plan_rungs(
        pair.report,
        pair.donor,
        pair.variant,
        rungs,
        policy=Policy.BUDGET,
        fingerprints=Fingerprints("donor", "variant"),
    ).unique_bytes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Some matrices identical, the others moved; biases and norms too."""
    moved = make_pair(tmp_path_factory.mktemp("probe"), scale=0.01).variant.tensors
    scale = {name: 0.08 for name in moved if name not in ("model.norm.weight", EMBED_NAME, UP)}
    return make_pair(
        tmp_path_factory.mktemp("tuner"), scale=scale, rows={EMBED_NAME: range(40, 300)}
    )


@pytest.fixture(scope="module")
def tuned(pair: Pair) -> Tuned:
    return cache(lambda budget_kl: tune(request(pair, TuneGoal(budget_kl=budget_kl))))


def test_choice_is_the_cheapest_within_the_budget(pair: Pair, tuned: Tuned) -> None:
    result = tuned(BUDGET_KL)
    assert pair.report.region is not Region.OUTSIDE
    assert result.chosen.price.kl_upper <= BUDGET_KL
    within = [plan for plan in result.frontier if plan.price.kl_upper <= BUDGET_KL]
    assert result.chosen.unique_bytes == min(plan.unique_bytes for plan in within)
    beyond = [plan for plan in result.frontier if plan.price.kl_upper > BUDGET_KL]
    assert beyond  # so that the budget bound
    assert unique_bytes(pair, pair.base) > result.chosen.unique_bytes


def test_residuals_save_more_than_aliases_alone(tuned: Tuned) -> None:
    result = tuned(BUDGET_KL)
    assert result.chosen.has_residuals
    without = [plan for plan in result.frontier if not plan.has_residuals]
    assert any("without residuals" in plan.origin for plan in without)
    within = [plan for plan in without if plan.price.kl_upper <= BUDGET_KL]
    assert result.chosen.unique_bytes < min(plan.unique_bytes for plan in within)


def test_given_residuals_are_priced_and_refused_where_there_is_no_matrix(pair: Pair) -> None:
    rungs = {**pair.base, "model.layers.2.mlp.up_proj.weight": parse_rung("int2:128")}
    priced = tune(request(pair, given(rungs))).chosen
    assert priced.rungs == rungs
    assert 0 < priced.price.kl < 0.1
    norm = {**pair.base, "model.layers.2.input_layernorm.weight": parse_rung("int2:128")}
    with pytest.raises(InvalidRequestError, match="no matrix"):
        tune(request(pair, given(norm)))


def test_choice_comes_close_to_the_budget(tuned: Tuned) -> None:
    """The search ends between half of the budget and all of it."""
    assert tuned(BUDGET_KL).chosen.price.kl_upper > BUDGET_KL / 2


def test_frontier_is_priced_on_the_same_tokens_in_order_of_bytes(pair: Pair, tuned: Tuned) -> None:
    result = tuned(BUDGET_KL)
    sizes = [plan.unique_bytes for plan in result.frontier]
    assert sizes == sorted(sizes)
    assert sizes == [unique_bytes(pair, plan.rungs) for plan in result.frontier]
    assert {plan.price.tokens for plan in result.frontier} == {result.reference_tokens}
    assert {plan.price.calibration for plan in result.frontier} == {result.calibration}
    assert result.reference_tokens >= 4_600
    assert result.chosen in result.frontier
    assert {UNCHANGED, ALL_BLOCKS, INTERIOR} <= {plan.origin for plan in result.frontier}
    rungs = [plan.rungs for plan in result.frontier]
    assert all(one not in rungs[:number] for number, one in enumerate(rungs))


def test_frontier_aliases_no_norm_and_no_bias_that_differs(pair: Pair, tuned: Tuned) -> None:
    for plan in tuned(1e9).frontier:
        for name, tensor in pair.variant.tensors.items():
            if len(tensor.shape) == 1:
                assert plan.rungs[name] is pair.base[name]


def test_prices_are_those_of_the_plans_priced_alone(pair: Pair, tuned: Tuned) -> None:
    chosen = tuned(BUDGET_KL).chosen
    alone = tune(request(pair, given(chosen.rungs)))
    assert (alone.chosen.origin, alone.chosen.rungs) == ("given", chosen.rungs)
    assert alone.chosen.unique_bytes == chosen.unique_bytes
    assert alone.chosen.price.kl == pytest.approx(chosen.price.kl, rel=1e-4)
    assert alone.chosen.price.top1 == pytest.approx(chosen.price.top1, abs=1e-3)
    assert alone.forward_passes <= 2


def test_default_run_takes_at_most_eight_passes(tuned: Tuned) -> None:
    for budget_kl in (BUDGET_KL, 1e9):
        assert 2 < tuned(budget_kl).forward_passes <= 8
    assert tuned(0.0).forward_passes == 0  # equal bytes need no measuring


def test_budget_of_nothing_changes_no_bit(pair: Pair, tuned: Tuned) -> None:
    result = tuned(0.0)
    assert (result.chosen.origin, result.chosen.rungs) == (UNCHANGED, pair.base)
    assert {pair.base[name] for name in (UP, EMBED_NAME)} == {Rung.ALIAS, Rung.ROWS}
    assert (result.chosen.price.kl, result.chosen.price.kl_upper) == (0.0, 0.0)
    assert result.frontier == (result.chosen,)


def test_budget_without_bounds_aliases_every_matrix(pair: Pair, tuned: Tuned) -> None:
    result = tuned(1e9)
    for name, tensor in pair.variant.tensors.items():
        if len(tensor.shape) == 2:
            assert result.chosen.rungs[name] is Rung.ALIAS
    assert result.chosen.unique_bytes == result.frontier[0].unique_bytes


def test_second_run_says_the_same(pair: Pair, tuned: Tuned) -> None:
    again = tune(request(pair, TuneGoal(budget_kl=BUDGET_KL)))
    first = tuned(BUDGET_KL)
    assert json.dumps(without_seconds(again)) == json.dumps(without_seconds(first))


def test_result_survives_json(tuned: Tuned) -> None:
    result = tuned(BUDGET_KL)
    assert TuneResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_variant_outside_the_neighbourhood_takes_residuals_and_no_alias(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=2, scale=dict.fromkeys([*far_names()], 0.6))
    assert pair.report.region is Region.OUTSIDE
    least = len(pair.variant.tensors)  # more than nothing
    for goal in (TuneGoal(budget_kl=1e9), TuneGoal(max_bytes=unique_bytes(pair, pair.base) // 3)):
        result = tune(request(pair, goal))
        for name, rung in result.chosen.rungs.items():
            if len(pair.variant.tensors[name].shape) == 2 and pair.base[name] is Rung.OWN:
                assert rung is not Rung.ALIAS
        assert least < result.chosen.unique_bytes < unique_bytes(pair, pair.base) / 2
        assert any(plan.origin == ALL_BLOCKS for plan in result.frontier)  # to be seen


def far_names() -> list[str]:
    leaves = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    leaves += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    return [f"model.layers.{layer}.{leaf}.weight" for layer in range(2) for leaf in leaves]


def test_size_is_honoured_at_the_lowest_price(pair: Pair, tuned: Tuned) -> None:
    sizes = [plan.unique_bytes for plan in tuned(1e9).frontier]
    max_bytes = (min(sizes) + max(sizes)) // 2
    result = tune(request(pair, TuneGoal(max_bytes=max_bytes)))
    assert result.chosen.unique_bytes <= max_bytes
    fitting = [plan for plan in result.frontier if plan.unique_bytes <= max_bytes]
    assert result.chosen.price.kl == min(plan.price.kl for plan in fitting)
    assert result.chosen.rungs != pair.base
    assert result.forward_passes <= 8


def test_least_size_is_reached_and_a_smaller_one_refused(pair: Pair, tuned: Tuned) -> None:
    least = min(plan.unique_bytes for plan in tuned(1e9).frontier)
    assert tune(request(pair, TuneGoal(max_bytes=least))).chosen.unique_bytes == least
    with pytest.raises(InvalidRequestError, match=str(least)) as caught:
        tune(request(pair, TuneGoal(max_bytes=least - 1)))
    assert caught.value.param == "max_bytes"


def test_least_size_is_known_before_anything_is_measured(pair: Pair, tmp_path: Path) -> None:
    far = make_pair(tmp_path, layers=2, scale=dict.fromkeys(far_names(), 0.6))  # none may alias
    assert far.report.region is Region.OUTSIDE
    for one in (pair, far):
        least = least_bytes(one.report, one.donor, one.variant)
        with pytest.raises(InvalidRequestError, match=f"is 1, but {least} bytes"):
            tune(request(one, TuneGoal(max_bytes=1)))


def test_spread_of_plans_goes_from_the_fewest_bytes_to_many(pair: Pair, tuned: Tuned) -> None:
    result = tune(request(pair, TuneGoal(num_points=3)))
    assert (result.chosen.origin, result.chosen.rungs) == (UNCHANGED, pair.base)
    sizes = [plan.unique_bytes for plan in result.frontier]
    assert 3 <= len(set(sizes)) <= 5
    assert sizes[0] == min(plan.unique_bytes for plan in tuned(1e9).frontier)
    assert result.frontier[0].price.kl > result.frontier[-1].price.kl == 0.0
    assert result.forward_passes <= 5


def test_given_rungs_are_priced_as_they_are(pair: Pair) -> None:
    """Own rows compute what the whole tensor does."""
    rows = {**pair.aliasing("layers.2.mlp"), EMBED_NAME: Rung.ROWS}
    whole = {**rows, EMBED_NAME: Rung.OWN}
    by_rows, by_whole = (tune(request(pair, given(rungs))) for rungs in (rows, whole))
    assert (by_rows.chosen.rungs, by_whole.chosen.rungs) == (rows, whole)
    assert by_rows.chosen.price == by_whole.chosen.price
    assert by_rows.chosen.price.kl > 0
    assert by_rows.chosen.unique_bytes < by_whole.chosen.unique_bytes
    assert by_rows.chosen.unique_bytes == unique_bytes(pair, rows)


@pytest.mark.parametrize("changed", [False, True])
def test_given_rungs_that_change_no_bit_cost_nothing(pair: Pair, changed: bool) -> None:
    rungs = dict.fromkeys(pair.base, Rung.OWN) if changed else pair.base
    price = tune(request(pair, given(rungs))).chosen.price
    assert (price.kl, price.kl_upper, price.top1, price.ppl_ratio) == (0.0, 0.0, 1.0, 1.0)


def test_copy_of_the_donor_needs_no_pass(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=2, scale=0.0)
    result = tune(request(pair, TuneGoal(budget_kl=BUDGET_KL)))
    assert (result.chosen.unique_bytes, result.forward_passes) == (0, 0.0)
    assert result.frontier == (result.chosen,)


def test_variant_with_more_tokens_is_tuned(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=3, scale=0.03, added_tokens=["<|a|>"])
    result = tune(request(pair, TuneGoal(budget_kl=1e9)))
    assert isinstance(result.chosen.rungs[EMBED_NAME], Residual)  # the new row has no base to alias
    assert result.chosen.rungs[UP] is Rung.ALIAS


def test_given_file_is_priced_on(pair: Pair, tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So"}]
    }
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(row) + "\n")
    goal = given(pair.aliasing("layers.2.mlp"))
    with_file = tune(request(pair, goal, calibration=file))
    without = tune(request(pair, goal))
    assert with_file.calibration != without.calibration
    assert with_file.chosen.price.kl != without.chosen.price.kl
    file.write_text("{}")
    with pytest.raises(InvalidRequestError, match="line 1") as caught:
        tune(request(pair, goal, calibration=file))
    assert caught.value.param == "calibration"


def test_progress_rises_to_its_end(pair: Pair) -> None:
    seen: list[tuple[int, int]] = []
    tune(
        request(pair, TuneGoal(budget_kl=BUDGET_KL)),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    (total,) = {total for _, total in seen}
    assert seen[-1] == (total, total)
    assert len({done for done, _ in seen}) > 20


@pytest.mark.parametrize(
    ("goal", "param"),
    [
        (TuneGoal(), "max_bytes"),
        (TuneGoal(budget_kl=0.1, max_bytes=5), "budget_kl"),
        (TuneGoal(budget_kl=-0.1), "budget_kl"),
        (TuneGoal(budget_kl=float("nan")), "budget_kl"),
        (TuneGoal(budget_kl=float("inf")), "budget_kl"),
        (TuneGoal(max_bytes=-1), "max_bytes"),
        (TuneGoal(num_points=0), "num_points"),
        (TuneGoal(num_points=5, max_bytes=5), "budget_kl"),
    ],
)
def test_goal_that_cannot_be_aimed_at_is_refused(pair: Pair, goal: TuneGoal, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tune(request(pair, goal))
    assert caught.value.param == param


def test_request_survives_json(pair: Pair) -> None:
    for goal in (
        TuneGoal(budget_kl=0.5),
        TuneGoal(max_bytes=7),
        TuneGoal(num_points=3),
        given(pair.base),
    ):
        one = request(pair, goal)
        assert TuneRequest.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_budget_is_not_held_against_too_little_text(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "MIN_RESPONSE_TOKENS", 1 << 20)
    with pytest.raises(InvalidRequestError, match="response tokens") as caught:
        tune(request(pair, TuneGoal(budget_kl=BUDGET_KL)))
    assert caught.value.param == "calibration"
