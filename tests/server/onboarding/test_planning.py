"""Which plans need a tuner, and what its result makes of them: by hand, on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import BudgetExceededError, InvalidRequestError
from linker_core.sharing.plan import Fingerprints, Policy
from linker_core.sharing.planner import plan_donor
from linker_core.sharing.price import Price
from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.tuning.least import least_bytes
from linker_core.tuning.request import TuneGoal
from linker_core.tuning.result import PricedPlan, TuneResult
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME
from server.onboarding.planning import (
    OpenPair,
    check_budget,
    check_donor_size,
    draft_plan,
    frontier,
    tuned_plan,
    tuning_goal,
    untuned_plan,
)
from server.onboarding.request import OnboardRequest
from tests.tiny import make_checkpoint, make_variant

UP = "model.layers.1.mlp.up_proj.weight"


def asked(**options: Any) -> OnboardRequest:
    return OnboardRequest(name="v", source="/v", **options)


BUDGET = asked(policy="budget", budget_kl=0.01)
STRICT = asked(policy="thresholds", tau_cos=0.99, tau_frob=0.05, budget_kl=0.01)


@contextmanager
def opened(root: Path, variant: str) -> Iterator[OpenPair]:
    with Checkpoint.open(root / "base") as donor, Checkpoint.open(root / variant) as other:
        yield OpenPair(
            donor=donor,
            variant=other,
            report=scan(donor, other),
            fingerprints=Fingerprints("d", "v"),
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    base = make_checkpoint(root / "base")
    make_variant(root / "same", base, scale={})
    make_variant(root / "one", base, scale={UP: 0.9})
    make_variant(root / "near", base, scale=0.01)
    return root


@pytest.fixture
def near(root: Path) -> Iterator[OpenPair]:
    with opened(root, "near") as pair:
        yield pair


def goal(request: OnboardRequest, pair: OpenPair) -> TuneGoal | None:
    return tuning_goal(request, pair.report, draft_plan(request, pair))


def test_budget_is_tuned_for_unless_every_byte_is_the_donors(root: Path, near: OpenPair) -> None:
    assert goal(BUDGET, near) == TuneGoal(budget_kl=0.01)
    with opened(root, "same") as same:
        assert goal(BUDGET, same) is None


def test_budget_of_nothing_is_what_changes_no_bit(near: OpenPair) -> None:
    nothing = asked(policy="budget", budget_kl=0.0)
    assert goal(nothing, near) is None
    plan = untuned_plan(nothing, draft_plan(nothing, near))
    assert Rung.ALIAS not in plan.rungs.values()
    assert plan.price is not None
    assert (plan.price.kl_upper, plan.budget_kl) == (0.0, 0.0)


def test_donor_beyond_its_size_is_refused_with_both_numbers(near: OpenPair) -> None:
    plan = plan_donor(near.donor, fingerprint="d")
    size = plan.unique_bytes
    check_donor_size(asked(policy="bytes", max_bytes=size), plan)
    check_donor_size(BUDGET, plan)
    with pytest.raises(InvalidRequestError, match=f"{size} bytes.*max_bytes {size - 1}") as caught:
        check_donor_size(asked(policy="bytes", max_bytes=size - 1), plan)
    assert caught.value.param == "max_bytes"


def test_size_is_tuned_for_unless_the_exact_plan_fits_it(root: Path) -> None:
    with opened(root, "one") as pair:
        size = pair.variant.tensors[UP].nbytes
        assert goal(asked(policy="bytes", max_bytes=size), pair) is None
        assert goal(asked(policy="bytes", max_bytes=size - 1), pair) == TuneGoal(max_bytes=size - 1)


def test_size_below_the_least_is_refused_before_anything_is_measured(near: OpenPair) -> None:
    least = least_bytes(near.report, near.donor, near.variant)
    assert 0 < least < near.variant.nbytes
    draft_plan(asked(policy="bytes", max_bytes=least), near)
    with pytest.raises(InvalidRequestError, match=f"is {least - 1}, but {least} bytes") as caught:
        draft_plan(asked(policy="bytes", max_bytes=least - 1), near)
    assert caught.value.param == "max_bytes"


def test_thresholds_are_priced_with_a_budget_alone(near: OpenPair) -> None:
    unpriced = asked(policy="thresholds", tau_cos=0.99, tau_frob=0.05)
    assert goal(unpriced, near) is None
    wanted = goal(STRICT, near)
    assert wanted is not None
    assert wanted.rungs == draft_plan(unpriced, near).rungs


def test_thresholds_that_share_only_equal_bytes_cost_nothing(root: Path) -> None:
    with opened(root, "one") as pair:
        draft = draft_plan(STRICT, pair)
        assert (draft.rungs[UP], draft.blocks.alias) == (Rung.OWN, 1)
        assert tuning_goal(STRICT, pair.report, draft) is None
        plan = untuned_plan(STRICT, draft)
    assert plan.price is not None
    assert (plan.price.kl, plan.price.kl_upper, plan.price.top1) == (0.0, 0.0, 1.0)
    assert plan.budget_kl == 0.01


def test_exact_is_never_tuned_and_carries_no_budget(near: OpenPair) -> None:
    request = asked(policy="exact")
    draft = draft_plan(request, near)
    assert tuning_goal(request, near.report, draft) is None
    assert untuned_plan(request, draft).budget_kl is None


def result(pair: OpenPair, *, kl_upper: float) -> TuneResult:
    """A tuner's choice: the embedding is the variant's own, the rest is aliased."""
    rungs = dict.fromkeys(pair.variant.tensors, Rung.ALIAS) | {EMBED_NAME: Rung.OWN}
    price = Price(
        kl=0.005, kl_upper=kl_upper, top1=0.99, ppl_ratio=1.01, tokens=4000, calibration="t",
        matmul_precision="highest", encoding=1,
    )  # fmt: skip
    size = pair.variant.tensors[EMBED_NAME].nbytes
    sizes = {"alias": 0, "own": size}
    chosen = PricedPlan(origin="all blocks", rungs=rungs, rung_bytes=sizes, price=price)
    return TuneResult(
        chosen=chosen, frontier=(chosen,), reference_tokens=4000, calibration="t",
        forward_passes=2.0, seconds=1.0,
    )  # fmt: skip


def test_tuned_plan_has_the_chosen_rungs_their_bytes_and_their_price(near: OpenPair) -> None:
    tuned = result(near, kl_upper=0.01)  # at the budget is within it
    plan = tuned_plan(BUDGET, near, tuned)
    assert plan.policy is Policy.BUDGET
    assert (plan.rungs, plan.unique_bytes) == (tuned.chosen.rungs, tuned.chosen.unique_bytes)
    assert (plan.price, plan.budget_kl) == (tuned.chosen.price, 0.01)
    check_budget(plan)


@pytest.mark.parametrize("request_", [BUDGET, STRICT], ids=["budget", "thresholds"])
def test_price_beyond_the_budget_is_refused_with_both_and_a_remedy(
    near: OpenPair, request_: OnboardRequest
) -> None:
    with pytest.raises(BudgetExceededError) as caught:
        check_budget(tuned_plan(request_, near, result(near, kl_upper=0.0101)))
    assert caught.value.param == "budget_kl"
    for part in ("0.005", "0.0101", "budget of 0.01", "Raise budget_kl"):
        assert part in caught.value.message


def test_priced_thresholds_keep_their_thresholds(near: OpenPair) -> None:
    plan = tuned_plan(STRICT, near, result(near, kl_upper=0.01))
    assert (plan.tau_cos, plan.tau_frob, plan.policy) == (0.99, 0.05, Policy.THRESHOLDS)
    assert plan.price is not None


def test_frontier_counts_blocks_in_place_of_rungs(near: OpenPair) -> None:
    [point] = frontier(result(near, kl_upper=0.01), near.variant)
    assert point["blocks"] == {"alias": 2, "residual": 0, "own": 0, "total": 2}
    assert (point["kl_upper"], point["origin"]) == (0.01, "all blocks")
    assert "rungs" not in point
