"""From a scan and, where a policy asks for it, a tuner's result to a plan.

Blocking: callers run what opens checkpoints in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from linker_core.errors import BadCheckpointError, BudgetExceededError
from linker_core.sharing.plan import Fingerprints, Policy, Rung, SharePlan, count_blocks
from linker_core.sharing.planner import identical_rungs, plan_donor, plan_rungs, plan_variant
from linker_core.sharing.price import Price
from linker_core.sharing.report import ScanReport
from linker_core.tuning.request import TuneGoal
from linker_core.tuning.result import TuneResult
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import block_name
from server.onboarding.catalog import ServedModel, TextSide
from server.onboarding.request import OnboardRequest
from server.registry.records import Json

# Of a plan that changes no bit; nothing has to be measured.
_NOTHING: Final = Price(kl=0.0, kl_upper=0.0, top1=1.0, ppl_ratio=1.0, tokens=0, calibration="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A validated variant with its donor and the scan of the two."""

    text: TextSide
    fingerprint: str
    donor: ServedModel
    report: Json  # ScanReport.to_json

    @property
    def fingerprints(self) -> Fingerprints:
        """Of both checkpoints."""
        return Fingerprints(self.donor.fingerprint, self.fingerprint)


def make_donor_plan(text: TextSide, fingerprint: str) -> SharePlan:
    """Returns the plan of a family's first model.

    Raises:
        BadCheckpointError: Its files were replaced.
    """
    with open_again(text) as checkpoint:
        return plan_donor(checkpoint, fingerprint=fingerprint)


def draft_plan(request: OnboardRequest, pair: Pair) -> SharePlan:
    """Returns what the scan alone says: the plan, or under budget and bytes where a search begins.

    That is the cheapest plan that changes no bit.

    Raises:
        BadCheckpointError: Files were replaced.
        InvalidRequestError: Thresholds that contradict each other.
    """
    report, policy = ScanReport.from_json(pair.report), Policy(request.policy)
    with open_again(pair.donor.text) as donor, open_again(pair.text) as variant:
        if policy in (Policy.THRESHOLDS, Policy.EXACT):
            return plan_variant(
                report,
                donor,
                variant,
                policy=policy,
                fingerprints=pair.fingerprints,
                tau_cos=request.tau_cos,
                tau_frob=request.tau_frob,
                tier=request.tier,
            )
        rungs = identical_rungs(report, donor, variant)
        draft = plan_rungs(
            report, donor, variant, rungs, policy=policy, fingerprints=pair.fingerprints
        )
    return replace(draft, price=_NOTHING)


def tuning_goal(request: OnboardRequest, pair: Pair, draft: SharePlan) -> TuneGoal | None:
    """Returns what a tuner has to find, or None if the draft is the plan.

    A draft that changes no bit costs nothing. It is the best plan if it fits the limit, under
    budget if nothing is left that a dearer rung holds, and as it stands under thresholds.
    """
    match Policy(request.policy):
        case Policy.BUDGET:
            shared_wholly = Rung.OWN not in draft.rungs.values()
            return None if shared_wholly else TuneGoal(budget_kl=request.budget_kl)
        case Policy.BYTES:
            assert request.max_bytes is not None
            fits = draft.unique_bytes <= request.max_bytes
            return None if fits else TuneGoal(max_bytes=request.max_bytes)
        case Policy.THRESHOLDS if request.budget_kl is not None and not is_lossless(pair, draft):
            return TuneGoal(rungs={name: rung.value for name, rung in draft.rungs.items()})
        case _:
            return None


def untuned_plan(request: OnboardRequest, draft: SharePlan) -> SharePlan:
    """Returns the draft as the plan; if a budget was given, it costs nothing of it."""
    if request.budget_kl is None:
        return draft
    return replace(draft, price=_NOTHING, budget_kl=request.budget_kl)


def tuned_plan(request: OnboardRequest, pair: Pair, result: TuneResult) -> SharePlan:
    """Returns the plan that a tuner chose, or priced, with its price.

    Raises:
        BadCheckpointError: Files were replaced.
        BudgetExceededError: It costs more than the request's budget.
    """
    price = result.chosen.price
    if request.budget_kl is not None and price.kl_upper > request.budget_kl:
        raise BudgetExceededError(
            f"The plan costs {price.kl:.4g} nats per token (up to {price.kl_upper:.4g}), more than "
            f"the budget of {request.budget_kl:.4g}. Raise budget_kl, share less with stricter "
            "thresholds, or let policy budget choose.",
            param="budget_kl",
        )
    if request.policy == Policy.THRESHOLDS:
        return replace(draft_plan(request, pair), price=price, budget_kl=request.budget_kl)
    with open_again(pair.donor.text) as donor, open_again(pair.text) as variant:
        plan = plan_rungs(
            ScanReport.from_json(pair.report),
            donor,
            variant,
            result.chosen.rungs,
            policy=Policy(request.policy),
            fingerprints=pair.fingerprints,
        )
    return replace(plan, price=price, budget_kl=request.budget_kl)


def is_lossless(pair: Pair, plan: SharePlan) -> bool:
    """Whether all that a plan shares is byte-identical, so that it changes no answer."""
    report = ScanReport.from_json(pair.report)
    identical = {name for name, sums in report.outside_blocks.items() if sums.identical}
    for block in report.blocks:
        for parameter, sums in block.params.items():
            if sums.identical:
                identical.add(block_name(block.index, parameter))
    return all(
        rung in (Rung.OWN, Rung.ROWS) or name in identical for name, rung in plan.rungs.items()
    )


def frontier(result: TuneResult, text: TextSide) -> list[dict[str, Any]]:
    """Returns a tuner's points, each with its blocks by rung in place of the rung of every tensor.

    Raises:
        BadCheckpointError: The variant's files were replaced.
    """
    with open_again(text) as variant:
        return [
            {
                "origin": point.origin,
                "unique_bytes": point.unique_bytes,
                **point.price.to_json(),
                "blocks": count_blocks(point.rungs, variant).to_json(),
            }
            for point in result.frontier
        ]


@contextmanager
def open_again(text: TextSide) -> Iterator[Checkpoint]:
    """Opens a checkpoint that was validated before, if its files are still the same.

    Raises:
        BadCheckpointError: They are not.
    """
    with Checkpoint.open(text.path) as checkpoint:
        if checkpoint.identity != text.identity:
            raise files_changed()
        yield checkpoint


def files_changed() -> BadCheckpointError:
    """Returns the error that says that what was read is not what was validated."""
    return BadCheckpointError(
        "A file of the model or of its donor changed while it was being read. "
        "Restore the files and retry."
    )
