"""Going from view to view, and back."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.parts import go_to, row_of
from tests.browser.visitor import Visitor
from tests.server.live import LiveServer


@pytest.fixture
def page(showroom: LiveServer, visitor: Visitor) -> Page:
    page = visitor.open(showroom, size={"width": 1280, "height": 400}).page
    expect(row_of(page, "far")).to_contain_text("ready")
    return page


def test_title_and_focus_follow_the_view(page: Page) -> None:
    expect(page).to_have_title("Overview · LinkerLLM")
    go_to(page, "Sharing")
    expect(page).to_have_title("Sharing · LinkerLLM")
    expect(page.get_by_role("heading", name="Sharing", level=1)).to_be_focused()
    page.go_back()
    expect(page).to_have_title("Overview · LinkerLLM")
    expect(page.get_by_role("heading", name="Overview", level=1)).to_be_focused()
