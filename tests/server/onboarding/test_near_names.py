from __future__ import annotations

import pytest

from server.onboarding.near_names import meant

KNOWN = ("mini/base", "mini/chat", "mini/code")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mini/bas", "mini/base"),
        ("mini/caht", "mini/chat"),
        ("mini/codes", "mini/code"),
        ("mimi/code", "mini/code"),
        ("chat", "mini/chat"),
        ("models/mini/chat", "mini/chat"),
    ],
)
def test_slip_of_a_name_is_taken_for_it(name: str, near: str) -> None:
    assert meant(name, KNOWN) == f" Is {near!r} meant?"


@pytest.mark.parametrize("name", ["mini/nope", "mini/b1", "acme/chat", "", "mini/", "x" * 10_000])
def test_name_that_shares_little_but_the_organisation_is_taken_for_none(name: str) -> None:
    assert meant(name, KNOWN) == ""


def test_nothing_is_meant_where_nothing_is_known() -> None:
    assert meant("mini/base", ()) == ""
