from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linker_core.errors import InvalidRequestError, RateLimitError
from server.gateway.caller import EVERYBODY, Caller, KeyLimits
from server.gateway.limits import LastMinute, Quotas
from server.registry.records import Role

STEPS = st.lists(
    st.tuples(st.floats(0, 90, allow_nan=False), st.integers(1, 8)), min_size=1, max_size=60
)


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def key(name: str = "a", **limits: int) -> Caller:
    return Caller(key_id=name, role=Role.CLIENT, limits=KeyLimits(**limits))


def refusal(work: Callable[[], None]) -> RateLimitError:
    with pytest.raises(RateLimitError) as caught:
        work()
    return caught.value


@given(steps=STEPS, start=st.floats(0, 1e6), limit=st.integers(8, 20))
def test_no_minute_ever_has_more_than_the_limit(
    steps: list[tuple[float, int]], start: float, limit: int
) -> None:
    count, now, taken = LastMinute(), start, list[tuple[float, int]]()
    for pause, amount in steps:
        now += pause
        if count.wait_s(amount, limit=limit, now=now) == 0:
            count.add(amount, now=now)
            taken.append((now, amount))
    for at, _ in taken:
        assert sum(amount for when, amount in taken if at - 60 <= when <= at) <= limit


@given(steps=STEPS, start=st.floats(0, 1e6), limit=st.integers(8, 20), amount=st.integers(1, 8))
def test_after_the_wait_that_is_told_it_fits_and_never_takes_over_61_seconds(
    steps: list[tuple[float, int]], start: float, limit: int, amount: int
) -> None:
    count, now = LastMinute(), start
    for pause, spent in steps:
        now += pause
        count.add(spent, now=now)  # whether it fits or not, as answers do
    wait_s = count.wait_s(amount, limit=limit, now=now)
    assert 0 <= wait_s <= 61
    assert count.wait_s(amount, limit=limit, now=now + wait_s + 1e-6) == 0


def test_a_minute_is_forgotten_after_however_long_a_pause() -> None:
    count = LastMinute()
    count.add(5, now=10.0)
    assert count.wait_s(5, limit=5, now=10.0) == 61.0
    assert count.wait_s(5, limit=5, now=10.0 + 1e9) == 0


def test_requests_beyond_a_keys_minute_are_refused_with_when_to_come_again() -> None:
    clock = Clock()
    quotas, caller = Quotas(clock), key(requests_per_minute=2)
    quotas.count_request(caller)
    clock.now += 20.5
    quotas.count_request(caller)
    error = refusal(lambda: quotas.count_request(caller))
    assert error.retry_after_s == 40.5
    assert "2 requests a minute" in error.message
    clock.now += 40.5
    quotas.count_request(caller)
    assert refusal(lambda: quotas.count_request(caller)).retry_after_s == 20


def test_keys_do_not_use_up_each_others_minute() -> None:
    quotas = Quotas(Clock())
    quotas.count_request(key("a", requests_per_minute=1))
    quotas.count_request(key("b", requests_per_minute=1))
    refusal(lambda: quotas.count_request(key("a", requests_per_minute=1)))


def test_answers_beyond_the_minute_are_waited_for_as_long_as_they_take() -> None:
    clock = Clock()
    quotas, caller = Quotas(clock), key(tokens_per_minute=100)
    quotas.check(caller, num_sequences=1, prompt_tokens=60)
    quotas.spend(caller, 60)
    quotas.spend(caller, 40 + 250)  # an answer goes on beyond the limit
    error = refusal(lambda: quotas.check(caller, num_sequences=1, prompt_tokens=1))
    assert error.retry_after_s == 61 + 150
    clock.now += 61 + 149
    refusal(lambda: quotas.check(caller, num_sequences=1, prompt_tokens=1))
    clock.now += 1
    quotas.check(caller, num_sequences=1, prompt_tokens=100)


def test_what_answers_may_need_is_kept_for_them_until_they_have_it_or_end() -> None:
    clock = Clock()
    quotas, caller = Quotas(clock), key(tokens_per_minute=100)
    quotas.spend(caller, 10)
    assert [quotas.hold(caller, 50), quotas.hold(caller, 50)] == [50, 40]
    clock.now += 61  # the prompt is forgotten, and nothing of what is kept
    quotas.check(caller, num_sequences=1, prompt_tokens=10)
    error = refusal(lambda: quotas.check(caller, num_sequences=1, prompt_tokens=11))
    assert error.retry_after_s == 1
    assert "answers that run" in error.message
    quotas.release(caller, 40)
    quotas.check(caller, num_sequences=1, prompt_tokens=50)
    quotas.keep(frozenset())
    refusal(lambda: quotas.check(caller, num_sequences=1, prompt_tokens=51))


