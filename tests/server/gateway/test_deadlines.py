"""How long an answer may take: the arithmetic, and what clients get to see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from linker_core.errors import DeadlineError, InvalidRequestError, LinkerError
from server.gateway.deadlines import Deadlines, Watch, deadlines_of
from server.settings import HttpSettings
from tests.server.fake_engine import Fault
from tests.server.live import LiveServer, live_server

LIMITS = HttpSettings(
    queue_timeout_s=10, first_token_timeout_s=30, stall_timeout_s=20, total_timeout_s=100
)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A watch under a clock of our own, and what it had to say."""

    def __init__(self, clock: Clock, **more: Any) -> None:
        self.clock = clock
        self.deadlines = Deadlines(LIMITS, arrived_at=clock.now, clock=clock, **more)
        self.errors: list[LinkerError] = []
        self.watch = Watch(self.deadlines, self.errors.append)

    def after(self, seconds: float) -> list[str]:
        """Lets time pass and its timer ring; returns what has been said by then."""
        self.clock.now += seconds
        self.watch.close()
        self.watch._check()
        return [error.message for error in self.errors]


def watched(**more: Any) -> Iterator[Watched]:
    async def make() -> Watched:
        found = Watched(Clock(), **more)
        found.watch.close()
        return found

    with asyncio.Runner() as runner:
        found = runner.run(make())
        yield found
        found.watch.close()


@pytest.fixture(name="watched")
def _watched() -> Iterator[Watched]:
    yield from watched()


@pytest.fixture(name="hurried")
def _hurried() -> Iterator[Watched]:
    yield from watched(total_s=5.0)


def test_answer_without_a_first_token_in_time_is_late(watched: Watched) -> None:
    assert watched.after(29) == []
    said = watched.after(1)
    assert "no first token within 30 s" in said[0]
    assert isinstance(watched.errors[0], DeadlineError)


def test_answer_that_goes_on_is_late_only_in_all(watched: Watched) -> None:
    for _ in range(9):
        watched.watch.came()
        watched.watch.awaits()
        assert watched.after(11) == []
    watched.watch.came()
    watched.watch.awaits()
    assert "not complete within 100 s" in watched.after(1)[0]


def test_answer_that_stands_still_is_late(watched: Watched) -> None:
    watched.watch.came()
    watched.watch.awaits()
    assert watched.after(19) == []
    assert "no progress for 20 s" in watched.after(1)[0]


def test_time_that_the_client_takes_to_read_is_no_standstill(watched: Watched) -> None:
    watched.watch.came()
    assert watched.after(50) == []
    watched.watch.awaits()
    assert watched.after(19) == []
    assert "no progress" in watched.after(1)[0]


def test_late_answer_is_told_again_until_it_ends(watched: Watched) -> None:
    assert len(watched.after(30)) == 1
    assert len(watched.after(1)) == 2


def test_client_may_ask_for_less_time(hurried: Watched) -> None:
    assert hurried.deadlines.start_within_s == 5
    hurried.watch.came()
    hurried.watch.awaits()
    assert "not complete within 5 s" in hurried.after(5)[0]
    assert hurried.deadlines.start_within_s == 0


def test_wait_for_the_first_step_is_bounded_by_both() -> None:
    clock = Clock()
    deadlines = Deadlines(LIMITS, arrived_at=clock.now, clock=clock)
    assert deadlines.start_within_s == 10
    clock.now += 95
    assert deadlines.start_within_s == 5


def request_with(*headers: tuple[str, str]) -> Request:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    return Request({"type": "http", "headers": raw})


def test_header_lowers_the_whole_and_never_raises_it() -> None:
    def total_s(*headers: tuple[str, str]) -> float:
        return deadlines_of(request_with(*headers), LIMITS, arrived_at=0.0).total_s

    assert total_s() == 100
    assert total_s(("X-Request-Timeout", "2.5")) == 2.5
    assert total_s(("X-Request-Timeout", "999999")) == 100
    # What SDKs say of themselves: how long they will wait, not how long they want to.
    assert total_s(("x-stainless-timeout", "3"), ("x-stainless-read-timeout", "3")) == 100


@pytest.mark.parametrize(
    "value", ["", "0", "0.0", "-1", "nan", "inf", "1e3", "5s", "1,5", "9" * 40]
)
def test_header_that_is_no_time_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        deadlines_of(request_with(("X-Request-Timeout", value)), LIMITS, arrived_at=0.0)
    assert caught.value.param == "X-Request-Timeout"


def test_work_before_the_engine_is_bounded() -> None:
    async def main() -> None:
        async with Deadlines(LIMITS, arrived_at=-1000.0, clock=lambda: 0.0).bounding():
            await asyncio.Event().wait()

    with pytest.raises(DeadlineError):
        asyncio.run(main())


def test_time_limit_of_somebody_else_stays_what_it_is() -> None:
    async def main() -> None:
        async with Deadlines(LIMITS, arrived_at=0.0, clock=lambda: 0.0).bounding():
            raise TimeoutError

    with pytest.raises(TimeoutError):
        asyncio.run(main())


@pytest.fixture(scope="module")
def live(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    http = {"stall_timeout_s": 0.2}
    state = tmp_path_factory.mktemp("state")
    with live_server(state, models={"base": family / "base"}, settings={"http": http}) as server:
        server.until_ready()
        yield server


def nothing_is_left(live: LiveServer) -> bool:
    running = live.metric('linker_num_requests_running{model="base"}')
    return running == 0 and not live.services.engine.client._mailboxes


def test_stream_that_stands_still_ends_with_an_error_and_frees_its_sequence(
    live: LiveServer,
) -> None:
    response = live.complete("base", [Fault.MUTE, 50], max_tokens=50, stream=True)
    assert response.status_code == 200
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    error = json.loads(blocks[-3].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
    live.until(lambda: nothing_is_left(live))


@pytest.mark.parametrize("n", [1, 3])
def test_waiting_client_of_an_answer_that_stands_still_gets_504(live: LiveServer, n: int) -> None:
    response = live.complete("base", [Fault.WAIT, 50], max_tokens=50, n=n)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["Retry-After"] == "2"
    live.until(lambda: nothing_is_left(live))
    assert live.metric('linker_rejections_total{reason="deadline_exceeded"}') > 0


def test_header_ends_an_answer_that_goes_on(live: LiveServer) -> None:
    body = {"model": "base", "prompt": [Fault.SLOW, 50], "max_tokens": 150, "ignore_eos": True}
    headers = {"X-Request-Timeout": "0.4"}
    response = live.client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 504
    assert "0.4 s" in response.json()["error"]["message"]
    live.until(lambda: nothing_is_left(live))


def test_bad_header_is_400(live: LiveServer) -> None:
    body = {"model": "base", "prompt": [50]}
    response = live.client.post("/v1/completions", json=body, headers={"X-Request-Timeout": "soon"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_answer_without_a_first_token_is_504_before_anything_is_sent(
    tmp_path: Path, family: Path, *, stream: bool
) -> None:
    http = {"first_token_timeout_s": 0.2}
    with live_server(tmp_path, models={"base": family / "base"}, settings={"http": http}) as live:
        live.until_ready()
        response = live.complete("base", [Fault.HANG, 50], stream=stream)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        live.services.engine.kill()
