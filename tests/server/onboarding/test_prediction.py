"""What a load will take, reckoned by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import Rung
from linker_core.weights.shapes import expected_tensors
from server.onboarding.pairs import make_donor_plan
from server.onboarding.prediction import missing_base_bytes
from server.onboarding.prepare import read_text_side
from server.residency.catalog import TextSide
from tests.tiny import make_checkpoint

_ITEM_BYTES = 2  # bfloat16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSide:
    return read_text_side(make_checkpoint(tmp_path_factory.mktemp("models") / "base"))


def plan_of(text: TextSide, *, aliased: set[str]) -> SharePlan:
    """Returns a plan that aliases some tensors and owns the rest."""
    own = make_donor_plan(text, "x")
    rungs = {name: Rung.ALIAS if name in aliased else Rung.OWN for name in own.rungs}
    return replace(own, rungs=rungs)


def nbytes(text: TextSide, names: set[str]) -> int:
    shapes = expected_tensors(text.config)
    return sum(math.prod(shapes[name]) * _ITEM_BYTES for name in names)


def test_base_of_nobody_resident_counts_as_far_as_it_is_aliased(text: TextSide) -> None:
    assert text.config.dtype == "bfloat16"
    names = set(expected_tensors(text.config))
    for aliased in (set[str](), set(sorted(names)[:3]), names):
        plan = plan_of(text, aliased=aliased)
        assert missing_base_bytes(plan.rungs, text.config, []) == nbytes(text, aliased)


def test_what_others_alias_too_is_there_already(text: TextSide) -> None:
    first, second, third = sorted(expected_tensors(text.config))[:3]
    plan = plan_of(text, aliased={first, second})
    stored = plan_of(text, aliased={second, third}).to_json()["rungs"]  # as rows have it
    assert missing_base_bytes(plan.rungs, text.config, [stored]) == nbytes(text, {first})
    others = [stored, plan_of(text, aliased={first}).rungs]
    assert missing_base_bytes(plan.rungs, text.config, others) == 0


def test_residuals_lean_on_the_base_as_aliases_do(text: TextSide) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    plan = plan_of(text, aliased=set())
    stored = {**plan.to_json()["rungs"], name: "int4:64"}
    wants = plan_of(text, aliased={name})
    assert missing_base_bytes(wants.rungs, text.config, [plan.rungs]) == nbytes(text, {name})
    assert missing_base_bytes(wants.rungs, text.config, [stored]) == 0
