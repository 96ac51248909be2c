"""Makes plans: of a donor, by BS Eq. 3, of equal bytes, or of rungs that a tuner chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from linker_core.errors import InvalidRequestError
from linker_core.sharing.plan import (
    BlockCounts,
    Fingerprints,
    Policy,
    SharePlan,
    count_blocks,
    count_weights,
    plan_bytes,
    rows_bytes,
)
from linker_core.sharing.report import Region, ScanReport
from linker_core.sharing.rungs import AnyRung, Rung
from linker_core.sharing.thresholds import Thresholds, choose_thresholds
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import block_name


def plan_donor(checkpoint: Checkpoint, *, fingerprint: str) -> SharePlan:
    """Returns the plan of a family's first model: it owns everything."""
    return SharePlan(
        policy=Policy.DONOR,
        tau_cos=None,
        tau_frob=None,
        threshold_source=None,
        donor_fingerprint=None,
        variant_fingerprint=fingerprint,
        rungs=dict.fromkeys(checkpoint.tensors, Rung.OWN),
        own_rows={},
        logical_bytes=checkpoint.nbytes,
        unique_bytes=checkpoint.nbytes,
        rung_bytes={Rung.OWN.value: checkpoint.nbytes},
        num_weights=count_weights(checkpoint),
        checkpoint_bytes=checkpoint.nbytes,
        blocks=BlockCounts(alias=0, residual=0, own=checkpoint.config.num_layers),
        price=None,
        budget_kl=None,
        mean_cos=1.0,
        mean_epsilon=0.0,
        region=Region.ALIGNED,
    )


def plan_of_base(plan: SharePlan) -> SharePlan:
    """Returns what a family's first model stores once another is the donor: nothing of its own.

    Args:
        plan: Its plan of `plan_donor`.
    """
    assert plan.policy is Policy.DONOR
    return replace(
        plan,
        policy=Policy.EXACT,
        donor_fingerprint=plan.variant_fingerprint,
        rungs=dict.fromkeys(plan.rungs, Rung.ALIAS),
        unique_bytes=0,
        rung_bytes={Rung.ALIAS.value: 0},
        blocks=BlockCounts(alias=plan.blocks.total, residual=0, own=0),
    )


def plan_variant(
    report: ScanReport,
    donor: Checkpoint,
    variant: Checkpoint,
    *,
    policy: Policy,
    fingerprints: Fingerprints,
    tau_cos: float | None = None,
    tau_frob: float | None = None,
    tier: str | None = None,
) -> SharePlan:
    """Returns the plan of a variant for which its scan suffices.

    Args:
        report: Scan of the same two checkpoints.
        donor: The donor's checkpoint.
        variant: The variant's checkpoint.
        policy: THRESHOLDS or EXACT.
        fingerprints: Of both; the donor's is also looked up among the tiers' known donors.
        tau_cos: Least cosine of a shared block; only under THRESHOLDS, together with `tau_frob`.
        tau_frob: Largest ε of a shared block.
        tier: Name of a row in families.yaml; only under THRESHOLDS.

    Raises:
        InvalidRequestError: Thresholds that contradict each other or the policy.
    """
    if policy is Policy.EXACT:
        refuse_thresholds(policy, tau_cos=tau_cos, tau_frob=tau_frob, tier=tier)
        rungs = identical_rungs(report, donor, variant)
        return plan_rungs(report, donor, variant, rungs, policy=policy, fingerprints=fingerprints)
    assert policy is Policy.THRESHOLDS
    thresholds = choose_thresholds(
        report,
        tau_cos=tau_cos,
        tau_frob=tau_frob,
        tier=tier,
        donor_fingerprint=fingerprints.donor,
    )
    aliased = _above_thresholds(report, thresholds)
    rungs = {name: Rung.ALIAS if name in aliased else Rung.OWN for name in variant.tensors}
    plan = plan_rungs(report, donor, variant, rungs, policy=policy, fingerprints=fingerprints)
    return replace(
        plan,
        tau_cos=thresholds.tau_cos,
        tau_frob=thresholds.tau_frob,
        threshold_source=thresholds.source,
    )


