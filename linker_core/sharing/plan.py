"""What a variant stores and what it aliases, tensor by tensor, with exact bytes. Moves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Self

from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import Region, ScanReport
from linker_core.sharing.thresholds import Thresholds, choose_thresholds
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import block_name, parse_key


class Rung(StrEnum):
    """How a sub-parameter is stored, from the cheapest to the dearest."""

    ALIAS = "alias"
    RESIDUAL = "residual"
    OWN = "own"


class Policy(StrEnum):
    """How rungs are chosen. A donor holds everything itself."""

    DONOR = "donor"
    THRESHOLDS = "thresholds"
    EXACT = "exact"


class Fingerprints(NamedTuple):
    """What a pair of checkpoints is."""

    donor: str
    variant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """Blocks by rung; a block's rung is the dearest among its matrices."""

    alias: int
    residual: int
    own: int

    @property
    def total(self) -> int:
        return self.alias + self.residual + self.own

    def to_json(self) -> dict[str, int]:
        """Returns the counts and their sum."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True, kw_only=True)
class SharePlan:
    """Every rung of a variant, with the thresholds, both fingerprints and the byte totals.

    Bytes are those that are resident. logical is what a separate copy would hold, unique what only
    this variant holds, shared what it reads from the donor: logical = unique + shared.
    """

    policy: Policy
    tau_cos: float | None
    tau_frob: float | None
    threshold_source: str | None  # Thresholds.source
    donor_fingerprint: str | None
    variant_fingerprint: str
    rungs: Mapping[str, Rung]  # every stored tensor
    logical_bytes: int
    unique_bytes: int
    checkpoint_bytes: int  # what the tensors take on disk
    blocks: BlockCounts
    mean_cos: float
    mean_epsilon: float
    region: Region

    @property
    def shared_bytes(self) -> int:
        return self.logical_bytes - self.unique_bytes

    @property
    def blocks_shared(self) -> int:
        return self.blocks.alias

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values; `from_json` restores it."""
        return {
            **{field: getattr(self, field) for field in self.__dataclass_fields__},
            "rungs": {name: rung.value for name, rung in self.rungs.items()},
            "blocks": self.blocks.to_json(),
            "shared_bytes": self.shared_bytes,
            "blocks_shared": self.blocks_shared,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a plan from `to_json`."""
        stored = {field: record[field] for field in cls.__dataclass_fields__}
        counts = {rung: record["blocks"][rung] for rung in BlockCounts.__dataclass_fields__}
        return cls(
            **stored
            | {
                "policy": Policy(record["policy"]),
                "rungs": {name: Rung(rung) for name, rung in record["rungs"].items()},
                "blocks": BlockCounts(**counts),
                "region": Region(record["region"]),
            }
        )


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
        logical_bytes=checkpoint.nbytes,
        unique_bytes=checkpoint.nbytes,
        checkpoint_bytes=checkpoint.nbytes,
        blocks=BlockCounts(alias=0, residual=0, own=checkpoint.config.num_layers),
        mean_cos=1.0,
        mean_epsilon=0.0,
        region=Region.ALIGNED,
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
    """Returns the plan of a variant from its scan.

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
    thresholds = None
    if policy is Policy.THRESHOLDS:
        thresholds = choose_thresholds(
            report,
            tau_cos=tau_cos,
            tau_frob=tau_frob,
            tier=tier,
            donor_fingerprint=fingerprints.donor,
        )
        aliased = _above_thresholds(report, thresholds)
    else:
        assert policy is Policy.EXACT
        refuse_thresholds(policy, tau_cos=tau_cos, tau_frob=tau_frob, tier=tier)
        aliased = _identical(report)
    rungs = {name: Rung.ALIAS if name in aliased else Rung.OWN for name in variant.tensors}
    # An alias is resident in the donor's type, which need not be the variant's own.
    own_bytes = sum(variant.tensors[n].nbytes for n, rung in rungs.items() if rung is Rung.OWN)
    alias_bytes = sum(donor.tensors[n].nbytes for n, rung in rungs.items() if rung is Rung.ALIAS)
    return SharePlan(
        policy=policy,
        tau_cos=thresholds.tau_cos if thresholds else None,
        tau_frob=thresholds.tau_frob if thresholds else None,
        threshold_source=thresholds.source if thresholds else None,
        donor_fingerprint=fingerprints.donor,
        variant_fingerprint=fingerprints.variant,
        rungs=rungs,
        logical_bytes=own_bytes + alias_bytes,
        unique_bytes=own_bytes,
        checkpoint_bytes=variant.nbytes,
        blocks=count_blocks(rungs, variant),
        mean_cos=report.mean_cos,
        mean_epsilon=report.mean_epsilon,
        region=report.region,
    )


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


def count_blocks(rungs: Mapping[str, Rung], checkpoint: Checkpoint) -> BlockCounts:
    """Counts blocks by the dearest rung among their matrices."""
    dearest = [Rung.ALIAS] * checkpoint.config.num_layers
    order = list(Rung)
    for name, rung in rungs.items():
        key = parse_key(name)
        assert key is not None
        if key.layer is not None and len(checkpoint.tensors[name].shape) == 2:
            dearest[key.layer] = max(dearest[key.layer], rung, key=order.index)
    return BlockCounts(**{rung.value: dearest.count(rung) for rung in Rung})


def _above_thresholds(report: ScanReport, thresholds: Thresholds) -> set[str]:
    """BS Eq. 3: all K sub-parameters of each shareable block, nothing outside the blocks."""
    return {
        block_name(block.index, parameter)
        for block in report.blocks
        if thresholds.shares(block)
        for parameter in block.params
    }


def _identical(report: ScanReport) -> set[str]:
    """Tensors whose bytes are the donor's, in blocks and outside."""
    inside = {
        block_name(block.index, parameter)
        for block in report.blocks
        for parameter, sums in block.params.items()
        if sums.identical
    }
    return inside | {name for name, sums in report.outside_blocks.items() if sums.identical}
