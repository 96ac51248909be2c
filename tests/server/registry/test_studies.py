"""Studies in the registry, and what they have found tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, StatementError

from linker_core.errors import NotReadyError
from server.registry.records import StudyRecord
from server.registry.store import Registry
from tests.server.registry.first_tables import connected
from tests.server.registry.killed import kills

STUDY = StudyRecord(
    key="k1", family="acme/base", base={"name": None, "fingerprint": "b"},
    variants={"zeta": "1", "alpha": "2"}, created_at=10.0,
)  # fmt: skip
RECORDS = {name: {"name": name, "pc1": 0.5} for name in ("b", "a", "c")}


def test_studies_come_back_the_oldest_first_with_variants_in_their_order(
    registry: Registry,
) -> None:
    finished = replace(
        STUDY, key="k0", created_at=20.0, num_tensors=7, summary={"a": [0.1]}, finished_at=30.0
    )
    registry.save(finished, STUDY)
    assert registry.studies() == [STUDY, finished]
    assert [list(study.variants) for study in registry.studies()] == [["zeta", "alpha"]] * 2


def test_tensors_are_kept_by_study_and_replaced_by_name(registry: Registry) -> None:
    registry.save(STUDY, replace(STUDY, key="k2"))
    assert registry.study_tensors("k1") == []
    registry.save_study_tensors("k1", RECORDS)
    registry.save_study_tensors("k1", {"a": {"name": "a", "pc1": 0.75}})
    assert registry.study_tensors("k1") == ["a", "b", "c"]
    found = registry.study_records("k1", ["b", "nothing", "a"])
    assert list(found) == ["b", "a"]
    assert json.loads(found["a"]) == {"name": "a", "pc1": 0.75}
    assert found["b"] == b'{"name":"b","pc1":0.5}'
    assert registry.study_tensors("k2") == []
    assert registry.study_records("k2", ["a"]) == {}


def test_records_are_one_line_each_whatever_they_hold(registry: Registry) -> None:
    registry.save(STUDY)
    held = {
        "name": "a",
        "of": "line\nbreak \u2028 \u00e9",
        "least": 5e-324,
        "gram": [[0.1], [-0.0, 2]],
    }
    registry.save_study_tensors("k1", {"a": held})
    line = registry.study_records("k1", ["a"])["a"]
    assert b"\n" not in line
    assert json.loads(line) == held


def test_tensors_go_with_their_study(registry: Registry) -> None:
    registry.save(STUDY, replace(STUDY, key="k2"))
    registry.save_study_tensors("k1", RECORDS)
    registry.save_study_tensors("k2", RECORDS)
    registry.delete_studies({"k1", "never was"})
    assert [study.key for study in registry.studies()] == ["k2"]
    assert registry.study_tensors("k1") == []
    assert registry.study_tensors("k2") == ["a", "b", "c"]


def test_tensors_of_no_study_are_refused(registry: Registry) -> None:
    with pytest.raises(IntegrityError):
        registry.save_study_tensors("k1", RECORDS)


def test_a_study_keeps_its_tensors_when_it_is_finished(registry: Registry) -> None:
    registry.save(STUDY)
    registry.save_study_tensors("k1", RECORDS)
    registry.save(replace(STUDY, summary={}, finished_at=1.0))
    assert registry.study_tensors("k1") == ["a", "b", "c"]


def test_what_is_not_finite_is_not_stored(registry: Registry) -> None:
    registry.save(STUDY)
    with pytest.raises((StatementError, ValueError)):  # as the driver has it
        registry.save_study_tensors("k1", {"a": {"pc1": float("nan")}})
    assert registry.study_tensors("k1") == []


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # PostgreSQL reads JSON as it comes
def test_damaged_rows_are_as_good_as_none(url: URL) -> None:
    registry = Registry.open(url)
    registry.save(replace(STUDY, summary={"a": 1}))
    registry.save_study_tensors("k1", RECORDS)
    with connected(url) as connection:
        connection.execute(text("UPDATE studies SET summary = '{', variants = ''"))
        connection.execute(text("UPDATE study_tensors SET record = '{' WHERE name = 'b'"))
    [found] = registry.studies()
    assert (found.summary, found.variants) == ({}, {})
    assert list(registry.study_records("k1", ["a", "b", "c"])) == ["a", "c"]
    registry.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_error_without_a_code_is_told_like_any_other(url: URL) -> None:
    registry = Registry.open(url)
    registry.save(STUDY)
    registry.save_study_tensors("k1", {"a": {"name": "a"}})
    with connected(url) as connection:
        connection.execute(text("UPDATE study_tensors SET record = CAST(x'7bff7d' AS TEXT)"))
    with pytest.raises(NotReadyError, match="cannot be used"):
        registry.study_records("k1", ["a"])
    registry.close()


def test_records_that_are_killed_while_stored_are_all_there_or_none(url: URL) -> None:
    registry = Registry.open(url)
    registry.save(STUDY)
    registry.close()
    number = 0
    for number in kills(url.render_as_string(hide_password=False), _store):  # noqa: B007
        registry = Registry.open(url)
        assert registry.study_tensors("k1") == []
        registry.close()
    assert number > 3
    registry = Registry.open(url)
    assert registry.study_tensors("k1") == ["a", "b", "c"]
    registry.close()


def _store(registry: Registry) -> None:
    registry.save_study_tensors("k1", RECORDS)
