"""What the other tests rely on: a page's faults are seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, Route

from tests.browser.chromium import until
from tests.browser.visitor import NARROW, grave_violations, sideways
from tests.browser.watch import Watch

ORIGIN = "http://page.test"
POLICY = "default-src 'none'; script-src 'self'; img-src 'self'; connect-src *"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context(viewport=NARROW) as context:
        yield context.new_page()


def shown(page: Page, body: str, *, script: str = "") -> Watch:
    """Opens a page of that body and script, which are all that there is at its origin."""
    watch = Watch(page, ORIGIN)

    def answer(route: Route) -> None:
        url = route.request.url
        if url == f"{ORIGIN}/":
            html = f"<!doctype html><html lang=en><title>t</title><script src=/s.js></script>{body}"
            headers = {"Content-Security-Policy": POLICY}
            route.fulfill(body=html, content_type="text/html", headers=headers)
        elif url == f"{ORIGIN}/s.js":
            route.fulfill(body=script, content_type="text/javascript")
        elif "broken" in url:
            route.abort("connectionrefused")
        else:
            route.fulfill(status=404)

    page.route("**/*", answer)
    page.goto(f"{ORIGIN}/", wait_until="networkidle")
    return watch


def test_page_without_faults_has_no_troubles(page: Page) -> None:
    watch = shown(page, "<main><h1>fine</h1></main>", script="console.log('fine')")
    assert watch.troubles == []
    assert grave_violations(page) == []
    assert sideways(page) == []


@pytest.mark.parametrize(
    ("body", "script", "said"),
    [
        ("", "console.error('e')", "console error: e"),
        ("", "console.warn('w')", "console warning: w"),
        ("", "setTimeout(() => nothing.there)", "uncaught: ReferenceError"),
        ("", "Promise.reject(new Error('lost'))", "uncaught: Error: lost"),
        ("<p style='color: red'>", "", "style-src-attr"),
        ("<script>1</script>", "", "script-src-elem"),
        ("", "fetch('http://elsewhere.test/').catch(() => 0)", "asked elsewhere: GET"),
        ("", "fetch('/absent')", "404: GET http://page.test/absent"),
        ("", "fetch('/broken').catch(() => 0)", "failed: GET http://page.test/broken"),
    ],
)
def test_faults_are_troubles(page: Page, body: str, script: str, said: str) -> None:
    watch = shown(page, body, script=script)
    until(page, lambda: any(said in trouble for trouble in watch.troubles))


def test_what_is_forgiven_is_no_trouble_and_only_that(page: Page) -> None:
    watch = Watch(page, ORIGIN)
    watch.forgive("/a.*", 404)
    watch.forgive("/broken", None)
    other = shown(page, "", script="fetch('/absent'); fetch('/broken').catch(() => 0)")
    until(page, lambda: len(other.troubles) == 2)
    assert watch.troubles == []
    page.evaluate("fetch('/missing')")
    until(page, lambda: len(watch.troubles) == 1)


def test_grave_violations_and_sideways_scrolling_are_found(page: Page) -> None:
    shown(page, "<img src=/x.png><input><table width=800><tr><td>wide</table>")
    rules = {violation.partition(":")[0] for violation in grave_violations(page)}
    assert {"image-alt", "label"} <= rules
    assert "table" in " ".join(sideways(page))
