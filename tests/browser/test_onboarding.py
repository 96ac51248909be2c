"""A model's way in by the form, with the real engine, scan and tuner behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import GENEROUS, ROOMY, Held
from tests.browser.parts import job_of, models, onboarding, onboarding_form, row_of
from tests.browser.visitor import Visitor
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint


@pytest.fixture
def live(family: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """The real server with a donor alone."""
    with live_server(
        tmp_path / "state",
        models={"base": family / "base"},
        root=family,
        engine_command=None,
        settings={"engine": ROOMY, "sharing": {"policy": "budget"}},
    ) as server:
        server.until_ready()
        yield server


def test_model_is_rehearsed_and_onboarded_and_the_memory_shows_it(
    live: LiveServer, visitor: Visitor, family: Path
) -> None:
    page = visitor.open(live).page
    memory = page.get_by_role("region", name="Memory")
    expect(models(page).get_by_role("row")).to_have_count(2)  # the head, and the donor
    expect(memory).to_contain_text(re.compile(r"Models on the device\s*1"))
    expect(memory.get_by_role("img", name=re.compile("^1 model hold"))).to_be_visible()

    form = onboarding_form(page)
    form.get_by_label("Name").fill("acme/near")
    form.get_by_label("Source").fill(str(family / "near"))
    form.get_by_label("Policy").select_option("budget")
    form.get_by_label("Budget", exact=True).fill(str(GENEROUS))
    form.get_by_role("button", name="Dry run").click()
    rehearsal = form.get_by_role("region", name="Dry run")
    expect(rehearsal).to_contain_text("It fits.")
    expect(rehearsal).to_contain_text(re.compile(r"Blocks\s*4 alias"))
    expect(models(page).get_by_role("row")).to_have_count(2)  # it loaded nothing
    visitor.inspect(page, "onboarding-rehearsed")

    form.get_by_role("button", name="Onboard").click()
    expect(job_of(page, "acme/near")).to_contain_text("succeeded")
    expect(job_of(page, "acme/near")).to_contain_text("nats per token")
    expect(row_of(page, "acme/near")).to_contain_text("ready")
    expect(row_of(page, "acme/near")).to_contain_text("4 alias")
    price = live.client.get("/models/acme/near").json()["plan"]["price"]
    upper = page.evaluate("(value) => String(Number(value.toPrecision(3)))", price["kl_upper"])
    expect(row_of(page, "acme/near")).to_contain_text(f"≤ {upper} of {GENEROUS}")
    expect(job_of(page, "acme/near")).to_contain_text(f"≤ {upper} nats per token")
    expect(form.get_by_role("status")).to_have_text("acme/near is onboarded.")
    expect(memory).to_contain_text(re.compile(r"Models on the device\s*2"))
    picture = memory.get_by_role("img", name=re.compile("^2 models hold"))
    held = live.client.get("/models/acme/near").json()["bytes"]
    saved = 100 * held["saved"] / (2 * held["logical"])
    expect(picture).to_have_attribute("aria-label", re.compile(f"{saved:.0f} %, are saved"))
    expect(picture.locator("svg").first).to_be_visible()
    visitor.inspect(page, "onboarding-done")


def test_job_under_way_shows_its_stage_and_is_cancelled(held: Held, visitor: Visitor) -> None:
    page = visitor.open(held.live).page
    onboarding(page, "acme/near", held.near)
    job = job_of(page, "acme/near")
    expect(job.get_by_role("listitem").filter(has_text="tuning")).to_have_attribute(
        "aria-current", "step"
    )
    bar = job.get_by_role("progressbar", name="Progress of acme/near")
    expect(bar).to_have_attribute("value", "1")  # as the tuner says, of 2
    visitor.inspect(page, "onboarding-under-way")
    job.get_by_role("button", name="Cancel acme/near").click()
    expect(job).to_contain_text("cancelled")
    told = onboarding_form(page).get_by_role("status")
    expect(told).to_have_text("acme/near was not onboarded: its job was cancelled.")
    expect(job.get_by_role("button")).to_have_count(0)
    expect(row_of(page, "acme/near")).to_have_count(0)


def test_model_that_finds_no_donor_says_why(held: Held, visitor: Visitor) -> None:
    other = make_checkpoint(held.near.parent / "other", layers=3)
    page = visitor.open(held.live).page
    form = onboarding_form(page)
    form.get_by_label("Name").fill("other")
    form.get_by_label("Source").fill(str(other))
    form.get_by_role("button", name="Onboard").click()
    expect(job_of(page, "other")).to_contain_text("A donor of its own: No resident donor has")
    expect(form.get_by_role("status")).to_contain_text(
        "It is a donor of its own: No resident donor"
    )
    head = row_of(page, "other").get_by_role("rowheader")
    expect(head).to_have_attribute("title", re.compile("No resident donor has this architecture"))
    visitor.inspect(page, "onboarding-own-family")


def test_job_of_somebody_else_is_followed(held: Held, visitor: Visitor) -> None:
    page = visitor.open(held.live).page
    expect(row_of(page, "base")).to_contain_text("ready")
    assert held.live.onboard("theirs", held.near, wait=False, policy="budget").is_success
    expect(job_of(page, "theirs").get_by_role("progressbar")).to_be_visible()
    held.let_go()
    expect(job_of(page, "theirs")).to_contain_text("succeeded")
    expect(row_of(page, "theirs")).to_contain_text("ready")
