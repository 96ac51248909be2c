from __future__ import annotations

from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError

from linker_core.errors import InvalidRequestError
from server.registry import migration
from server.registry.records import StudyRecord
from server.registry.store import Registry
from server.registry.tables import Base
from tests.server.registry.first_tables import connected, make_first_tables
from tests.server.registry.rows import JOB, MODEL


def test_migrated_tables_are_those_the_code_describes(url: URL) -> None:
    Registry.open(url).close()
    with connected(url) as connection:
        options = {"version_table": migration.VERSION_TABLE}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_first_start_says_that_it_made_the_registry(
    url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger=migration.__name__):
        Registry.open(url).close()
        Registry.open(url).close()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "created the registry"
    ]


def test_registry_from_before_the_migrations_keeps_its_rows(
    url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    make_first_tables(url)
    with caplog.at_level("INFO", logger=migration.__name__):
        registry = Registry.open(url)
    assert "migrated the registry from before the versions to" in caplog.text
    near = replace(MODEL, name="near", donor="acme/chat", position=2, plan=None)
    assert registry.models() == [MODEL, near]
    assert registry.job("job-1") == JOB
    assert registry.scan("d", "v") == {"blocks": []}
    registry.save(replace(near, pinned=True, alias="n", keep_alive_s=1.5))
    registry.close()


def test_registry_from_before_the_studies_keeps_its_rows_and_takes_a_study(url: URL) -> None:
    first = Registry.open(url)
    first.save(MODEL, JOB)
    first.close()
    with connected(url) as connection:  # as step 0003 left it: 0004 only adds these
        connection.exec_driver_sql("DROP TABLE study_tensors")
        connection.exec_driver_sql("DROP TABLE studies")
        connection.execute(text(f"UPDATE {migration.VERSION_TABLE} SET version_num = '0003'"))
    registry = Registry.open(url)
    assert registry.models() == [MODEL]
    assert registry.job(JOB.id) == JOB
    study = StudyRecord(
        key="k", family="acme/chat", base={"fingerprint": "ab"}, variants={"near": "cd"},
        created_at=1.0, summary={"num_tensors": 1},
    )  # fmt: skip
    registry.save(study)
    registry.save_study_tensors("k", {"t": {"name": "t", "pc1": 0.5}})
    assert registry.studies() == [study]
    assert registry.study_records("k", ["t"]) == {"t": b'{"name":"t","pc1":0.5}'}
    registry.close()
    with connected(url) as connection:
        found = connection.execute(text(f"SELECT version_num FROM {migration.VERSION_TABLE}"))
        assert found.scalars().all() == ["0004"]


def test_migrated_references_are_checked_when_the_transaction_ends(url: URL) -> None:
    make_first_tables(url)
    registry = Registry.open(url)
    with pytest.raises(IntegrityError):
        registry.save(replace(MODEL, name="orphan", donor="nobody", position=3))
    registry.save(
        replace(MODEL, name="a", donor="b", position=4), replace(MODEL, name="b", position=5)
    )
    assert len(registry.models()) == 4
    registry.close()


def test_first_table_that_is_missing_is_made(url: URL) -> None:
    make_first_tables(url)
    with connected(url) as connection:
        connection.exec_driver_sql("DROP TABLE tunings")
    registry = Registry.open(url)
    assert registry.tuning("d", "v", "k") is None
    registry.close()


def test_newer_registry_is_refused_with_what_to_do(url: URL) -> None:
    Registry.open(url).close()
    with connected(url) as connection:
        connection.execute(text(f"UPDATE {migration.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(InvalidRequestError, match=r"newer version .*9999.*restore the copy"):
        Registry.open(url)


def test_registry_that_lost_a_table_is_refused(url: URL) -> None:
    Registry.open(url).close()
    with connected(url) as connection:
        connection.exec_driver_sql("DROP TABLE bases")
    with pytest.raises(InvalidRequestError, match="table bases lacks fingerprint, source"):
        Registry.open(url)


def test_registry_of_two_versions_is_refused(url: URL) -> None:
    Registry.open(url).close()
    with connected(url) as connection:
        connection.execute(text(f"INSERT INTO {migration.VERSION_TABLE} VALUES ('0001')"))
    with pytest.raises(InvalidRequestError, match="cannot be used"):
        Registry.open(url)


def test_tables_of_another_program_are_refused_and_left_alone(url: URL) -> None:
    with connected(url) as connection:
        connection.exec_driver_sql("CREATE TABLE scans (id INTEGER PRIMARY KEY)")
    with pytest.raises(InvalidRequestError, match="table scans is not one of ours"):
        Registry.open(url)
    with connected(url) as connection:
        assert inspect(connection).get_table_names() == ["scans"]


def test_other_programs_alembic_version_is_none_of_ours(url: URL) -> None:
    with connected(url) as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('9999')")
    Registry.open(url).close()
    with connected(url) as connection:
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars()
        assert found.all() == ["9999"]


def test_current_registry_is_opened_without_a_write(url: URL) -> None:
    registry = Registry.open(url)
    registry.save(MODEL)
    registry.close()
    lock = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "LOCK TABLE models IN SHARE MODE"}
    with connected(url) as connection:
        connection.exec_driver_sql(lock[connection.dialect.name])
        registry = Registry.open(url)
        assert registry.models() == [MODEL]
        registry.close()


def test_steps_are_one_line_of_descent() -> None:
    scripts = ScriptDirectory(str(migration._SCRIPTS))
    assert [step.revision for step in scripts.walk_revisions()] == ["0004", "0003", "0002", "0001"]
