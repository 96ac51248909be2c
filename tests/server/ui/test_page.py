"""What the page's files must not do: each holds where no browser is at hand to try it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from server.ui.assets import INDEX, asset_files

_OURS = {name: path for name, path in asset_files().items() if name != "plotly.min.js"}
_SCRIPTS = sorted(name for name in _OURS if name.endswith(".js"))
# Texts that become markup or code. Everything that the server says is a text.
_FORBIDDEN = (
    "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc",
    "createContextualFragment", "setHTMLUnsafe", "parseHTMLUnsafe", "eval(", "new Function",
    "javascript:", "cssText", "document.cookie",
)  # fmt: skip
_NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}  # names, not places


def text_of(name: str) -> str:
    return _OURS[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", _SCRIPTS)
def test_script_makes_neither_markup_nor_code_of_a_text(name: str) -> None:
    script = text_of(name)
    assert [what for what in _FORBIDDEN if what in script] == []


@pytest.mark.parametrize("name", sorted(_OURS))
def test_file_names_no_other_place(name: str) -> None:
    found = set(re.findall(r"""(?:https?:|wss?:)//[^\s"'`<>)]+""", text_of(name)))
    assert found <= _NAMESPACES
    assert not re.search(r"""(?:@import|url\()\s*["']?(?!#|data:|/ui/)""", text_of(name))


def test_key_is_kept_by_the_tab_alone() -> None:
    assert [name for name in _SCRIPTS if '"linker-key"' in text_of(name)] == ["api.js"]
    keepers = {name for name in _SCRIPTS if "sessionStorage" in text_of(name)}
    assert keepers == {"api.js", "session.js"}  # the second: why a key was refused
    remembering = {name for name in _SCRIPTS if "localStorage" in text_of(name)}
    assert remembering <= {"theme.js"}


class _Markup(HTMLParser):
    """What of a page is code or style in its own right."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag if tag in ("script", "style") else None
        for name, _ in attrs:
            if name == "style" or name.startswith("on"):
                self.faults.append(f"<{tag} {name}>")
        if tag in ("style", "iframe", "object", "embed", "base", "form"):
            self.faults.append(f"<{tag}>")

    def handle_endtag(self, _tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is not None and data.strip():
            self.faults.append(f"<{self.inside}>{data[:20]}")


def test_markup_has_nothing_that_its_policy_of_contents_would_stop() -> None:
    markup = _Markup()
    markup.feed(text_of(INDEX))
    assert [fault for fault in markup.faults if fault != "<form>"] == []
    for form in re.findall(r"<form[^>]*>", text_of(INDEX)):
        assert "action" not in form  # scripts send it


def test_markup_parser_sees_what_it_looks_for() -> None:
    markup = _Markup()
    markup.feed(
        '<p style="a" onclick="b"><script>c</script><style>d</style><script src="e"></script>'
    )
    assert markup.faults == ["<p style>", "<p onclick>", "<script>c", "<style>", "<style>d"]
