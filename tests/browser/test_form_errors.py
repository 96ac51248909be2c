"""What is wrong with a form's fields is said at them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.parts import job_of, onboarding, onboarding_form, row_of
from tests.browser.visitor import NARROW, Visitor
from tests.server.fake_engine import TOO_BIG
from tests.server.live import LiveServer, live_server


@pytest.fixture
def live(faulty_family: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(
        tmp_path / "state", models={"base": faulty_family / "base"}, root=faulty_family
    ) as server:
        server.until_ready()
        yield server


def expect_fault_at(page: Page, label: str, said: str) -> None:
    """The field is marked, described by its fault, and has the focus."""
    field = onboarding_form(page).get_by_label(label, exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_accessible_description(re.compile(said))
    expect(field).to_be_focused()


def test_empty_form_says_what_it_needs(live: LiveServer, visitor: Visitor) -> None:
    page, _ = visitor.open(live)
    onboarding_form(page).get_by_role("button", name="Onboard").click()
    expect_fault_at(page, "Name", "Fill this in")
    source = onboarding_form(page).get_by_label("Source", exact=True)
    expect(source).to_have_accessible_description(re.compile("Fill this in"))
    visitor.inspect(page, "form-empty")


@pytest.mark.parametrize("name", ["../x", "x y", "<b>x</b>"])
def test_bad_name_is_refused_at_its_field(
    live: LiveServer, visitor: Visitor, faulty_family: Path, name: str
) -> None:
    page, watch = visitor.open(live)
    watch.forgive("/models", 400)
    onboarding(page, name, faulty_family / "near")
    expect_fault_at(page, "Name", "letters, digits")


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [("/etc", 403, "not inside a directory"), ("hub:x", 400, "written hub:")],
)
def test_bad_source_is_refused_at_its_field(
    live: LiveServer, visitor: Visitor, source: str, status: int, said: str
) -> None:
    page, watch = visitor.open(live)
    watch.forgive("/models", status)
    onboarding(page, "new", source)
    expect_fault_at(page, "Source", said)
    visitor.inspect(page, f"form-source-{status}")


def test_folder_that_is_not_there_is_told_of_in_the_form(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page, watch = visitor.open(live)
    watch.forgive("/models", 400)
    onboarding(page, "new", faulty_family / "absent")
    expect_fault_at(page, "Source", "cannot be opened: No such file")


def test_bad_checkpoint_is_nobodys_in_particular_where_a_donor_was_named(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page, watch = visitor.open(live)
    watch.forgive("/models", 400)
    onboarding_form(page).get_by_label("Donor").select_option("base")
    onboarding(page, "new", faulty_family / "absent")
    fault = onboarding_form(page).get_by_role("alert")
    expect(fault.filter(has_text="cannot be opened")).to_be_visible()
    expect(onboarding_form(page).locator("[aria-invalid=true]")).to_have_count(0)


@pytest.mark.parametrize(
    ("policy", "label", "text", "said"),
    [
        ("bytes", "At most", "1.2.3G", "such as 64M"),
        ("bytes", "At most", "much", "such as 64M"),
        ("budget", "Budget", "1,5", "such as 0.01"),
        ("thresholds", "Least cosine", "near", "such as 0.999"),
    ],
)
def test_what_is_no_number_is_refused_at_its_field_and_not_sent(
    live: LiveServer, visitor: Visitor, policy: str, label: str, text: str, said: str
) -> None:
    page, watch = visitor.open(live)
    form = onboarding_form(page)
    form.get_by_label("Name").fill("new")
    form.get_by_label("Source").fill("/models/new")
    form.get_by_label("Policy").select_option(policy)
    form.get_by_label(label, exact=True).fill(text)
    form.get_by_role("button", name="Onboard").click()
    expect_fault_at(page, label, said)
    assert "POST" not in {request.method for request in watch.requests()}


def test_field_is_called_by_its_label_in_what_the_server_says(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page, watch = visitor.open(live)
    watch.forgive("/models", 400)
    form = onboarding_form(page)
    form.get_by_label("Name").fill("new")
    form.get_by_label("Source").fill(str(faulty_family / "near"))
    form.get_by_label("Policy").select_option("thresholds")
    form.get_by_label("Least cosine").fill("2")
    form.get_by_role("button", name="Onboard").click()
    expect_fault_at(page, "Least cosine", "^((?!tau_cos).)*Least cosine((?!tau_cos).)*$")


def test_bad_number_is_refused_at_its_field_and_mended_there(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page, watch = visitor.open(live, size=NARROW)
    watch.forgive("/models", 400)
    form = onboarding_form(page)
    form.get_by_label("Policy").select_option("budget")
    form.get_by_label("Budget", exact=True).fill("-1")
    onboarding(page, "new", faulty_family / "near")
    expect_fault_at(page, "Budget", "at least 0")
    visitor.inspect(page, "form-number-narrow")
    form.get_by_label("Budget", exact=True).fill("0.05")
    form.get_by_role("button", name="Onboard").click()
    expect(job_of(page, "new")).to_contain_text("succeeded")
    expect(form.get_by_label("Name")).to_have_value("")  # ready for the next
    expect(form.locator("[aria-invalid=true]")).to_have_count(0)


def test_name_that_is_taken_is_refused(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page, watch = visitor.open(live)
    watch.forgive("/models", 409)
    onboarding(page, "base", faulty_family / "near")
    expect_fault_at(page, "Name", "exists with another source")


def test_what_does_not_fit_says_what_there_is(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page = visitor.open(live).page
    onboarding(page, TOO_BIG, faulty_family / "near")
    job = job_of(page, TOO_BIG)
    expect(job).to_contain_text("failed")
    expect(job.get_by_role("alert")).to_contain_text("needs 2 bytes and 1 is free")
    visitor.inspect(page, "form-does-not-fit")


def test_model_that_failed_says_why_in_its_row_and_can_be_deleted(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page = visitor.open(live).page
    onboarding(page, TOO_BIG, faulty_family / "near")
    expect(job_of(page, TOO_BIG)).to_contain_text("failed")
    row = row_of(page, TOO_BIG)
    expect(row).to_contain_text("failed")
    expect(row).to_contain_text("needs 2 bytes")
    row.get_by_role("button", name=f"Delete {TOO_BIG}").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)


def test_forms_fault_is_gone_with_the_next_attempt(
    live: LiveServer, visitor: Visitor, faulty_family: Path
) -> None:
    page, watch = visitor.open(live)
    watch.forgive("/models", 403)
    onboarding(page, "new", "/etc")
    expect_fault_at(page, "Source", "not inside")
    onboarding(page, "new", faulty_family / "near")
    expect(job_of(page, "new")).to_contain_text("succeeded")
    expect(onboarding_form(page).locator("[aria-invalid=true]")).to_have_count(0)
