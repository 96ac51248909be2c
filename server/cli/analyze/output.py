"""How studies print: tables with notes below, or one JSON document."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from analysis.drawing import Drawing
from server.cli.analyze.members import Members

Cell = str | float | int | bool | None


class Shown(NamedTuple):
    """A table to be printed."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()  # how its numbers were made, one sentence each


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --json."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document, which `linker analyze report --include` takes",
    )


def show(
    args: argparse.Namespace,
    document: Mapping[str, Any],
    tables: Sequence[Shown],
    notes: Sequence[str] = (),
    *,
    members: Members | None = None,
    drawings: Sequence[Drawing] = (),
) -> None:
    """Prints a study's result on stdout.

    Args:
        args: Which study it is, and whether it is to be JSON.
        document: The JSON document; numbers that are not finite become null.
        tables: What people read instead.
        notes: Sentences below all tables.
        members: What was studied; None of what no report can include. The JSON then says who made
            it of what, and holds tables, figures and notes as well.
        drawings: Figures, for reports alone.
    """
    if args.json:
        if members is not None:
            document = {
                "made_by": _made_by(args, members),
                **document,
                "tables": [_table_to_json(shown) for shown in tables],
                "figures": [drawing.to_json() for drawing in drawings],
                "notes": list(notes),
            }
        json.dump(_finite(document), sys.stdout, indent=1, allow_nan=False)
        print()
        return
    console = Console()
    for shown in tables:
        _print_table(console, shown)
        _print_notes(console, shown.notes)
    _print_notes(console, notes)


def formatted(cell: Cell) -> str:
    """Returns a cell's text: four digits of a number, a dash where there is none."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _made_by(args: argparse.Namespace, members: Members) -> dict[str, Any]:
    return {
        "study": args.study,
        "version": version("linker-llm"),
        "base": members.base_name,
        "fine_tunes": list(members.variants),
    }


def _table_to_json(shown: Shown) -> dict[str, Any]:
    """Returns a table as JSON values; an infinite number as its word, as it is printed."""
    return {
        "title": shown.title,
        "columns": list(shown.columns),
        "rows": [
            [
                formatted(cell) if isinstance(cell, float) and math.isinf(cell) else cell
                for cell in row
            ]
            for row in shown.rows
        ],
        "notes": list(shown.notes),
    }


def _print_table(console: Console, shown: Shown) -> None:
    """Prints a table, or records one below the other where the table would cut a word."""
    if not shown.rows:
        console.print(_text(f"{shown.title}: none."))
        return
    rows = [[_text(formatted(cell)) for cell in row] for row in shown.rows]
    table = _table(shown, rows)
    if _fit(console, table, [[_text(c) for c in shown.columns], *rows]):
        console.print(table)
        return
    console.print(_text(shown.title), style="italic")
    for head, *cells in rows:
        console.print(Text.assemble(_text(f"{shown.columns[0]} ".lstrip()), head))
        for name, cell in zip(shown.columns[1:], cells, strict=True):
            label = f"{name}: " if name else ""
            console.print(Text.assemble("  ", _text(label), cell))
    console.print()


def _table(shown: Shown, rows: Sequence[Sequence[Text]]) -> Table:
    table = Table(title=_text(shown.title), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(shown.columns):
        numeric = any(isinstance(row[number], (int, float)) for row in shown.rows)
        table.add_column(_text(column), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _fit(console: Console, table: Table, rows: Sequence[Sequence[Text]]) -> bool:
    """Gives each column a width that cuts none of its words; False where that is too wide.

    Left to itself, rich narrows the widest columns first, whatever stands in them.
    """
    unlimited = console.options.update(max_width=sys.maxsize)
    columns = [
        [Measurement.get(console, unlimited, cell) for cell in cells]
        for cells in zip(*rows, strict=True)
    ]
    least = [max(cell.minimum for cell in cells) for cells in columns]
    most = [max(cell.maximum for cell in cells) for cells in columns]
    frame = Measurement.get(console, unlimited, table).maximum - sum(most)
    spare = console.width - frame - sum(least)
    if spare < 0:
        return False
    by_need = sorted(range(len(most)), key=lambda number: most[number] - least[number])
    for place, number in enumerate(by_need):
        more = min(most[number] - least[number], spare // (len(most) - place))
        table.columns[number].width = least[number] + more
        spare -= more
    return True


def _print_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(_text(note), style="dim")


def _text(words: str) -> Text:
    """Returns words as they are: names and answers may hold markup, or a terminal's commands."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "?" for c in words))


def _finite(value: Any) -> Any:
    """Returns JSON values with null in the place of numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
