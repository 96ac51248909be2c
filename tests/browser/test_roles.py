"""What each key lets its owner see and do, and where keys stay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from server.registry.keys import MadeKey
from server.registry.records import Role
from tests.browser.conftest import LIMITS
from tests.browser.parts import ask, choose, expect_ended, limit_tokens, said, views
from tests.browser.visitor import Visitor, Window
from tests.server.keyed import give_key, revoke_key
from tests.server.live import LiveServer, live_server

VIEWS = ["Overview", "Sharing", "Analysis", "Chat"]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def admin(state: Path) -> str:
    """A key of an operator; from the first key on, a server asks for one."""
    return give_key(state, Role.ADMIN).key


@pytest.fixture
def client(state: Path) -> str:
    return give_key(state, Role.CLIENT).key


@pytest.fixture
def watcher(state: Path) -> MadeKey:
    """A key of who reads metrics."""
    return give_key(state, Role.METRICS)


@pytest.fixture
def keyed(
    state: Path, admin: str, client: str, watcher: MadeKey, faulty_family: Path
) -> Iterator[LiveServer]:
    assert len({admin, client, watcher.key}) == 3
    models = {name: faulty_family / name for name in ("base", "near")}
    with live_server(state, models=models, root=faulty_family, limits=LIMITS) as live:
        live.until_ready()
        yield live


def sign_in(page: Page, key: str) -> None:
    asking = page.get_by_role("region", name="This server asks for a key")
    asking.get_by_label("Key").fill(key)
    asking.get_by_role("button", name="Use this key").click()


def opened(visitor: Visitor, live: LiveServer, key: str) -> Window:
    window = visitor.open(live)
    sign_in(window.page, key)
    expect(window.page.get_by_role("heading", name="This server asks")).to_be_hidden()
    return window


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def expect_nothing_left(page: Page, *texts: str) -> None:
    """Neither in sight nor out of it, nor in a field."""
    expect(page.locator("#models tbody tr, #jobs li, .turn")).to_have_count(0)
    held = "() => [document.body.textContent, ...[...document.querySelectorAll('input, textarea')]"
    everything = "".join(page.evaluate(f"{held}.map((field) => field.value)]"))
    assert not any(text in everything for text in texts)


def test_without_a_key_there_is_nothing_but_the_question_for_one(
    keyed: LiveServer, visitor: Visitor
) -> None:
    page = visitor.open(keyed).page
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    expect(views(page)).to_have_count(0)
    expect(page.get_by_text("near").filter(visible=True)).to_have_count(0)
    visitor.inspect(page, "keys-asked")


def test_wrong_key_is_refused_in_words_and_a_good_one_is_taken_after_it(
    keyed: LiveServer, visitor: Visitor, admin: str
) -> None:
    page, watch = visitor.open(keyed)
    watch.forgive("/ui/session", 401)
    sign_in(page, "sk-linker-of-somebody-else")
    expect(page.get_by_role("alert").filter(has_text="This key is not known")).to_be_visible()
    visitor.inspect(page, "keys-refused")
    sign_in(page, admin)
    expect(page.get_by_role("rowheader", name="near")).to_be_visible()
    expect(views(page)).to_have_text(VIEWS)


def test_metrics_key_reads_everything_and_changes_nothing(
    keyed: LiveServer, visitor: Visitor, watcher: MadeKey
) -> None:
    page = opened(visitor, keyed, watcher.key).page
    models = page.get_by_role("table", name="Models")
    expect(models.get_by_role("rowheader", name="near")).to_be_visible()
    expect(views(page)).to_have_text(VIEWS[:3])
    expect(page.get_by_role("heading", name="Onboard a model")).to_have_count(0)
    expect(models.get_by_role("columnheader", name="Actions")).to_have_count(0)
    expect(models.get_by_role("button")).to_have_count(0)
    expect(page.get_by_role("region", name="Jobs").get_by_role("button")).to_have_count(0)
    visitor.inspect(page, "keys-metrics")


def test_client_key_may_talk_and_sees_no_more_than_models_to_talk_to(
    keyed: LiveServer, visitor: Visitor, client: str
) -> None:
    page = opened(visitor, keyed, client).page
    expect(page.get_by_role("heading", name="Chat", exact=True)).to_be_attached()
    expect(views(page)).to_have_text(["Chat"])
    expect(page.get_by_role("table", name="Models")).to_have_count(0)
    expect(page.get_by_role("group", name="State of the server")).to_be_hidden()
    visitor.inspect(page, "keys-client")


def test_address_of_a_view_that_a_key_does_not_open_leads_to_one_that_it_does(
    keyed: LiveServer, visitor: Visitor, watcher: MadeKey
) -> None:
    page = visitor.open(keyed, path="/ui#talk").page
    sign_in(page, watcher.key)
    expect(page.get_by_role("table", name="Models")).to_be_visible()
    expect(page.get_by_role("heading", name="Chat", exact=True)).to_be_hidden()


def test_key_stays_in_its_tab_and_out_of_every_address(
    keyed: LiveServer, visitor: Visitor, admin: str
) -> None:
    page, watch = opened(visitor, keyed, admin)
    expect(page.get_by_role("rowheader", name="near")).to_be_visible()
    page.reload()
    expect(page.get_by_role("rowheader", name="near")).to_be_visible()
    kept = "() => [document.cookie, document.body.innerHTML, ...Object.values(localStorage)]"
    assert not any(admin in text for text in page.evaluate(kept))
    addresses = [request.url for request in watch.requests()]
    assert addresses
    assert not any(admin in address for address in addresses)
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.get_by_role("heading", name="This server asks for a key")).to_be_visible()


def test_forgotten_key_is_asked_for_again(keyed: LiveServer, visitor: Visitor, admin: str) -> None:
    page = opened(visitor, keyed, admin).page
    page.get_by_role("button", name="Key: Admin").click()
    dialog = page.get_by_role("dialog", name="Key")
    expect(dialog).to_be_visible()
    visitor.inspect(page, "keys-dialog")
    dialog.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    expect_nothing_left(page, "near")


def test_nothing_of_a_conversation_is_left_of_a_key_that_was_forgotten(
    keyed: LiveServer, visitor: Visitor, client: str, admin: str
) -> None:
    page = opened(visitor, keyed, client).page
    choose(page, "Left", "near")
    choose(page, "Right", "Nobody")
    limit_tokens(page, 100)
    ask(page, "<|pause|>one two zebras")
    expect(said(page, "Left")).to_contain_text(re.compile("(two zebras.*){3}", re.DOTALL))
    page.get_by_role("button", name="Key: Chat only").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    expect_nothing_left(page, "near", "zebras")
    idle = re.compile(r'^linker_num_requests_running\{model="near"\} 0', re.M)
    keyed.until(
        lambda: idle.search(keyed.client.get("/metrics", headers=bearer(admin)).text) is not None
    )


def test_key_that_is_revoked_while_its_owner_talks_is_asked_for_again(
    keyed: LiveServer, visitor: Visitor, state: Path
) -> None:
    made = give_key(state, Role.CLIENT)
    page, watch = opened(visitor, keyed, made.key)
    watch.forgive("/v1/models|/v1/chat/completions", 401)
    choose(page, "Left", "near")
    ask(page, "hello there")
    expect_ended(page)
    revoke_key(state, made)
    keyed.until(lambda: keyed.client.get("/v1/models", headers=bearer(made.key)).is_client_error)
    ask(page, "hello again")
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="This key is not known")).to_be_visible()
    expect_nothing_left(page, "near", "hello")


@pytest.mark.parametrize("key", ["schlüssel", "sk-linker-…", "two words"])
def test_what_cannot_be_a_key_is_said_to_be_none_and_sent_nowhere(
    keyed: LiveServer, visitor: Visitor, key: str
) -> None:
    page, watch = visitor.open(keyed)
    sign_in(page, key)
    expect(page.get_by_role("alert").filter(has_text="A key has no spaces")).to_be_visible()
    expect(page.get_by_role("textbox", name="Key")).to_be_focused()
    assert len(watch.requests("/ui/session")) == 1
    assert page.evaluate("sessionStorage.length") == 0


def test_revoked_key_is_asked_for_again_when_something_happens(
    keyed: LiveServer, visitor: Visitor, state: Path, watcher: MadeKey
) -> None:
    page, watch = opened(visitor, keyed, watcher.key)
    watch.forgive("/models/.*|/models|/ui/session", 401)
    expect(page.get_by_role("rowheader", name="near")).to_be_visible()
    revoke_key(state, watcher)
    keyed.services.engine.kill()  # which is told to everybody who follows
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    expect_nothing_left(page, "near")


def test_server_without_keys_asks_for_none(faulty: LiveServer, visitor: Visitor) -> None:
    page = visitor.open(faulty).page
    expect(page.get_by_role("rowheader", name="near")).to_be_visible()
    expect(views(page)).to_have_text(VIEWS)
    expect(page.get_by_role("button", name="Key")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0
