"""A connection that has died without a word, and a tab that nobody sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Route

from tests.browser.chromium import DEADLINE_MS
from tests.browser.stage import ORIGIN, Stage, staged

_FOLLOW = """() => {
  window.states = [];
  import("/ui/follow.js").then(({follow}) => follow("/models/events", () => {},
    new AbortController().signal, (state) => window.states.push(state)));
}"""
_SHOW = """(isHidden) => {
  Object.defineProperty(document, "hidden", {configurable: true, get: () => isHidden});
  document.dispatchEvent(new Event("visibilitychange"));
}"""


class Silent:
    """A server that takes requests for events and never says anything."""

    def __init__(self, stage: Stage) -> None:
        self.page = stage.page
        self.asked = 0
        self.is_there = True
        self.questions = 0
        stage.watch.forgive("/models/events|/ui/session", None)
        stage.page.clock.install()
        stage.page.route(f"{ORIGIN}/models/events", self._hold)
        stage.page.route(f"{ORIGIN}/ui/session", self._answer)
        with stage.page.expect_request(f"{ORIGIN}/models/events"):
            stage.page.evaluate(_FOLLOW)

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.page.clock.run_for(1000)

    def pass_time_until(self, condition: Callable[[], bool]) -> None:
        """Lets time pass for as long as it takes: answers come in the time of the machine."""
        give_up_at = time.monotonic() + DEADLINE_MS / 1000
        while not condition():
            assert time.monotonic() < give_up_at
            self.pass_time(1)

    def _hold(self, _: Route) -> None:
        self.asked += 1

    def _answer(self, route: Route) -> None:
        self.questions += 1
        if self.is_there:
            route.fulfill(json={"role": "admin"})
        else:
            route.abort("connectionrefused")


@pytest.fixture
def silent(browser: Browser) -> Iterator[Silent]:
    with staged(browser) as stage:
        yield Silent(stage)


def test_server_that_is_silent_and_there_is_left_alone(silent: Silent) -> None:
    silent.pass_time_until(lambda: silent.questions > 1)
    assert silent.asked == 1


def test_server_that_is_silent_and_gone_is_asked_anew(silent: Silent) -> None:
    silent.is_there = False
    silent.pass_time_until(lambda: silent.asked > 1)
    assert silent.page.evaluate("window.states[0]") == "lost"


def test_connection_is_begun_anew_after_the_machine_has_slept(silent: Silent) -> None:
    silent.page.clock.fast_forward(120_000)
    silent.pass_time_until(lambda: silent.asked > 1)


def test_connection_of_a_tab_that_is_seen_again_is_begun_anew(silent: Silent) -> None:
    silent.page.evaluate(_SHOW, True)
    silent.pass_time(30)
    assert silent.questions == 0
    silent.page.evaluate(_SHOW, False)
    silent.pass_time_until(lambda: silent.asked > 1)


def test_tab_that_nobody_sees_gives_its_connection_back(silent: Silent) -> None:
    silent.page.evaluate(_SHOW, True)
    silent.pass_time_until(lambda: silent.page.evaluate("states.includes('connecting')"))
    silent.pass_time(70)
    assert silent.asked == 1
    with silent.page.expect_request(f"{ORIGIN}/models/events"):
        silent.page.evaluate(_SHOW, False)
