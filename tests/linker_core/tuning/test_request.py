from __future__ import annotations

import pytest

from linker_core.config import MatmulPrecision
from linker_core.tuning import request
from linker_core.tuning.offered import OFFERED
from linker_core.tuning.request import TuneGoal, tuning_key

PRECISIONS: tuple[MatmulPrecision, ...] = ("highest", "medium")


def test_key_tells_goals_texts_and_precisions_apart() -> None:
    goals = [
        TuneGoal(budget_kl=0.01),
        TuneGoal(budget_kl=0.02),
        TuneGoal(max_bytes=1),
        TuneGoal(rungs={"a": "own", "b": "alias"}),
        TuneGoal(rungs={"a": "alias", "b": "alias"}),
    ]
    keys = [
        tuning_key(goal, text, precision)
        for goal in goals
        for text in ("one text", "another")
        for precision in PRECISIONS
    ]
    assert len(set(keys)) == len(keys)


def test_key_does_not_care_for_the_order_of_rungs() -> None:
    one, other = {"a": "own", "b": "alias"}, {"b": "alias", "a": "own"}
    keys = [tuning_key(TuneGoal(rungs=rungs), "", "highest") for rungs in (one, other)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(("constant", "other"), [("ENCODING", -1), ("OFFERED", OFFERED[1:])])
def test_key_changes_with_what_prices_depend_on(
    monkeypatch: pytest.MonkeyPatch, constant: str, other: object
) -> None:
    before = tuning_key(TuneGoal(budget_kl=0.01), "", "highest")
    monkeypatch.setattr(request, constant, other)
    assert tuning_key(TuneGoal(budget_kl=0.01), "", "highest") != before
