"""Who takes a family over when its donor leaves, and what the rows say from then on.

Decides; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from linker_core.sharing.plan import SharePlan
from linker_core.sharing.planner import plan_of_base
from server.registry.records import BaseRecord, ModelRecord, ModelState, Record


def best_heir(
    dependants: Sequence[ModelRecord], *, is_resident: Callable[[str], bool]
) -> ModelRecord | None:
    """Returns the variant that is to be its family's donor, or None if none of them can be.

    A resident one before one that is not, since what it aliases stays where it is; then one that
    can be served, the one that shares most, the one that came first.
    """

    def rank(model: ModelRecord) -> tuple[bool, bool, int, int]:
        assert model.plan is not None
        failed = model.state is ModelState.FAILED
        return not is_resident(model.name), failed, -model.plan["shared_bytes"], model.position

    return min((model for model in dependants if model.plan is not None), key=rank, default=None)


def rows_after(
    donor: ModelRecord, heir: ModelRecord, dependants: Sequence[ModelRecord], *, stays: bool
) -> list[Record]:
    """Returns the rows that a family has once a variant is its donor.

    Args:
        donor: Leaves. Its checkpoint, or the one that it took over, is what plans refer to still.
        heir: One of the dependants.
        dependants: All of them.
        stays: Whether the donor is known still, as a variant that is not resident.
    """
    assert donor.plan is not None
    rows: list[Record] = []
    if donor.plan["donor_fingerprint"] is None:
        assert donor.fingerprint is not None
        rows.append(BaseRecord(fingerprint=donor.fingerprint, source=donor.source))
    for model in dependants:
        owner = None if model.name == heir.name else heir.name
        rows.append(replace(model, donor=owner, family=heir.name))
    if stays:
        plan = SharePlan.from_json(donor.plan)
        if plan.donor_fingerprint is None:
            plan = plan_of_base(plan)
        gone = replace(donor, state=ModelState.UNLOADED, donor=heir.name, family=heir.name)
        rows.append(replace(gone, plan=plan.to_json()))
    return rows
