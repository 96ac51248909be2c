from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.tuning.request import (
    SELF_CALIBRATION,
    TuneGoal,
    calibration_source_digest,
    tuning_key,
)


def test_key_tells_goals_and_texts_apart() -> None:
    goals = [
        TuneGoal(budget_kl=0.01),
        TuneGoal(budget_kl=0.02),
        TuneGoal(max_bytes=1),
        TuneGoal(rungs={"a": "own", "b": "alias"}),
        TuneGoal(rungs={"a": "alias", "b": "alias"}),
    ]
    keys = [tuning_key(goal, text) for goal in goals for text in ("one text", "another")]
    assert len(set(keys)) == len(keys)


def test_key_does_not_care_for_the_order_of_rungs() -> None:
    one, other = {"a": "own", "b": "alias"}, {"b": "alias", "a": "own"}
    assert tuning_key(TuneGoal(rungs=one), "") == tuning_key(TuneGoal(rungs=other), "")


def test_source_digest_tells_texts_apart_by_content(tmp_path: Path) -> None:
    file, copy = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text('{"text": "one"}\n')
    copy.write_text(file.read_text())
    assert calibration_source_digest(str(file)) == calibration_source_digest(str(copy))
    copy.write_text('{"text": "two"}\n')
    sources = (None, SELF_CALIBRATION, str(file), str(copy))
    assert len({calibration_source_digest(source) for source in sources}) == 4


def test_source_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(
            InvalidRequestError, match=r"cannot be opened|not a regular file"
        ) as caught:
            calibration_source_digest(str(path))
        assert caught.value.param == "calibration"
