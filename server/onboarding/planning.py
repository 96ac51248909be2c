"""From a scan and, where a policy asks for it, a tuner's result to a plan. Measures nothing.

Whoever has both checkpoints open may ask: the server's onboarding and the command line alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from linker_core.errors import BudgetExceededError, InvalidRequestError
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan, count_blocks
from linker_core.sharing.planner import identical_rungs, plan_rungs, plan_variant
from linker_core.sharing.price import Price
from linker_core.sharing.report import ScanReport
from linker_core.sharing.rungs import AnyRung, Rung
from linker_core.tuning.least import beyond_reach, least_bytes
from linker_core.tuning.request import TuneGoal
from linker_core.tuning.result import TuneResult
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import block_name
from server.onboarding.request import OnboardRequest

# Of a plan that changes no bit; nothing has to be measured.
_NOTHING: Final = Price(
    kl=0.0, kl_upper=0.0, top1=1.0, ppl_ratio=1.0, tokens=0, calibration="", matmul_precision=None,
    encoding=None,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPair:
    """A donor and a variant, open, with the scan of the two."""

    donor: Checkpoint
    variant: Checkpoint
    report: ScanReport
    fingerprints: Fingerprints


def draft_plan(request: OnboardRequest, pair: OpenPair) -> SharePlan:
    """Returns what the scan alone says: the plan, or under budget and bytes where a search begins.

    That is the cheapest plan that changes no bit.

    Raises:
        InvalidRequestError: Thresholds that contradict each other, or fewer bytes than any plan of
            the pair has: measuring for minutes would not find one.
    """
    policy = Policy(request.policy)
    if policy in (Policy.THRESHOLDS, Policy.EXACT):
        return plan_variant(
            pair.report,
            pair.donor,
            pair.variant,
            policy=policy,
            fingerprints=pair.fingerprints,
            tau_cos=request.tau_cos,
            tau_frob=request.tau_frob,
            tier=request.tier,
        )
    if request.max_bytes is not None:
        _check_reach(request.max_bytes, pair)
    rungs = identical_rungs(pair.report, pair.donor, pair.variant)
    return replace(_plan(policy, pair, rungs), price=_NOTHING)


def may_be_measured(request: OnboardRequest) -> bool:
    """Whether some pair's plan needs a tuner under this request."""
    match Policy(request.policy):
        case Policy.BYTES:
            return True
        case Policy.BUDGET:
            return request.budget_kl != 0
        case _:
            return request.budget_kl is not None


def tuning_goal(request: OnboardRequest, report: ScanReport, draft: SharePlan) -> TuneGoal | None:
    """Returns what a tuner has to find, or None if the draft is the plan.

    A draft that changes no bit costs nothing. It is the best plan if it fits the limit, under
    budget if nothing is left that a dearer rung holds or nothing may be spent, and as it stands
    under thresholds.
    """
    match Policy(request.policy):
        case Policy.BUDGET:
            shared_wholly = Rung.OWN not in draft.rungs.values()
            # Nothing but what changes no bit is sure to cost nothing.
            known = shared_wholly or request.budget_kl == 0
            return None if known else TuneGoal(budget_kl=request.budget_kl)
        case Policy.BYTES:
            assert request.max_bytes is not None
            fits = draft.unique_bytes <= request.max_bytes
            return None if fits else TuneGoal(max_bytes=request.max_bytes)
        case Policy.THRESHOLDS if request.budget_kl is not None and not _is_lossless(report, draft):
            return TuneGoal(rungs={name: str(rung) for name, rung in draft.rungs.items()})
        case _:
            return None


def untuned_plan(request: OnboardRequest, draft: SharePlan) -> SharePlan:
    """Returns the draft as the plan; if a budget was given, it costs nothing of it."""
    if request.budget_kl is None:
        return draft
    return replace(draft, price=_NOTHING, budget_kl=request.budget_kl)


def tuned_plan(request: OnboardRequest, pair: OpenPair, result: TuneResult) -> SharePlan:
    """Returns the plan that a tuner chose, or priced, with its price."""
    if request.policy == Policy.THRESHOLDS:
        plan = draft_plan(request, pair)
    else:
        plan = _plan(Policy(request.policy), pair, result.chosen.rungs)
    return replace(plan, price=result.chosen.price, budget_kl=request.budget_kl)


def check_budget(plan: SharePlan) -> None:
    """Refuses a plan whose price is beyond the budget it is held against.

    Raises:
        BudgetExceededError: It costs more.
    """
    price = plan.price
    if price is None or plan.budget_kl is None or price.kl_upper <= plan.budget_kl:
        return
    raise BudgetExceededError(
        f"The plan costs {price.kl:.4g} nats per token (up to {price.kl_upper:.4g}), more than "
        f"the budget of {plan.budget_kl:.4g}. Raise budget_kl, share less with stricter "
        "thresholds, or let policy budget choose.",
        param="budget_kl",
    )


def check_donor_size(request: OnboardRequest, plan: SharePlan) -> None:
    """Refuses a donor, which holds everything itself, that is beyond its request's size.

    Raises:
        InvalidRequestError: It holds more than `max_bytes`.
    """
    if request.max_bytes is not None and plan.unique_bytes > request.max_bytes:
        raise InvalidRequestError(
            f"No resident donor is near this model, so it would hold all of its "
            f"{plan.unique_bytes} bytes itself, more than max_bytes {request.max_bytes}. Onboard "
            "its donor first, or raise max_bytes.",
            param="max_bytes",
        )


def frontier(result: TuneResult, variant: Checkpoint) -> list[dict[str, Any]]:
    """Returns a tuner's points, with blocks by rung in place of the rung of every tensor."""
    return [
        {
            "origin": point.origin,
            "unique_bytes": point.unique_bytes,
            **point.price.to_json(),
            "blocks": count_blocks(point.rungs, variant).to_json(),
        }
        for point in result.frontier
    ]


def _check_reach(max_bytes: int, pair: OpenPair) -> None:
    """Refuses a size that no plan of a pair has.

    Raises:
        InvalidRequestError: It is below the least.
    """
    least = least_bytes(pair.report, pair.donor, pair.variant)
    if max_bytes < least:
        raise beyond_reach(max_bytes, least)


def _plan(policy: Policy, pair: OpenPair, rungs: Mapping[str, AnyRung]) -> SharePlan:
    return plan_rungs(
        pair.report,
        pair.donor,
        pair.variant,
        rungs,
        policy=policy,
        fingerprints=pair.fingerprints,
    )


def _is_lossless(report: ScanReport, plan: SharePlan) -> bool:
    """Whether all that a plan shares is byte-identical, so that it changes no answer."""
    identical = {name for name, sums in report.outside_blocks.items() if sums.identical}
    for block in report.blocks:
        for parameter, sums in block.params.items():
            if sums.identical:
                identical.add(block_name(block.index, parameter))
    return all(
        rung in (Rung.OWN, Rung.ROWS) or name in identical for name, rung in plan.rungs.items()
    )
