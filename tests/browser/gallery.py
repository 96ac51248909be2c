"""Pictures of the page for the documentation: `python -m tests.browser.gallery [FOLDER]`.

They show the family of `linker demo`, which is trained first where it is not kept yet (a minute).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from playwright.sync_api import ViewportSize, expect

from server.cli.demo.family import default_cache, ensure_family
from server.cli.demo.recipes import MODELS
from server.cli.demo.tour import QUESTIONS
from tests.browser.chromium import chromium
from tests.browser.parts import ask, choose, expect_ended, go_to, row_of, server_state
from tests.browser.visitor import NARROW, WIDE, Visitor
from tests.server.live import LiveServer, live_server

FOLDER: Final = Path(__file__).resolve().parents[2] / "docs" / "images"
DONOR: Final = MODELS[0]
MAX_PICTURE_BYTES: Final = 300_000
_ENGINE: Final = {"kv_cache_tokens": 16_384, "memory_budget": "2GiB"}


class Picture(NamedTuple):
    """One of them, by the name of its file."""

    name: str
    view: Literal["Overview", "Sharing", "Analysis", "Chat"]
    size: ViewportSize
    scheme: Literal["light", "dark"]


PICTURES: Final = (
    Picture("ui-light", "Overview", WIDE, "light"),
    Picture("ui-dark", "Overview", WIDE, "dark"),
    Picture("ui-narrow", "Overview", NARROW, "light"),
    Picture("ui-sharing", "Sharing", WIDE, "light"),
    Picture("ui-analysis", "Analysis", WIDE, "light"),
    Picture("ui-chat", "Chat", WIDE, "light"),
)


def take_pictures(folder: Path) -> None:
    """Serves the family, and writes every picture into a folder."""
    family = ensure_family(default_cache(), lambda *_: None)
    with (
        tempfile.TemporaryDirectory() as state,
        live_server(
            Path(state),
            models={DONOR: family / DONOR},
            root=family,
            engine_command=None,
            settings={
                "engine": _ENGINE,
                "sharing": {"policy": "budget"},
                "analysis": {"enabled": True},
            },
        ) as live,
        chromium() as browser,
    ):
        live.until_ready()
        for name in MODELS[1:]:
            answer = live.onboard(name, family / name, donor=DONOR)
            assert answer.status_code == 201, answer.text
        for name in MODELS:
            assert live.chat(name, QUESTIONS["instruct"].text, max_tokens=16).is_success
        live.until(lambda: live.client.get(f"/analysis/{DONOR}").json()["state"] == "done")
        for picture in PICTURES:
            visitor = Visitor(browser, folder)
            _take(visitor, live, picture)
            troubles = visitor.leave()
            assert troubles == [], troubles


def _take(visitor: Visitor, live: LiveServer, picture: Picture) -> None:
    page = visitor.open(live, size=picture.size, scheme=picture.scheme).page
    expect(row_of(page, MODELS[-1])).to_contain_text("ready")
    expect(server_state(page)).to_have_text("Ready")
    go_to(page, picture.view)
    if picture.view == "Analysis":
        expect(page.get_by_role("img", name="Cosines between 3 fine-tunes")).to_be_visible()
    if picture.view == "Chat":
        choose(page, "Left", "chat")
        choose(page, "Right", "instruct")
        ask(page, QUESTIONS["instruct"].text)
        expect_ended(page)
    visitor.picture(page, picture.name, full=picture.size == WIDE)


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0]) if arguments else FOLDER
    take_pictures(folder)
    for picture in PICTURES:
        file = folder / f"{picture.name}.png"
        size = file.stat().st_size
        sys.stdout.write(f"{file}: {size} bytes\n")
        assert size < MAX_PICTURE_BYTES, f"{file} is too big for a page of documentation"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
