from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linker_core.errors import InvalidRequestError, NotReadyError, QueueFullError, RateLimitError
from server.gateway.caller import Caller, KeyLimits
from server.gateway.gate import Gate, Place
from server.registry.records import Role


def key(name: str, **limits: int) -> Caller:
    return Caller(key_id=name, role=Role.CLIENT, limits=KeyLimits(**limits))


def test_sequences_beyond_the_bound_are_refused_until_some_have_ended() -> None:
    gate = Gate(3)
    with gate.admit(2):
        with pytest.raises(QueueFullError), gate.admit(2):
            pass
        with gate.admit(1):
            pass
    with gate.admit(3):
        pass


def test_prompts_in_wait_are_bounded_and_wait_no_longer_once_answered() -> None:
    gate = Gate(10, max_waiting_tokens=100)
    with gate.admit(2, prompt_tokens=61) as place:
        with pytest.raises(QueueFullError), gate.admit(1, prompt_tokens=40):
            pass
        place.begun()
        with gate.admit(1, prompt_tokens=69):
            pass
        place.begun()
        assert gate.waiting.taken == 1  # of the sum's remainder, until the end
    assert gate.waiting.taken == 0


def test_what_would_never_be_admitted_is_not_worth_trying_again() -> None:
    gate = Gate(4, max_waiting_tokens=100)
    with pytest.raises(InvalidRequestError, match="at most 4 at once"), gate.admit(5):
        pass
    with (
        pytest.raises(InvalidRequestError, match="at most 100 wait"),
        gate.admit(1, prompt_tokens=101),
    ):
        pass


def test_a_full_gate_is_told_before_any_work_and_holds_nothing_for_it() -> None:
    gate, caller = Gate(2), key("a", max_parallel=1)
    gate.check(caller)
    with gate.admit(1, caller=caller), pytest.raises(RateLimitError):
        gate.check(caller)
    with gate.admit(2), pytest.raises(QueueFullError):
        gate.check(caller)
    gate.check(caller)


def test_a_refused_request_has_used_nothing() -> None:
    gate, caller = Gate(1), key("a", tokens_per_minute=10, max_parallel=1)
    with (
        gate.admit(1),
        pytest.raises(QueueFullError),
        gate.admit(1, prompt_tokens=10, caller=caller),
    ):
        pass
    with gate.admit(1, prompt_tokens=10, caller=caller):
        pass


def test_a_keys_tokens_are_those_of_its_prompts_and_answers() -> None:
    gate, caller = Gate(10), key("a", tokens_per_minute=10)
    with gate.admit(1, prompt_tokens=4, caller=caller) as place:
        place.answered(6)
    with pytest.raises(RateLimitError), gate.admit(1, prompt_tokens=1, caller=caller):
        pass
    with gate.admit(1, prompt_tokens=1, caller=key("b", tokens_per_minute=10)):
        pass


def test_parallel_answers_have_no_more_of_a_keys_minute_than_there_is() -> None:
    gate, caller = Gate(100), key("a", tokens_per_minute=100)
    used, admitted = 0, 0
    with ExitStack() as stack:
        places = list[Place]()
        for _ in range(20):
            with suppress(RateLimitError):
                admit = gate.admit(1, prompt_tokens=2, answer_tokens=60, caller=caller)
                places.append(stack.enter_context(admit))
        admitted = len(places)
        for place in places:
            used += 2
            for _ in range(60):
                place.answered(1)
                used += 1
    assert admitted == 2
    assert used == 124
    with pytest.raises(RateLimitError) as refused, gate.admit(1, prompt_tokens=1, caller=caller):
        pass
    assert 61 < (refused.value.retry_after_s or 0) <= 61 + 24 * 0.6


def test_what_an_answer_did_not_need_of_the_keys_minute_is_there_for_others() -> None:
    gate, caller = Gate(10), key("a", tokens_per_minute=100)
    with gate.admit(2, prompt_tokens=10, answer_tokens=200, caller=caller) as place:
        place.answered(15)
        with pytest.raises(RateLimitError), gate.admit(1, prompt_tokens=1, caller=caller):
            pass
    with gate.admit(1, prompt_tokens=75, caller=caller):
        pass


