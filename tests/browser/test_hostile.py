"""Texts from outside are text, whatever they say; and the page's policy holds on its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, ViewportSize, expect

from server.registry.records import ModelState
from server.registry.store import Registry
from tests.browser.parts import (
    ask,
    choose,
    expect_ended,
    go_to,
    limit_tokens,
    models,
    onboarding,
    onboarding_form,
    said,
)
from tests.browser.visitor import NARROW, WIDE, Visitor
from tests.server.keyed import registry_url
from tests.server.live import LiveServer, live_server

IMAGE = "<img src=x onerror=\"document.title='taken'\">"
SCRIPT = "<script>document.title='taken'</script>"
LONG = "a" * 95 + "/" + "b-" * 47 + "b"  # as long as a name may be, on both sides
OWN_TITLE = re.compile(r"\bLinkerLLM$")  # before it the view's
MESSAGE = f"Tensor {IMAGE}{SCRIPT} is " + "very-" * 60 + "wrong.\u202e\u0000"


@pytest.fixture
def hostile(faulty_family: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server that knows a model of the longest name, which failed for a reason full of markup."""
    state = tmp_path / "state"
    served = {"base": faulty_family / "base", LONG: faulty_family / "near"}
    with live_server(state, models=served, root=faulty_family) as live:
        live.until_ready()
    error = {"code": "bad_checkpoint", "message": MESSAGE, "param": None}
    with closing(Registry.open_beside(registry_url(state))) as registry:
        [record] = [model for model in registry.models() if model.name == LONG]
        registry.save(replace(record, state=ModelState.FAILED, error=error))
    with live_server(state, models={"base": served["base"]}, root=faulty_family) as live:
        live.until_ready()
        yield live


def expect_untaken(page: Page) -> None:
    """Nothing of what was shown has become an element or has run."""
    expect(page).to_have_title(OWN_TITLE)
    expect(page.locator("img, iframe, object")).to_have_count(0)
    assert page.evaluate("document.querySelectorAll('body script').length") == 0


def test_answer_full_of_markup_is_shown_as_it_stands(faulty: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(faulty, path="/ui#talk").page
    limit_tokens(page, 60)
    choose(page, "Right", "Nobody")
    ask(page, IMAGE)
    expect_ended(page)
    expect(said(page, "Left")).to_contain_text(re.compile(f"{re.escape(IMAGE)}.*<img src=x"))
    expect_untaken(page)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
def test_longest_name_and_an_error_full_of_markup_are_shown_whole(
    hostile: LiveServer, visitor: Visitor, size: ViewportSize
) -> None:
    page = visitor.open(hostile, size=size).page
    expect(models(page)).to_contain_text(LONG)
    expect(models(page)).to_contain_text(IMAGE)
    expect_untaken(page)
    visitor.inspect(page, f"hostile-{size['width']}")
    go_to(page, "Sharing")
    visitor.inspect(page, f"hostile-sharing-{size['width']}")
    expect_untaken(page)


def test_name_that_is_typed_is_not_parsed(faulty: LiveServer, visitor: Visitor) -> None:
    page, watch = visitor.open(faulty)
    watch.forgive("/models", 400)
    onboarding(page, IMAGE, IMAGE)
    expect(onboarding_form(page).get_by_label("Name")).to_have_value(IMAGE)
    expect(onboarding_form(page).locator("[aria-invalid=true]")).to_have_count(1)
    expect_untaken(page)


@pytest.mark.parametrize(
    ("planted", "directive"),
    [
        (IMAGE, "script-src-attr"),
        ("<iframe src='//elsewhere.test'></iframe>", "frame-src"),
        ("<img src='//elsewhere.test/x.png'>", "img-src"),
        ("<p style='position:fixed'>over everything</p>", "style-src-attr"),
    ],
)
def test_markup_that_got_in_would_do_nothing(
    faulty: LiveServer, visitor: Visitor, planted: str, directive: str
) -> None:
    """Were a text parsed after all, the policy would still stand in its way."""
    page, watch = visitor.open(faulty)
    expect(models(page)).to_be_visible()
    watch.forgive("/x", 404)
    page.evaluate("(html) => document.body.insertAdjacentHTML('beforeend', html)", planted)
    expect(page).to_have_title(OWN_TITLE)
    while not any(directive in trouble for trouble in watch.troubles):
        page.wait_for_event("console")
    page.close()  # the browser and the watch both tell of it: neither may do so afterwards
    watch.troubles.clear()


def test_root_leads_to_the_page(faulty: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(faulty, path="/").page
    expect(page).to_have_url(f"{faulty.url}/ui")
    expect(models(page)).to_be_visible()
