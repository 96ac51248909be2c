from __future__ import annotations

from server.rendering.patience import Patience


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def patience(clock: Clock) -> Patience:
    return Patience(1.0, least_s=0.1, forgive_s=30.0, clock=clock)


def test_template_that_behaves_has_all_of_it() -> None:
    mine = patience(Clock())
    mine.strike("other")
    assert mine.limit_s("mine") == 1.0


def test_every_strike_leaves_a_quarter_down_to_the_least() -> None:
    mine = patience(Clock())
    limits = []
    for _ in range(20):
        mine.strike("mine")
        limits.append(mine.limit_s("mine"))
    assert limits[:3] == [0.25, 0.1, 0.1]
    assert set(limits[1:]) == {0.1}


def test_strikes_are_forgiven_one_by_one() -> None:
    clock = Clock()
    mine = patience(clock)
    mine.strike("mine")
    mine.strike("mine")
    assert mine.limit_s("mine") == 0.1
    clock.now += 30
    assert mine.limit_s("mine") == 0.25
    clock.now += 30
    assert mine.limit_s("mine") == 1.0
    mine.strike("mine")
    assert mine.limit_s("mine") == 0.25


def test_number_of_strikes_that_count_is_bounded() -> None:
    clock = Clock()
    mine = patience(clock)
    for _ in range(1000):
        mine.strike("mine")
    clock.now += 30 * 8
    assert mine.limit_s("mine") == 1.0


def test_only_the_latest_are_remembered() -> None:
    mine = patience(Clock())
    for number in range(2000):
        mine.strike(str(number))
    assert len(mine._strikes) == 1024
    assert mine.limit_s("1999") == 0.25
    assert mine.limit_s("0") == 1.0


def test_strikes_are_told_once_in_a_while_of_each_template() -> None:
    clock = Clock()
    mine = patience(clock)
    assert mine.strike("mine")
    assert mine.strike("other")
    told = []
    for _ in range(90):
        clock.now += 1
        told.append(mine.strike("mine"))
    assert told.count(True) == 3
    assert told[29]


def test_template_is_struck_until_all_is_forgiven() -> None:
    clock = Clock()
    mine = patience(clock)
    assert not mine.is_struck("mine")
    mine.strike("mine")
    clock.now += 29
    assert mine.is_struck("mine")
    clock.now += 1
    assert not mine.is_struck("mine")
