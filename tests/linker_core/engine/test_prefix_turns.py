from __future__ import annotations

from linker_core.engine.prefix_turns import PrefixTurns
from tests.linker_core.engine.scheduling import make_sequence

KEYS = [bytes([number]) for number in range(6)]


def test_hold_back_waits_for_the_last_common_page() -> None:
    turns, owner, waiter = PrefixTurns(), make_sequence(), make_sequence()
    turns.claim(owner, KEYS[:4])
    assert turns.hold_back(waiter, [*KEYS[1:3], b"another"])
    assert turns.settle(KEYS[0]) == turns.settle(KEYS[1]) == []
    turns.check_integrity([owner])
    assert turns.settle(KEYS[2]) == [waiter]
    assert list(turns.waiting()) == []
    assert turns.leave(owner, KEYS) == []


def test_hold_back_lets_go_what_nobody_computes() -> None:
    turns, owner, waiter = PrefixTurns(), make_sequence(), make_sequence()
    turns.claim(owner, KEYS[1:])
    assert not turns.hold_back(waiter, KEYS)
    assert not turns.hold_back(waiter, [])
    assert list(turns.waiting()) == []


def test_hold_back_never_waits_for_the_less_urgent() -> None:
    turns, owner, waiter = PrefixTurns(), make_sequence(priority=1), make_sequence(priority=0)
    turns.claim(owner, KEYS)
    assert not turns.hold_back(waiter, KEYS)
    assert turns.hold_back(make_sequence(priority=1), KEYS)


def test_leave_resumes_whoever_waits_for_a_page_that_will_not_come() -> None:
    turns, owner, other = PrefixTurns(), make_sequence(), make_sequence()
    first, second = make_sequence(), make_sequence()
    turns.claim(owner, KEYS[:3])
    turns.claim(other, KEYS)
    assert turns.hold_back(first, KEYS)
    assert turns.hold_back(second, KEYS[4:])
    assert turns.leave(owner, KEYS[:3]) == [first]
    assert turns.leave(other, KEYS) == [second]
    turns.check_integrity([])


def test_discard_forgets_one_that_is_held_back() -> None:
    turns, owner, waiter = PrefixTurns(), make_sequence(), make_sequence()
    turns.claim(owner, KEYS)
    assert turns.hold_back(waiter, KEYS)
    turns.discard(waiter)
    turns.check_integrity([owner])
    assert turns.leave(owner, KEYS) == []