@given(
    steps=st.lists(
        st.tuples(st.floats(0, 30), st.integers(1, 20), st.integers(0, 60), st.integers(0, 80)),
        min_size=1,
        max_size=60,
    ),
    limit=st.integers(20, 50),
)
def test_a_key_has_its_limit_a_minute_and_what_it_took_beyond_was_waited_for(
    steps: list[tuple[float, int, int, int]], limit: int
) -> None:
    clock = Clock()
    quotas, caller = Quotas(clock), key(tokens_per_minute=limit)
    begun_at, used = clock.now, 0
    for pause, prompt, bound, answer in steps:
        clock.now += pause
        try:
            quotas.check(caller, num_sequences=1, prompt_tokens=prompt)
        except RateLimitError:
            continue
        # Whatever came before: what it all takes in time has passed, but for one minute's worth.
        assert used <= limit * (1 + (clock.now - begun_at) / 60) + 1e-6
        quotas.spend(caller, prompt)
        held = quotas.hold(caller, bound)
        assert 0 <= held <= bound
        quotas.release(caller, held)
        quotas.spend(caller, answer)
        used += prompt + answer


def test_a_prompt_that_no_minute_has_room_for_is_not_worth_trying_again() -> None:
    quotas, caller = Quotas(Clock()), key(tokens_per_minute=100)
    with pytest.raises(InvalidRequestError, match="101 tokens"):
        quotas.check(caller, num_sequences=1, prompt_tokens=101)


def test_parallel_sequences_are_bounded_from_admission_to_their_end() -> None:
    quotas, caller = Quotas(Clock()), key(max_parallel=3)
    quotas.check(caller, num_sequences=3, prompt_tokens=1)
    quotas.run(caller, 2)
    refusal(lambda: quotas.check(caller, num_sequences=2, prompt_tokens=1))
    quotas.run(caller, -2)
    quotas.check(caller, num_sequences=3, prompt_tokens=1)
    with pytest.raises(InvalidRequestError, match="may run 3 at once"):
        quotas.check(caller, num_sequences=4, prompt_tokens=1)


def test_a_key_for_one_sequence_is_told_of_one() -> None:
    quotas, caller = Quotas(Clock()), key(max_parallel=1)
    quotas.run(caller, 1)
    with pytest.raises(RateLimitError, match="may run 1 sequence at once"):
        quotas.check(caller, num_sequences=1, prompt_tokens=1)


def test_limits_do_not_know_the_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> float:
        raise AssertionError("the time of day was asked for")

    quotas, caller = Quotas(), key(requests_per_minute=1, tokens_per_minute=5, max_parallel=1)
    monkeypatch.setattr(time, "time", broken)
    quotas.count_request(caller)
    quotas.check(caller, num_sequences=1, prompt_tokens=5)
    quotas.spend(caller, 5)
    assert 59 < (refusal(lambda: quotas.count_request(caller)).retry_after_s or 0) <= 61


def test_what_is_remembered_does_not_grow_with_use() -> None:
    clock = Clock()
    quotas, caller = Quotas(clock), key(requests_per_minute=10**6, tokens_per_minute=10**6)
    for _ in range(5000):
        clock.now += 0.7
        quotas.count_request(caller)
        quotas.spend(caller, 3)
    [usage] = quotas._usage.values()
    assert len(usage.requests._counts) == len(usage.tokens._counts) == 61


def test_only_keys_with_limits_are_remembered_and_only_while_they_are_good() -> None:
    quotas = Quotas(Clock())
    for caller in (EVERYBODY, key("free")):
        quotas.count_request(caller)
        quotas.check(caller, num_sequences=10**6, prompt_tokens=10**9)
        quotas.spend(caller, 10**9)
        quotas.run(caller, 1)
    assert quotas._usage == {}
    gone, busy = key("gone", requests_per_minute=5), key("busy", max_parallel=5)
    quotas.count_request(gone)
    quotas.run(busy, 1)
    quotas.keep(frozenset({"other"}))
    assert list(quotas._usage) == ["busy"]
    quotas.run(busy, -1)
    quotas.keep(frozenset({"other"}))
    assert quotas._usage == {}
