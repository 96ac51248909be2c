from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy.engine import URL

from linker_core.errors import InvalidRequestError, NotReadyError
from server.registry.database import _SETTINGS
from server.registry.store import Registry
from tests.server.postgres import Cluster
from tests.server.registry.rows import MODEL


@pytest.fixture
def database(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> URL:
    """An empty database; nobody waits long for its locks."""
    settings = (*_SETTINGS["postgresql"], "SET lock_timeout = 10")
    monkeypatch.setitem(_SETTINGS, "postgresql", settings)
    return cluster.new_database()


def test_second_server_of_a_registry_is_refused_until_the_first_ends(database: URL) -> None:
    first = Registry.open(database)
    with pytest.raises(InvalidRequestError, match=r"another server uses it\. Stop that one"):
        Registry.open(database)
    first.close()
    Registry.open(database).close()


def test_schemas_of_one_database_are_registries_of_their_own(
    cluster: Cluster, database: URL
) -> None:
    cluster.execute(database, "CREATE SCHEMA other")
    other = database.update_query_dict({"options": "-csearch_path=other"})
    first, second = Registry.open(database), Registry.open(other)
    first.save(MODEL)
    assert second.models() == []
    for registry in (first, second):
        registry.close()


def test_registry_that_another_server_took_after_a_cut_is_not_written(
    cluster: Cluster, database: URL
) -> None:
    first = Registry.open(database)
    cluster.disconnect_all(database)
    second = Registry.open(database)
    with pytest.raises(NotReadyError, match="Another server has taken the registry"):
        first.save(MODEL)
    second.close()
    first.save(MODEL)
    assert first.models() == [MODEL]
    first.close()


def test_tenure_is_taken_anew_after_a_cut(cluster: Cluster, database: URL) -> None:
    first = Registry.open(database)
    cluster.disconnect_all(database)
    first.save(replace(MODEL, name="after"))
    with pytest.raises(InvalidRequestError, match="another server uses it"):
        Registry.open(database)
    first.close()
