from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError

from linker_core.errors import InvalidRequestError
from server.registry.keys import digest_of, make_key
from server.registry.records import Role
from server.registry.store import Registry
from tests.server.registry.first_tables import connected, make_first_tables


def test_a_key_is_random_and_known_by_its_digest_alone(registry: Registry, url: URL) -> None:
    made = make_key("me", Role.CLIENT, created_at=1.0, max_parallel=3)
    registry.save(made.record)
    assert made.record.digest == hashlib.sha256(made.key.encode()).hexdigest()
    assert len(made.key) - len(made.record.prefix) == 39  # of 6 bits
    assert registry.api_keys() == [made.record]
    secret = made.key.removeprefix(made.record.prefix)
    with connected(url) as connection:
        [row] = connection.execute(text("SELECT * FROM keys")).all()
    assert secret not in str(row)
    assert len({make_key("me", Role.CLIENT, created_at=1.0).key for _ in range(100)}) == 100


def test_keys_are_listed_as_they_came_and_stay_when_revoked(registry: Registry) -> None:
    first = make_key("a", Role.ADMIN, created_at=1.0, tokens_per_minute=5).record
    second = make_key("b", Role.METRICS, created_at=2.0, requests_per_minute=7).record
    registry.save(second, first)
    registry.save(replace(first, revoked_at=3.0))
    assert registry.api_keys() == [replace(first, revoked_at=3.0), second]


def test_two_rows_cannot_be_one_key(registry: Registry) -> None:
    made = make_key("a", Role.ADMIN, created_at=1.0).record
    registry.save(made)
    with pytest.raises(IntegrityError):
        registry.save(replace(made, id="key_other"))


@pytest.mark.parametrize("name", ["", " a", "-a", "a" * 65, "a\nb", "ä", "a/b", "a;b", "\x00"])
def test_a_name_that_could_be_mistaken_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="A key's name"):
        make_key(name, Role.CLIENT, created_at=1.0)


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute", "max_parallel"])
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_a_limit_out_of_range_is_refused(limit: str, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=limit):
        make_key("a", Role.CLIENT, created_at=1.0, **{limit: value})


def test_keys_are_made_beside_a_running_server(registry: Registry, url: URL) -> None:
    """A registry of one server alone lets others in for its keys."""
    made = make_key("a", Role.CLIENT, created_at=1.0).record
    beside = Registry.open_beside(url)
    beside.save(made)
    assert registry.api_keys() == [made]
    registry.save(replace(made, revoked_at=2.0))
    assert beside.api_keys() == [replace(made, revoked_at=2.0)]
    beside.close()


def test_tables_are_made_beside_nobody(url: URL) -> None:
    make_first_tables(url)
    beside = Registry.open_beside(url)
    assert beside.api_keys() == []
    Registry.open(url).close()  # which nobody keeps out
    beside.close()


def test_any_text_has_a_digest() -> None:
    assert digest_of("") != digest_of("a")
