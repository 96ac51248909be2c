"""Talking to two models side by side."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.parts import (
    ask,
    choose,
    expect_ended,
    figure_of,
    go_to,
    limit_tokens,
    row_of,
    said,
    side,
)
from tests.browser.visitor import NARROW, Visitor
from tests.server.live import LiveServer


@pytest.fixture
def page(faulty: LiveServer, visitor: Visitor) -> Page:
    """The chat over the fake engine, which says a prompt again."""
    page = visitor.open(faulty, path="/ui#talk").page
    expect(page.get_by_label("Left model")).to_have_value("near")
    limit_tokens(page, 150)
    return page


def expect_hushed(page: Page) -> None:
    """Nothing is said of both sides, nor to those who listen."""
    news = page.get_by_role("region", name="Two answers").get_by_role("status")
    expect(news).to_have_text("")
    expect(page.get_by_text("answers are the same")).to_have_count(0)


def test_two_variants_of_the_real_engine_answer_one_prompt(
    showroom: LiveServer, visitor: Visitor
) -> None:
    page = visitor.open(showroom).page
    expect(row_of(page, "far")).to_contain_text("ready")
    go_to(page, "Chat")
    choose(page, "Left", "near")
    choose(page, "Right", "far")
    limit_tokens(page, 24)
    ask(page, "Once upon a time")
    expect_ended(page)
    for name, model in (("Left", "near"), ("Right", "far")):
        expect(said(page, name)).to_contain_text(re.compile("You.*Once upon a time", re.DOTALL))
        body = {"temperature": 0, "max_tokens": 24}
        answer = showroom.chat(model, "Once upon a time", **body).json()
        text = " ".join(answer["choices"][0]["message"]["content"].split())
        shown = " ".join(said(page, name).inner_text().split())
        assert shown.endswith(text)
        used = answer["usage"]
        assert used["completion_tokens"] > 0
        expect(side(page, name)).to_contain_text(f"{used['prompt_tokens']} in")
        expect(side(page, name)).to_contain_text(f"{used['completion_tokens']} token")
    visitor.inspect(page, "chat-two-variants")


def test_one_variant_answers_as_planned_and_unshared(
    showroom: LiveServer, visitor: Visitor
) -> None:
    page, watch = visitor.open(showroom, path="/ui#talk")
    choose(page, "Left", "far", "Planned")
    choose(page, "Right", "far", "Unshared")
    limit_tokens(page, 8)
    ask(page, "Once upon a time")
    expect_ended(page)
    asked = [json.loads(each.post_data or "") for each in watch.requests("/v1/chat/completions")]
    assert [body["variant_mode"] for body in asked] == ["planned", "unshared"]
    for name in ("Left", "Right"):
        expect(side(page, name)).to_contain_text(re.compile(r"\d+ in, \d+ tokens? out"))
        expect(side(page, name).get_by_role("alert")).to_be_hidden()
    visitor.inspect(page, "chat-planned-unshared")


def test_donor_has_no_unshared_weights_to_choose(page: Page) -> None:
    choose(page, "Left", "near")
    expect(page.get_by_label("Left weights")).to_be_visible()
    choose(page, "Left", "base")
    expect(page.get_by_label("Left weights")).to_be_hidden()


def test_answer_grows_as_it_comes_and_is_stopped_on_both_sides(
    faulty: LiveServer, page: Page
) -> None:
    choose(page, "Left", "base")
    choose(page, "Right", "near")
    ask(page, "<|slow|>one two three four five")  # 150 of each, 50 ms apart
    stop = page.get_by_role("button", name="Stop")
    for name in ("Left", "Right"):
        expect(said(page, name)).to_contain_text(re.compile("(one two.*){2}", re.DOTALL))
    expect(stop).to_be_visible()
    expect(figure_of(page, "running")).to_have_text("2")
    stop.click()
    expect_ended(page)
    for model in ("base", "near"):
        line = f'linker_num_requests_running{{model="{model}"}}'
        faulty.until(lambda line=line: faulty.metric(line) == 0)  # type: ignore[misc]
    expect(page.get_by_label("Prompt", exact=True)).to_be_editable()
    expect(side(page, "Left").get_by_role("alert")).to_be_hidden()  # it was asked for


def test_answers_that_are_under_way_are_usable(page: Page, visitor: Visitor) -> None:
    ask(page, "<|pause|>hello there")  # which is answered and never ended
    for name in ("Left", "Right"):
        expect(said(page, name)).to_contain_text(re.compile("(hello there.*){3}", re.DOTALL))
    visitor.inspect(page, "chat-streaming")


def test_rate_is_that_of_now_and_falls_to_nothing_afterwards(page: Page) -> None:
    rate = figure_of(page, "tok/s")
    choose(page, "Right", "Nobody")
    ask(page, "<|slow|>one two three four five")
    expect(rate).to_contain_text(re.compile(r"[1-9]"))
    expect_ended(page)
    expect(rate).to_have_text("0")


def test_system_prompt_and_what_was_said_before_are_sent(page: Page) -> None:
    choose(page, "Right", "Nobody")
    page.get_by_label("System prompt").fill("be brief ")
    page.get_by_label("Most tokens").fill("40")
    ask(page, "hello ")
    expect_ended(page)
    ask(page, "again")
    expect_ended(page)
    # The template has no headers, and the engine says the whole prompt again.
    expect(said(page, "Left")).to_contain_text(re.compile(r"be brief ?hello ?be brief.*again"))


def test_clearing_begins_anew(page: Page) -> None:
    ask(page, "hello there")
    expect_ended(page)
    page.get_by_role("button", name="Clear").click()
    expect(said(page, "Left")).not_to_contain_text("hello")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect_hushed(page)


def test_what_was_said_of_both_is_gone_when_one_side_has_another_model(page: Page) -> None:
    ask(page, "hello there")
    expect_ended(page)
    expect(page.get_by_text("Both answers are the same.").first).to_be_visible()
    choose(page, "Left", "base")
    expect_hushed(page)


def test_nobody_on_either_side_is_said_and_the_prompt_is_kept(page: Page, visitor: Visitor) -> None:
    choose(page, "Left", "Nobody")
    choose(page, "Right", "Nobody")
    ask(page, "hello there")
    expect(page.get_by_role("alert").filter(has_text="Nobody is asked")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("hello there")
    visitor.inspect(page, "chat-nobody")


@pytest.mark.parametrize(
    ("label", "value", "complaint"),
    [
        ("Temperature", "2.5", "from 0 to 2"),
        ("Temperature", "-1", "from 0 to 2"),
        ("Most tokens", "0", "from 1 on"),
        ("Most tokens", "1.5", "from 1 on"),
    ],
)
def test_option_out_of_its_bounds_is_refused_at_its_field(
    page: Page, label: str, value: str, complaint: str
) -> None:
    field = page.get_by_label(label)
    field.fill(value)
    ask(page, "hello there")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_accessible_description(re.compile(complaint))
    expect(field).to_be_focused()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("hello there")
    expect(said(page, "Left")).not_to_contain_text("hello")


def test_enter_sends_and_shift_enter_begins_a_line(page: Page) -> None:
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect_ended(page)
    expect(said(page, "Left")).to_contain_text("one\ntwo", use_inner_text=True)
    expect(prompt).to_have_value("")


def test_answer_is_read_out_once_it_has_ended_and_not_token_by_token(page: Page) -> None:
    expect(said(page, "Left")).to_have_attribute("aria-live", "off")
    news = page.get_by_role("region", name="Two answers").get_by_role("status")
    choose(page, "Right", "Nobody")
    ask(page, "hello")
    expect_ended(page)
    expect(news).to_contain_text(re.compile("hello"))


def test_request_that_fails_says_why_on_its_side(faulty: LiveServer, visitor: Visitor) -> None:
    page, watch = visitor.open(faulty, path="/ui#talk")
    watch.forgive("/v1/chat/completions", 500)
    limit_tokens(page, 100)
    choose(page, "Right", "Nobody")
    ask(page, "<|fail|>")
    expect_ended(page)
    expect(side(page, "Left").get_by_role("alert")).to_contain_text("not finite")
    expect(side(page, "Left")).not_to_contain_text(re.compile(" in, "))
    expect(said(page, "Left").get_by_text("You", exact=True)).to_have_count(0)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("<|fail|>")
    visitor.inspect(page, "chat-failed")


def test_option_that_cannot_be_honoured_is_refused_in_words(
    faulty: LiveServer, visitor: Visitor
) -> None:
    page, watch = visitor.open(faulty, path="/ui#talk")
    watch.forgive("/v1/chat/completions", 400)
    limit_tokens(page, 100_000)
    ask(page, "hello")
    expect(side(page, "Left").get_by_role("alert")).to_contain_text("maximum context")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("hello")


def test_model_deleted_meanwhile_is_no_choice_any_more(faulty: LiveServer, page: Page) -> None:
    choices = page.get_by_label("Left model").get_by_role("option")
    expect(choices.filter(has_text="near")).to_have_count(1)
    assert faulty.client.delete("/models/near").is_success
    expect(choices.filter(has_text="near")).to_have_count(0)


def test_chat_fits_a_narrow_screen(faulty: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(faulty, size=NARROW, path="/ui#talk").page
    limit_tokens(page, 100)
    ask(page, "https://example.test/" + "a-long-word" * 5)
    expect_ended(page)
    visitor.inspect(page, "chat-narrow")