def test_a_failed_request_gives_its_places_back() -> None:
    gate, caller = Gate(1, max_waiting_tokens=5), key("a", max_parallel=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gate.admit(1, prompt_tokens=5, caller=caller):
            raise ZeroDivisionError
    assert gate.waiting.taken == 0


def test_a_flood_of_one_key_leaves_room_for_the_others() -> None:
    gate = Gate(64)
    with ExitStack() as stack:

        def admitted(name: str) -> int:
            """Sends one after the other until one is refused."""
            count = 0
            with suppress(QueueFullError):
                while True:
                    stack.enter_context(gate.admit(1, caller=key(name)))
                    count += 1
            return count

        assert admitted("flood") == 56
        assert admitted("quiet") == 8
    with ExitStack() as stack:
        assert admitted("quiet") == 56  # alone again, and nothing is held against it


def test_keys_come_to_hold_equal_shares_under_floods() -> None:
    gate, held = Gate(64), {name: list[ExitStack]() for name in "abc"}

    def flood(name: str) -> None:
        with suppress(QueueFullError):
            while True:
                one = ExitStack()
                one.enter_context(gate.admit(1, caller=key(name)))
                held[name].append(one)

    for name in "abc":
        flood(name)
    for _ in range(64):
        for stacks in held.values():
            if stacks:
                stacks.pop(0).close()
        for name in "abc":
            flood(name)
    assert all(len(stacks) >= 64 // 4 for stacks in held.values())
    for stacks in held.values():
        for one in stacks:
            one.close()


def test_prompts_in_wait_of_one_key_leave_room_for_the_others() -> None:
    gate = Gate(8, max_waiting_tokens=1000)
    with gate.admit(4, prompt_tokens=800, caller=key("flood")):
        with pytest.raises(QueueFullError), gate.admit(1, prompt_tokens=100, caller=key("flood")):
            pass
        with gate.admit(1, prompt_tokens=200, caller=key("quiet")):
            pass


def test_few_long_prompts_of_one_key_leave_room_for_the_others() -> None:
    gate = Gate(256, max_waiting_tokens=1000)
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(gate.admit(1, prompt_tokens=125, caller=key("flood")))
        with pytest.raises(QueueFullError), gate.admit(1, prompt_tokens=125, caller=key("flood")):
            pass
        stack.enter_context(gate.admit(1, prompt_tokens=125, caller=key("quiet")))


def test_one_request_may_have_all_of_an_idle_server() -> None:
    gate = Gate(8, max_waiting_tokens=1000)
    with gate.admit(8, prompt_tokens=1000, caller=key("a")):
        pass


def test_an_open_server_has_no_shares() -> None:
    gate = Gate(3)
    with gate.admit(2), gate.admit(1):
        pass


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 50), st.integers(0, 5)), max_size=20
    )
)
def test_every_count_is_nought_when_all_have_ended(requests: list[tuple[int, int, int]]) -> None:
    gate = Gate(1000, max_waiting_tokens=10**6)
    with ExitStack() as stack:
        for num_sequences, prompt_tokens, num_begun in requests:
            place = stack.enter_context(gate.admit(num_sequences, prompt_tokens=prompt_tokens))
            assert isinstance(place, Place)
            for _ in range(num_begun):
                place.begun()
            assert 0 <= place.waiting_tokens <= prompt_tokens
        waiting = gate.waiting.taken
        assert 0 <= waiting <= sum(tokens for _, tokens, _ in requests)
    assert gate.waiting.taken == 0
    assert asyncio.run(gate.drain(0)) is True


def test_nothing_is_admitted_while_the_server_drains() -> None:
    gate = Gate(1)
    gate.close()
    with pytest.raises(NotReadyError), gate.admit(1):
        pass
