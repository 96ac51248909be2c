"""What comes late, or after it was given up, changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.chromium import until
from tests.browser.parts import ask, choose, expect_ended, limit_tokens, said, side
from tests.browser.stage import ORIGIN, Stage, card, staged
from tests.browser.visitor import Visitor, Window
from tests.server.live import LiveServer

PAUSE = "<|pause|>one two three"  # which the fake engine says twice, and then no more
JOB = {"id": "j", "model": "m", "created_at": 1.0, "finished_at": None, "error": None}
RUNNING = JOB | {"status": "running"}
_FOLLOW = """async () => {
  const {keepUp} = await import("/ui/feed.js");
  void keepUp(new AbortController().signal);
}"""
_REMAKE = """async () => {
  const {h, fill, keep} = await import("/ui/dom.js");
  const list = h("ul");
  const draw = (text) => keep(list, [["a"], ["b"]], () => h("li", {}, text), () => {});
  draw("old");
  fill(list);
  draw("new");
  return [...list.children].map((item) => item.textContent);
}"""
_ONBOARD = """async (job) => {
  const {store, changed} = await import("/ui/store.js");
  const {h} = await import("/ui/dom.js");
  store.session = {role: "admin", keys_required: false, version: null};
  store.jobs.set(job.id, job);
  const section = h("section", {}, h("header", {class: "card-head"}));
  document.body.append(section);
  (await import("/ui/onboard.js")).mount(section);
}"""


@pytest.fixture
def window(faulty: LiveServer, visitor: Visitor) -> Window:
    """The chat, both sides of which are in the midst of an answer."""
    window = visitor.open(faulty, path="/ui#talk")
    page = window.page
    expect(page.get_by_label("Left model")).to_have_value("near")
    limit_tokens(page, 100)
    choose(page, "Right", "base")
    ask(page, PAUSE)
    for name in ("Left", "Right"):
        expect(said(page, name)).to_contain_text(re.compile("(two three.*){3}", re.DOTALL))
    return window


@pytest.fixture
def stage(browser: Browser) -> Iterator[Stage]:
    with staged(browser) as opened:
        yield opened


def sent(window: Window, model: str) -> list[dict[str, str]]:
    """Returns the messages that a model was asked with last."""
    asked = window.watch.requests("/v1/chat/completions")
    bodies = [json.loads(each.post_data or "") for each in asked]
    messages: list[dict[str, str]] = [b for b in bodies if b["model"] == model][-1]["messages"]
    return messages


def ask_next(page: Page) -> None:
    ask(page, "next")
    expect_ended(page)


def test_what_is_cleared_in_the_midst_of_an_answer_is_not_sent_again(window: Window) -> None:
    page = window.page
    page.get_by_role("button", name="Clear").click()
    expect_ended(page)
    expect(page.get_by_text("answers are the same")).to_have_count(0)
    ask_next(page)
    for model in ("near", "base"):
        assert sent(window, model) == [{"role": "user", "content": "next"}]


def test_another_model_does_not_inherit_the_answer_that_was_coming(
    faulty: LiveServer, window: Window
) -> None:
    page = window.page
    choose(page, "Left", "base")
    faulty.until(lambda: faulty.metric('linker_num_requests_running{model="near"}') == 0)
    page.get_by_role("button", name="Stop").click()
    expect_ended(page)
    expect(side(page, "Left").get_by_text("tokens out")).to_have_count(0)
    choose(page, "Right", "Nobody")
    ask_next(page)
    assert sent(window, "base") == [{"role": "user", "content": "next"}]


def test_rows_that_were_thrown_away_are_made_anew(stage: Stage) -> None:
    """As the rows of models are, which have buttons for some and none for others."""
    assert stage.page.evaluate(_REMAKE) == ["new", "new"]


def events(*given: dict[str, Any]) -> dict[str, Any]:
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in given)
    return {"body": body, "content_type": "text/event-stream"}


def test_details_of_an_earlier_plan_that_come_late_are_passed_over(stage: Stage) -> None:
    old = card("v", donor="base", unique=1)
    new = old | {"plan": old["plan"] | {"digest": "new"}}
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    stage.watch.forgive("/models/events", None)
    changes = ({"type": "snapshot", "models": [old], "jobs": []}, {"type": "model", "model": new})
    stage.page.route(f"{ORIGIN}/models/jobs", lambda route: route.fulfill(json={"data": []}))
    stage.page.route(f"{ORIGIN}/models?*", hold)
    detail: dict[str, Any] = {"blocks": [], "frontier": None}
    stage.page.route(
        f"{ORIGIN}/models/v?*", lambda route: route.fulfill(json=new | {"details": detail})
    )
    stage.page.route(f"{ORIGIN}/models/events", lambda route: route.fulfill(**events(*changes)))
    stage.page.evaluate(_FOLLOW)
    stage.until("store", "m.store.details.has('v')")
    until(stage.page, lambda: held != [])
    late = [{"index": 0, "cos": 1, "epsilon": 0, "rung": "alias", "unique_bytes": 0}]
    with stage.page.expect_response(f"{ORIGIN}/models?*"):
        held[0].fulfill(json={"data": [old | {"details": {"blocks": late, "frontier": None}}]})
    stage.page.evaluate("new Promise((resolve) => setTimeout(resolve))")
    assert stage.call("store", "m.store.details.get('v').blocks") == []


def test_jobs_of_a_server_that_began_anew_are_gone(stage: Stage) -> None:
    snapshot: dict[str, Any] = {"type": "snapshot", "models": [], "jobs": []}
    streams = [events(snapshot, {"type": "job", "job": RUNNING}), events(snapshot)]

    def answer(route: Route) -> None:
        route.fulfill(**(streams.pop(0) if len(streams) > 1 else streams[0]))

    stage.page.route(f"{ORIGIN}/models/events", answer)
    for path in ("jobs", "?*"):
        url = f"{ORIGIN}/models{'' if path == '?*' else '/'}{path}"
        stage.page.route(url, lambda route: route.fulfill(json={"data": []}))
    stage.page.evaluate(_FOLLOW)
    stage.until("store", "m.store.jobs.has('j')")
    stage.until("store", "!m.store.jobs.has('j')")


def test_job_that_has_ended_before_it_was_answered_stays_so(stage: Stage) -> None:
    page = stage.page
    page.evaluate(_ONBOARD, JOB | {"status": "failed", "finished_at": 2.0})
    queued = JOB | {"status": "queued"}
    page.route(f"{ORIGIN}/models", lambda route: route.fulfill(status=202, json=queued))
    page.get_by_label("Name").fill("m")
    page.get_by_label("Source").fill("/m")
    page.get_by_role("button", name="Onboard").click()
    expect(page.get_by_text("m was not onboarded")).to_be_visible()
    assert stage.call("store", "m.store.jobs.get('j').status") == "failed"


def test_answer_that_is_no_json_is_a_failure_to_answer(stage: Stage) -> None:
    """As a proxy's page is, so that whoever asks asks again."""
    stage.page.route(f"{ORIGIN}/ui/session", lambda route: route.fulfill(body="<html>"))
    said = "m.request('GET', '/ui/session').catch((error) => [error.name, error.status])"
    assert stage.call("api", f"await {said}") == ["ApiError", 0]
