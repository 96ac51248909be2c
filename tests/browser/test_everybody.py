"""Every view for everybody: both themes, wide and narrow, by keyboard alone, without motion."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from playwright.sync_api import Page, ViewportSize, expect

from tests.browser.parts import (
    ask,
    expect_ended,
    go_to,
    limit_tokens,
    models,
    onboarding_form,
    open_tables,
    row_of,
    said,
)
from tests.browser.visitor import NARROW, WIDE, Visitor, until_drawn
from tests.server.live import LiveServer

VIEWS = ("Overview", "Sharing", "Analysis", "Chat")
CHARTS = {"Overview": re.compile("4 models hold"), "Sharing": re.compile("3 variants by 4 blocks")}


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_usable(
    showroom: LiveServer, visitor: Visitor, scheme: Literal["light", "dark"], size: ViewportSize
) -> None:
    page = visitor.open(showroom, size=size, scheme=scheme).page
    expect(row_of(page, "far")).to_contain_text("ready")
    for view in VIEWS:
        go_to(page, view)
        expect(page.get_by_role("heading", level=1, name=view)).to_be_visible()
        if view in CHARTS:
            expect(page.get_by_role("img", name=CHARTS[view])).to_be_visible()
        open_tables(page)
        visitor.inspect(page, f"view-{view.lower()}-{size['width']}-{scheme}")


def test_theme_follows_the_system_until_somebody_chooses(
    showroom: LiveServer, visitor: Visitor
) -> None:
    page = visitor.open(showroom, scheme="dark").page
    root = page.locator("html")
    expect(root).to_have_attribute("data-theme", "dark")
    page.emulate_media(color_scheme="light")
    expect(root).to_have_attribute("data-theme", "light")
    page.get_by_role("button", name="Dark theme").click()
    expect(root).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(root).to_have_attribute("data-theme", "dark")
    page.get_by_role("button", name="Light theme").click()
    expect(root).to_have_attribute("data-theme", "light")


def test_motion_is_left_out_where_it_is_unwanted(showroom: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(showroom, motion="reduce").page
    expect(row_of(page, "far")).to_contain_text("ready")
    moving = "() => document.getAnimations().filter((each) => each.playState === 'running').length"
    page.wait_for_function(f"() => ({moving})() === 0")
    longest = """() => Math.max(...[...document.querySelectorAll("*")].flatMap((node) => {
      const {transitionDuration, animationDuration} = getComputedStyle(node);
      return `${transitionDuration},${animationDuration}`.split(",").map(parseFloat);
    }))"""
    assert page.evaluate(longest) < 0.05  # seconds


def press_until(page: Page, key: str, role: str, name: str, *, at_most: int = 80) -> None:
    """Presses a key until the focus is where it is wanted; every stop on the way is visible."""
    wanted = page.get_by_role(role, name=name, exact=True).first  # type: ignore[arg-type]
    for _ in range(at_most):
        page.keyboard.press(key)
        if wanted.evaluate("(node) => node === document.activeElement"):
            return
    message = f"no {role} {name} is reached by {key}"
    raise AssertionError(message)


def test_whole_page_is_used_by_keyboard_alone(showroom: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(showroom).page
    expect(row_of(page, "far")).to_contain_text("ready")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    visitor.picture(page, "keyboard-skip")
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    press_until(page, "Tab", "button", "Unload near")
    press_until(page, "Tab", "textbox", "Name")
    page.keyboard.type("acme/typed")
    expect(onboarding_form(page).get_by_label("Name")).to_have_value("acme/typed")
    press_until(page, "Shift+Tab", "link", "Chat")
    page.keyboard.press("Enter")
    press_until(page, "Tab", "combobox", "Left model")
    page.keyboard.press("f")
    expect(page.get_by_label("Left model")).to_have_value("far")
    press_until(page, "Tab", "textbox", "Prompt")
    page.keyboard.type("Once upon a time")
    page.keyboard.press("Enter")
    expect(said(page, "Left")).to_contain_text(re.compile("far.+", re.DOTALL))


def test_focus_is_always_to_be_seen(showroom: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(showroom).page
    expect(row_of(page, "far")).to_contain_text("ready")
    expect(page.get_by_role("img", name=CHARTS["Overview"])).to_be_visible()
    until_drawn(page)  # else what has the focus is moved away
    marked = """() => {
      const node = document.activeElement;
      const style = getComputedStyle(node);
      const box = node.getBoundingClientRect();
      const inside = box.bottom > 0 && box.top < innerHeight && box.width > 0 && box.height > 0;
      const ring = parseFloat(style.outlineWidth) >= 1 && style.outlineStyle !== "none";
      return [node.tagName, node.textContent.slice(0, 40), inside && ring];
    }"""
    for _ in range(30):
        page.keyboard.press("Tab")
        tag, text, is_seen = page.evaluate(marked)
        if tag == "BODY":
            break  # around once
        assert is_seen, (tag, text)


def test_page_works_before_its_charts_can_be_had(showroom: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(showroom, missing="plotly.min.js").page
    expect(models(page).get_by_role("row")).to_have_count(5)
    expect(page.get_by_text("could not be loaded").first).to_be_visible()
    expect(page.get_by_role("table", name="Weights, and what separate")).to_contain_text("near")
    go_to(page, "Chat")
    limit_tokens(page, 8)
    ask(page, "Once")
    expect_ended(page)
