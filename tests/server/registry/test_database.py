from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from linker_core.errors import InvalidRequestError, NotReadyError
from server.registry.database import _SETTINGS, open_database
from server.registry.store import Registry
from tests.server.postgres import Cluster
from tests.server.registry.rows import MODEL


@pytest.fixture
def sqlite(tmp_path: Path) -> URL:
    return make_url(f"sqlite:///{tmp_path / 'r.sqlite3'}")


def test_sqlite_is_durable_and_checks_references(sqlite: URL) -> None:
    engine = open_database(sqlite).engine
    with engine.connect() as connection:
        settings = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert settings == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000,
    }  # fmt: skip


def test_damaged_json_spoils_only_its_value(sqlite: URL) -> None:
    registry = Registry.open(sqlite)
    registry.save(MODEL, replace(MODEL, name="near", position=2))
    registry.save_scan("d", "v", {"blocks": []})
    registry.save_tuning("d", "v", "k", {"seconds": 1.5})
    with create_engine(sqlite, poolclass=NullPool).begin() as connection:
        connection.execute(text("UPDATE models SET plan = '{' WHERE name = 'near'"))
        connection.execute(text("UPDATE scans SET report = '{'"))
        connection.execute(text("UPDATE tunings SET result = '{'"))
    assert [model.plan for model in registry.models()] == [MODEL.plan, {}]
    assert registry.scan("d", "v") is None
    assert registry.tuning("d", "v", "k") is None
    registry.close()


_IMPATIENT = {"sqlite": "PRAGMA busy_timeout=10", "postgresql": "SET lock_timeout = 10"}
_LOCK = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "LOCK TABLE models IN SHARE MODE"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nobody wait for locks."""
    for backend, setting in _IMPATIENT.items():
        monkeypatch.setitem(_SETTINGS, backend, (*_SETTINGS[backend], setting))


@pytest.mark.usefixtures("impatient")
def test_locked_registry_is_not_ready_and_says_no_more(url: URL) -> None:
    registry = Registry.open(url)
    with create_engine(url, poolclass=NullPool).connect() as blocker:
        blocker.exec_driver_sql(_LOCK[blocker.dialect.name])
        with pytest.raises(NotReadyError) as caught:
            registry.save(MODEL)
        assert "lock" not in caught.value.message
        assert registry.models() == []
        blocker.rollback()
    registry.save(MODEL)
    registry.close()


def test_full_registry_is_not_ready_until_there_is_room(sqlite: URL) -> None:
    registry = Registry.open(sqlite)
    registry.save(MODEL)
    with registry._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA max_page_count=1").scalar_one()  # as many as now
    big = replace(MODEL, name="big", position=2, plan={"filler": "x" * 4096 * 8})
    with pytest.raises(NotReadyError):
        registry.save(big)
    assert registry.models() == [MODEL]
    with registry._engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 99}")
    registry.save(big)
    assert registry.models() == [MODEL, big]
    registry.close()


def test_registry_on_a_full_disk_is_refused_with_what_helps(sqlite: URL) -> None:
    Registry.open(sqlite).close()
    room, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, most))  # less than is shared
    try:
        with pytest.raises(InvalidRequestError) as caught:
            Registry.open(sqlite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    assert "disk is full. Free space" in caught.value.message
    Registry.open(sqlite).close()


def test_postgresql_that_crashed_is_used_again_once_it_is_back(cluster: Cluster) -> None:
    registry = Registry.open(cluster.new_database())
    registry.save(MODEL)
    with cluster.crashed(), pytest.raises(NotReadyError):
        registry.save(replace(MODEL, name="near", position=2))
    assert registry.models() == [MODEL]
    registry.close()


def damaged_file(tmp_path: Path, *, pages: bool) -> Path:
    path = tmp_path / "r.sqlite3"
    registry = Registry.open(f"sqlite:///{path}")
    registry.save(*(replace(MODEL, name=f"m{n}", position=n) for n in range(200)))
    registry.close()
    data = bytearray(path.read_bytes())
    if pages:
        data[4096:] = b"\xff" * (len(data) - 4096)  # the header and the schema stay readable
    else:
        data[:16] = b"not a database.."
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("pages", [False, True])
def test_damaged_file_is_refused_by_name(tmp_path: Path, *, pages: bool) -> None:
    path = damaged_file(tmp_path, pages=pages)
    with pytest.raises(InvalidRequestError, match="restore a copy") as caught:
        Registry.open(f"sqlite:///{path}")
    assert str(path) in caught.value.message
    assert caught.value.param == "storage.registry_url"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("no url", "cannot be parsed"),
        ("nosuch://u:secret@h/d", "no database we know"),
        ("mysql://u:secret@h/d", "no database we know"),
        ("postgresql+nosuch://u:secret@h/d", "driver"),
        ("postgresql+psycopg://u:secret@/d?host=/nowhere", "No such file"),
        ("postgresql://u:secret@/d?host=/nowhere", "No such file"),
        ("sqlite:////nowhere/at/all/r.sqlite3", "unable to open"),
    ],
)
def test_url_that_leads_nowhere_is_refused_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        Registry.open(url)
    assert "secret" not in caught.value.message


def test_missing_driver_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidRequestError, match=r"u:\*\*\*@h/d cannot be used: its driver"):
        Registry.open("postgresql+psycopg://u:secret@h/d")


def test_unknown_postgresql_database_is_refused(cluster: Cluster) -> None:
    with pytest.raises(InvalidRequestError, match='database "nosuch" does not exist'):
        Registry.open(cluster.new_database().set(database="nosuch"))


def test_postgresql_without_the_right_to_make_tables_is_refused(cluster: Cluster) -> None:
    url = cluster.new_database()
    cluster.execute(url, "CREATE ROLE reader LOGIN")
    with pytest.raises(InvalidRequestError, match=r"denied for schema public\. Mend it") as e:
        Registry.open(url.set(username="reader"))
    assert "\n" not in e.value.message
