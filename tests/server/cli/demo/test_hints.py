"""The lines to copy: what they start, and what they ask."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from server.cli.demo.hints import curl_lines, hints, program_as_started
from server.cli.demo.tour import request_body

URL = "http://127.0.0.1:8000"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of our name in a folder with a blank in its name."""
    path = tmp_path / "my venv" / "linker"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_program_off_the_path_is_named_as_it_was_started(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert shlex.split(program_as_started()) == [str(program)]
    lines = hints(family=Path("f"), state=Path("s"), log=Path("l"), url=URL, port=8000)
    said = [line for line in lines if " serve --" in line or " top --" in line]
    assert len(said) == 2
    assert all(program_as_started() in line for line in said)


def test_program_on_the_path_goes_by_its_name(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert program_as_started() == "linker"


def test_module_is_started_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["server/cli/main.py"])
    assert shlex.split(program_as_started()) == [sys.executable, "-m", "server.cli.main"]


def test_curl_lines_ask_as_the_tour_asked() -> None:
    chat, stream, _ = (shlex.split(line) for line in curl_lines(URL))
    assert json.loads(chat[-1]) == request_body("chat")
    assert json.loads(stream[-1]) == {**request_body("instruct"), "stream": True}
    assert json.loads(chat[-1])["temperature"] == 0
