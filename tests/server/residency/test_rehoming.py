"""Whom a family goes to, and what its rows say then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from linker_core.sharing.plan import SharePlan
from linker_core.sharing.planner import plan_donor
from linker_core.weights.checkpoint import Checkpoint
from server.registry.records import BaseRecord, ModelRecord, ModelState
from server.residency.rehoming import best_heir, rows_after
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SharePlan:
    """A donor's."""
    with Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("plan") / "base")) as checkpoint:
        return plan_donor(checkpoint, fingerprint="f-base")


def row(
    name: str, plan: SharePlan, *, position: int = 0, donor: str | None = "base"
) -> ModelRecord:
    return ModelRecord(
        name=name,
        source=f"/models/{name}",
        request={"name": name},
        state=ModelState.READY,
        position=position,
        created_at=1.0,
        donor=donor,
        family="base",
        fingerprint=plan.variant_fingerprint,
        plan=plan.to_json(),
    )


def variant(plan: SharePlan, *, unique_bytes: int) -> SharePlan:
    return replace(plan, donor_fingerprint="f-base", variant_fingerprint="f-variant",
                   unique_bytes=unique_bytes)  # fmt: skip


def test_heir_is_resident_then_servable_then_shares_most_then_came_first(plan: SharePlan) -> None:
    most, less = variant(plan, unique_bytes=10), variant(plan, unique_bytes=20)
    first, second = row("first", most, position=1), row("second", most, position=2)
    poorer = row("poorer", less, position=0)
    broken = replace(row("broken", most), state=ModelState.FAILED)
    unplanned = replace(broken, plan=None)

    def heir(*models: ModelRecord, resident: tuple[str, ...] = ()) -> str | None:
        found = best_heir(models, is_resident=lambda name: name in resident)
        return None if found is None else found.name

    assert heir(second, first, poorer, broken, unplanned) == "first"
    assert heir(second, poorer) == "second"
    assert heir(first, poorer, resident=("poorer",)) == "poorer"
    assert heir(broken, poorer) == "poorer"
    assert heir(broken, unplanned) == "broken"
    assert heir(unplanned) is None


def test_deleted_donor_leaves_its_checkpoint_to_the_plans(plan: SharePlan) -> None:
    models = [row(name, variant(plan, unique_bytes=10)) for name in ("a", "b")]
    rows = rows_after(row("base", plan, donor=None), models[1], models, stays=False)
    assert rows == [
        BaseRecord(fingerprint="f-base", source="/models/base"),
        replace(models[0], donor="b", family="b"),
        replace(models[1], donor=None, family="b"),
    ]


def test_donor_that_stays_known_holds_nothing_of_its_own(plan: SharePlan) -> None:
    heir = row("a", variant(plan, unique_bytes=10))
    *_, gone = rows_after(row("base", plan, donor=None), heir, [heir], stays=True)
    assert isinstance(gone, ModelRecord)
    assert (gone.state, gone.donor, gone.family) == (ModelState.UNLOADED, "a", "a")
    assert gone.plan is not None
    left = SharePlan.from_json(gone.plan)
    assert (left.donor_fingerprint, left.variant_fingerprint) == ("f-base", "f-base")
    assert (left.unique_bytes, left.shared_bytes) == (0, plan.logical_bytes)
    assert {str(rung) for rung in left.rungs.values()} == {"alias"}
    assert left.rungs.keys() == plan.rungs.keys()


def test_donor_that_was_a_variant_keeps_its_plan_and_its_base(plan: SharePlan) -> None:
    second, third = (row(name, variant(plan, unique_bytes=10)) for name in ("second", "third"))
    head = replace(second, donor=None)
    third = replace(third, donor="second")
    rows = rows_after(head, third, [third], stays=True)
    assert rows == [
        replace(third, donor=None, family="third"),
        replace(head, state=ModelState.UNLOADED, donor="third", family="third"),
    ]
