"""The page's parts as people find them: by what they are and what they are called."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Locator, Page, expect


def go_to(page: Page, view: str) -> None:
    """Follows a link to one of the views."""
    page.get_by_role("navigation", name="Views").get_by_role("link", name=view).click()


def models(page: Page) -> Locator:
    return page.get_by_role("table", name="Models", exact=True)


def row_of(page: Page, model: str) -> Locator:
    head = page.get_by_role("rowheader").filter(has=page.get_by_text(model, exact=True))
    return models(page).get_by_role("row").filter(has=head)


def job_of(page: Page, model: str) -> Locator:
    """The newest of a model's jobs."""
    jobs = page.get_by_role("region", name="Jobs").get_by_role("listitem")
    return jobs.filter(has=page.get_by_text(model, exact=True)).first


def onboarding_form(page: Page) -> Locator:
    return page.get_by_role("region", name="Onboard a model")


def onboarding(page: Page, name: str, source: Path | str) -> None:
    """Fills the form in with what it needs, and sends it."""
    form = onboarding_form(page)
    form.get_by_label("Name").fill(name)
    form.get_by_label("Source").fill(str(source))
    form.get_by_label("Policy").select_option("budget")
    form.get_by_role("button", name="Onboard").click()


def server_state(page: Page) -> Locator:
    return page.get_by_role("group", name="State of the server").get_by_role("status")


def figure_of(page: Page, name: str) -> Locator:
    """One of the figures beside the server's state."""
    figures = page.get_by_role("group", name="State of the server").locator("dl > div")
    term = page.get_by_role("term").filter(has_text=re.compile(f"^{re.escape(name)}$"))
    return figures.filter(has=term).get_by_role("definition")


def views(page: Page) -> Locator:
    """The links to views that somebody has."""
    return page.get_by_role("navigation", name="Views").get_by_role("link")


def side(page: Page, name: str) -> Locator:
    """`Left` or `Right`."""
    return page.get_by_role("group", name=f"{name} side")


def said(page: Page, name: str) -> Locator:
    return side(page, name).get_by_role("log")


def choose(page: Page, name: str, model: str, weights: str | None = None) -> None:
    side(page, name).get_by_label(f"{name} model").select_option(model)
    if weights is not None:
        side(page, name).get_by_label(f"{name} weights").select_option(weights)


def ask(page: Page, text: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def limit_tokens(page: Page, tokens: int) -> None:
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("Most tokens").fill(str(tokens))


def expect_ended(page: Page) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def open_tables(page: Page) -> None:
    """Opens every chart's table in sight, all at once: charts come and go with what is known."""
    tables = page.get_by_text("Show as table").filter(visible=True)
    tables.evaluate_all("summaries => summaries.forEach(summary => summary.click())")