def plan_rungs(
    report: ScanReport,
    donor: Checkpoint,
    variant: Checkpoint,
    rungs: Mapping[str, AnyRung],
    *,
    policy: Policy,
    fingerprints: Fingerprints,
) -> SharePlan:
    """Returns the plan of given rungs, not priced yet.

    Args:
        report: Scan of the same two checkpoints.
        donor: The donor's checkpoint.
        variant: The variant's checkpoint.
        rungs: One for every tensor of the variant.
        policy: Who chose them.
        fingerprints: Of both checkpoints.
    """
    assert rungs.keys() == variant.tensors.keys()
    own_rows = count_own_rows(report, variant, rungs)
    size = plan_bytes(rungs, own_rows, donor=donor, variant=variant)
    return SharePlan(
        policy=policy,
        tau_cos=None,
        tau_frob=None,
        threshold_source=None,
        donor_fingerprint=fingerprints.donor,
        variant_fingerprint=fingerprints.variant,
        rungs=dict(rungs),
        own_rows=own_rows,
        logical_bytes=size.logical_bytes,
        unique_bytes=size.unique_bytes,
        rung_bytes=size.rung_bytes,
        num_weights=count_weights(variant),
        checkpoint_bytes=variant.nbytes,
        blocks=count_blocks(rungs, variant),
        price=None,
        budget_kl=None,
        mean_cos=report.mean_cos,
        mean_epsilon=report.mean_epsilon,
        region=report.region,
    )


def identical_rungs(report: ScanReport, donor: Checkpoint, variant: Checkpoint) -> dict[str, Rung]:
    """Returns the rungs that change no bit: ALIAS or ROWS where bytes are equal, OWN elsewhere."""
    rungs = dict.fromkeys(variant.tensors, Rung.OWN)
    for block in report.blocks:
        for parameter, sums in block.params.items():
            if sums.identical:
                rungs[block_name(block.index, parameter)] = Rung.ALIAS
    for name, sums in report.outside_blocks.items():
        if sums.identical:
            rungs[name] = Rung.ALIAS
    for name, num_identical in report.identical_rows.items():
        tensor = variant.tensors[name]
        num_own = tensor.shape[0] - num_identical
        if rungs[name] is Rung.OWN and rows_bytes(tensor, num_own) < tensor.nbytes:
            rungs[name] = Rung.ROWS
    assert all(donor.tensors[name] for name, rung in rungs.items() if rung is not Rung.OWN)
    return rungs


def count_own_rows(
    report: ScanReport, variant: Checkpoint, rungs: Mapping[str, AnyRung]
) -> dict[str, int]:
    """Returns how many rows each tensor on rung ROWS has to itself."""
    return {
        name: variant.tensors[name].shape[0] - report.identical_rows[name]
        for name, rung in rungs.items()
        if rung is Rung.ROWS
    }


def refuse_thresholds(
    policy: Policy, *, tau_cos: float | None, tau_frob: float | None, tier: str | None
) -> None:
    """Refuses thresholds beside a policy that has none.

    Raises:
        InvalidRequestError: Names the first one given.
    """
    for param, value in (("tau_cos", tau_cos), ("tau_frob", tau_frob), ("tier", tier)):
        if value is not None:
            raise InvalidRequestError(f"{param} has no meaning under policy {policy}.", param=param)


def _above_thresholds(report: ScanReport, thresholds: Thresholds) -> set[str]:
    """BS Eq. 3: all K sub-parameters of each shareable block, nothing outside the blocks."""
    return {
        block_name(block.index, parameter)
        for block in report.blocks
        if thresholds.shares(block)
        for parameter in block.params
    }
