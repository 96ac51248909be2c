"""The page over servers and engines that go, stand still and come back."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Route, expect

from tests.browser.chromium import until
from tests.browser.conftest import LIMITS
from tests.browser.parts import ask, choose, go_to, limit_tokens, row_of, server_state, side
from tests.browser.visitor import Visitor
from tests.server.live import LiveServer, live_server

EVERYTHING = "/.*"


def test_page_comes_back_after_a_restart_and_shows_what_has_changed(
    faulty_family: Path, tmp_path: Path, visitor: Visitor
) -> None:
    models = {name: faulty_family / name for name in ("base", "near")}
    with live_server(tmp_path / "state", models=models, root=faulty_family) as first:
        first.until_ready()
        page, watch = visitor.open(first)
        expect(server_state(page)).to_have_text("Ready")
        expect(row_of(page, "near")).to_contain_text("ready")
        watch.forgive(EVERYTHING, None)  # while nobody listens
        watch.forgive(EVERYTHING, 503)
    expect(server_state(page)).to_have_text("Reconnecting")
    expect(row_of(page, "near")).to_be_visible()  # as it was known last
    state = page.get_by_role("group", name="State of the server")
    expect(state).to_contain_text(re.compile("running\\s*\N{EN DASH}"))
    visitor.inspect(page, "faults-reconnecting")
    port = urlsplit(first.url).port
    assert port is not None
    with live_server(
        tmp_path / "state", port=port, models={"base": faulty_family / "base"}, root=faulty_family
    ) as second:
        second.until_ready()
        expect(server_state(page)).to_have_text("Ready")
        second.until(lambda: second.client.get("/models/near").json()["state"] == "ready")
        assert second.client.delete("/models/near").is_success
        expect(row_of(page, "near")).to_have_count(0)
        expect(row_of(page, "base")).to_contain_text("ready")
        page.close()


def test_engine_that_stands_still_is_shown_and_its_return_too(
    faulty_family: Path, tmp_path: Path, visitor: Visitor
) -> None:
    models = {name: faulty_family / name for name in ("base", "near")}
    with ExitStack() as stack:
        live = stack.enter_context(
            live_server(tmp_path / "state", models=models, root=faulty_family, limits=LIMITS)
        )
        live.until_ready()
        page, watch = visitor.open(live, path="/ui#talk")
        watch.forgive("/v1/chat/completions", 503)
        limit_tokens(page, 50)
        choose(page, "Left", "near")
        choose(page, "Right", "Nobody")
        ask(page, "<|hang|>")
        expect(server_state(page)).to_have_text(re.compile("Engine (?!running)"))
        visitor.inspect(page, "faults-engine-stalled")
        live.services.engine.kill()
        expect(side(page, "Left").get_by_role("alert")).to_contain_text("engine")
        expect(server_state(page)).to_have_text("Ready")
        page.close()


def test_engine_that_dies_ends_an_answer_with_a_reason_and_the_next_one_is_whole(
    faulty: LiveServer, visitor: Visitor
) -> None:
    page, watch = visitor.open(faulty, path="/ui#talk")
    watch.forgive("/v1/chat/completions", 503)
    limit_tokens(page, 50)
    choose(page, "Left", "near")
    choose(page, "Right", "Nobody")
    ask(page, "<|die|>hello there")
    fault = side(page, "Left").get_by_role("alert")
    expect(fault).to_be_visible()
    expect(fault).to_contain_text("engine")
    visitor.inspect(page, "faults-engine-died")
    expect(server_state(page)).to_have_text("Ready")
    faulty.until_ready()
    page.get_by_role("button", name="Clear").click()
    ask(page, "hello again")
    expect(side(page, "Left").get_by_role("log")).to_contain_text(re.compile("hello again.*hello"))
    expect(fault).to_be_hidden()


def test_server_that_goes_in_the_midst_of_an_answer_is_told_of_beside_it(
    faulty_family: Path, tmp_path: Path, visitor: Visitor
) -> None:
    models = {name: faulty_family / name for name in ("base", "near")}
    settings = {"http": {"drain_s": 0}}
    with live_server(
        tmp_path / "state", models=models, root=faulty_family, settings=settings
    ) as live:
        live.until_ready()
        page, watch = visitor.open(live, path="/ui#talk")
        watch.forgive(EVERYTHING, None)
        watch.forgive(EVERYTHING, 503)
        limit_tokens(page, 100)
        choose(page, "Right", "Nobody")
        ask(page, "<|pause|>one two three")  # an answer that does not end
        log = side(page, "Left").get_by_role("log")
        expect(log).to_contain_text(re.compile("(two three.*){3}", re.DOTALL))
    expect(side(page, "Left").get_by_role("alert")).to_be_visible()
    expect(server_state(page)).to_have_text("Reconnecting")
    visitor.inspect(page, "faults-server-gone")
    page.close()


def test_donor_in_use_is_not_deleted_and_the_row_says_why(
    faulty: LiveServer, visitor: Visitor
) -> None:
    page, watch = visitor.open(faulty)
    watch.forgive("/models/base", 409)
    row = row_of(page, "base")
    row.get_by_role("button", name="Delete base").click()
    dialog = page.get_by_role("dialog", name="Delete base?")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    expect(dialog).to_contain_text("Its weights are shared by near")
    expect(dialog.get_by_role("checkbox", name="Make near the donor")).not_to_be_checked()
    visitor.inspect(page, "faults-delete-dialog")
    dialog.get_by_role("button", name="Delete", exact=True).click()
    expect(row.get_by_role("alert")).to_contain_text("near")  # who needs it
    expect(row.get_by_role("alert")).to_contain_text("tick the box")
    expect(row.get_by_role("alert")).not_to_contain_text("rehome")
    expect(row).to_contain_text("ready")
    visitor.inspect(page, "faults-donor-in-use")


def test_question_thought_better_of_does_nothing(faulty: LiveServer, visitor: Visitor) -> None:
    page, watch = visitor.open(faulty)
    row_of(page, "near").get_by_role("button", name="Delete near").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(row_of(page, "near").get_by_role("button", name="Delete near")).to_be_focused()
    assert {request.method for request in watch.requests()} == {"GET"}


def test_button_pressed_while_a_request_is_under_way_is_answered(
    faulty: LiveServer, visitor: Visitor
) -> None:
    page, watch = visitor.open(faulty)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/models/unload", hold)
    row = row_of(page, "near")
    row.get_by_role("button", name="Unload near").click()
    row.get_by_role("button", name="Pin near", exact=True).press("Enter")
    expect(row.get_by_role("status")).to_have_text("The last request is still under way.")
    visitor.inspect(page, "faults-busy-row")
    until(page, lambda: held != [])
    held[0].continue_()
    expect(row).to_contain_text("unloaded")
    expect(row.get_by_role("status")).to_have_text("")
    assert len(held) == 1
    assert "PATCH" not in {request.method for request in watch.requests()}


def test_variant_is_unloaded_loaded_and_pinned_by_buttons(
    faulty: LiveServer, visitor: Visitor
) -> None:
    page = visitor.open(faulty).page
    row = row_of(page, "near")
    row.get_by_role("button", name="Unload near").click()
    expect(row).to_contain_text("unloaded")
    expect(page.get_by_role("region", name="Memory")).to_contain_text(
        re.compile(r"Models on the device\s*1")
    )
    load = row.get_by_role("button", name="Load near", exact=True)
    expect(load).to_be_enabled()  # once the unloading has been answered
    load.click()
    expect(row.get_by_role("button", name="Unload near")).to_be_visible()
    row.get_by_role("button", name="Pin near", exact=True).click()
    expect(row).to_contain_text("pinned")
    assert faulty.client.get("/models/near").json()["pinned"]
    row.get_by_role("button", name="Unpin near").click()
    expect(row).not_to_contain_text("pinned")
    go_to(page, "Chat")
    expect(page.get_by_label("Left model").get_by_role("option", name="near")).to_have_count(1)
