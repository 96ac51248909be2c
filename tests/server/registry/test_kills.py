"""A process killed at any write leaves all of a transaction or nothing of it."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import inspect
from sqlalchemy.engine import URL

from server.registry.records import BaseRecord
from server.registry.store import Registry
from tests.server.registry.first_tables import connected, make_first_tables
from tests.server.registry.killed import kills
from tests.server.registry.rows import MODEL

NEAR = replace(MODEL, name="near", donor="acme/chat", position=2, plan=None)
FAR = replace(NEAR, name="far", alias="f", position=3)
REHOMED = [
    replace(NEAR, donor=None, family="near", alias="chat"),
    replace(FAR, donor="near", family="near"),
]
BASE = BaseRecord(fingerprint="ab", source="/models/chat")


def rehome(registry: Registry) -> None:
    registry.replace(delete=["acme/chat"], save=[BASE, *REHOMED])


def whole(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def test_rehoming_that_is_killed_has_not_happened(url: URL) -> None:
    before = [replace(MODEL, alias="chat"), NEAR, FAR]
    registry = Registry.open(url)
    registry.save(*before)
    registry.close()
    number = 0
    for number in kills(whole(url), rehome):  # noqa: B007
        registry = Registry.open(url)
        assert registry.models() == before
        assert registry.bases() == []
        registry.close()
    assert number > 4  # the deletion, two updates and an insertion at least, and the commit
    registry = Registry.open(url)
    assert registry.models() == REHOMED
    assert registry.bases() == [BASE]
    registry.close()


def test_migration_that_is_killed_has_not_happened(url: URL) -> None:
    make_first_tables(url)
    number = 0
    for number in kills(whole(url), None):  # noqa: B007
        with connected(url) as connection:
            columns = {column["name"] for column in inspect(connection).get_columns("models")}
            assert "alias" not in columns
            assert "bases" not in inspect(connection).get_table_names()
    assert number > 8
    registry = Registry.open(url)
    assert registry.models() == [MODEL, NEAR]
    registry.close()


def test_making_of_tables_that_is_killed_leaves_none(url: URL) -> None:
    number = 0
    for number in kills(whole(url), None):  # noqa: B007
        with connected(url) as connection:
            assert inspect(connection).get_table_names() == []
    assert number > 8
    registry = Registry.open(url)
    assert registry.models() == []
    registry.close()
