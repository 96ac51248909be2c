"""How studies print."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from analysis.drawing import Drawing, Shape
from server.cli.analyze.members import Members
from server.cli.analyze.output import Cell, Shown, formatted, show

TABLE = Shown("shares [of PC1]", ("tensor", "PC1"), [("[b]q", 0.123456), ("k", None)], ("one run",))


def test_show_prints_tables_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    show(argparse.Namespace(json=False), {}, [TABLE], ["all of it"])
    said = capsys.readouterr().out
    for text in ("shares [of PC1]", "[b]q", "0.1235", "one run", "all of it"):
        assert text in said  # also what looks like markup


def test_show_prints_no_commands_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;title\x07\x9b2J\u202eend"
    table = Shown(hostile, (hostile,), [(hostile,), ("two\nlines",)], [hostile])
    show(argparse.Namespace(json=False), {}, [table], [hostile])
    said = capsys.readouterr().out
    assert said.count("]0;title??2J?end") == 5
    assert all(c.isprintable() or c == "\n" for c in said)
    assert "two" in said
    assert "lines" in said


def test_show_json_is_one_document_without_what_json_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = {"pc1": float("nan"), "rows": [(1, float("inf"))], "name": "ε"}
    show(argparse.Namespace(json=True), document, [TABLE])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"pc1": None, "rows": [[1, None]], "name": "ε"}


def test_show_json_of_models_says_what_made_it_and_holds_what_a_report_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    members = Members("base", Path("folder"), {"chat": Path("other")}, ())
    table = Shown("t", ("model", "PPL"), [("chat", float("inf")), ("base", float("nan"))], ("n",))
    drawing = Drawing(
        caption="c", shape=Shape.BARS, x_title="x", y_title="y", x=["q"], series={"s": [None]}
    )
    args = argparse.Namespace(json=True, study="eval")
    show(args, {"alpha": 1}, [table], ["note"], members=members, drawings=[drawing])
    found = json.loads(capsys.readouterr().out)
    assert found.pop("made_by") == {
        "study": "eval", "version": version("linker-llm"), "base": "base", "fine_tunes": ["chat"],
    }  # fmt: skip
    assert found == {
        "alpha": 1,
        "tables": [
            {"title": "t", "columns": ["model", "PPL"], "rows": [["chat", "inf"], ["base", None]],
             "notes": ["n"]}
        ],
        "figures": [drawing.to_json()],
        "notes": ["note"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), (float("nan"), "-"), (True, "yes"), (False, "no"), (12, "12"), (0.5, "0.5"),
     (123456.789, "1.235e+05"), ("q", "q")],
)  # fmt: skip
def test_formatted_cells(cell: Cell, text: str) -> None:
    assert formatted(cell) == text


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_show_cuts_no_number_however_narrow(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    numbers = [0.1234 + number / 10 for number in range(6)]
    columns = ("fine-tune", "", *(f"column {number}" for number in range(6)), "reason")
    row: tuple[Cell, ...] = ("instruct", "0.123-0.456", *numbers, "a sentence of some length")
    show(argparse.Namespace(json=False), {}, [Shown("shares", columns, [row])])
    said = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    assert all(len(line) <= width for line in said.splitlines())
    for text in ("instruct", "0.123-0.456", *map(formatted, numbers), "sentence"):
        assert said.split().count(text) == 1
    assert ("\n  column 0: 0.1234\n" in said) == (width <= 80)


def test_show_says_that_a_table_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    show(argparse.Namespace(json=False), {}, [Shown("Findings", ("kind",), [], ("None of x.",))])
    assert capsys.readouterr().out == "Findings: none.\nNone of x.\n"
