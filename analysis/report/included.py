"""What other studies printed with --json, as sections of a report. The files are untrusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from analysis.drawing import Drawing, Shape
from analysis.report import figures
from analysis.report.content import Cell, Figure, Section, Table
from linker_core.errors import InvalidRequestError
from linker_core.tuning.json_lines import read_bytes
from linker_core.weights import strict_json

HEADINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pca": "Principal components",
        "stability": "Stability",
        "diagnose": "Diagnostics",
        "kernel": "Kernel",
        "transfer": "Transfer",
        "warm-start": "Warm start",
        "eval": "Evaluation",
        "probe": "Probe",
    }
)
_LONG: Final = 40  # a table of more rows is folded
_KINDS: Final[Mapping[type, str]] = MappingProxyType(
    {dict: "an object", list: "a list", str: "a text"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Included:
    """A study's document, as far as a report shows it."""

    file_name: str
    study: str  # a key of `HEADINGS`
    version: str  # of the program that wrote it
    base: str
    fine_tunes: tuple[str, ...]
    tables: tuple[Table, ...]
    drawings: tuple[Drawing, ...]
    notes: tuple[str, ...]

    def section(self, *, base: str, fine_tunes: Sequence[str]) -> Section:
        """Returns it as a section of a report on a base and its fine-tunes."""
        made = (
            f"From `linker analyze {self.study}` {self.version} on {self.base} with "
            f"{', '.join(self.fine_tunes)}."
        )
        if (self.base, set(self.fine_tunes)) != (base, set(fine_tunes)):
            made += " These are not the models of the other sections."
        return Section(
            heading=f"{HEADINGS[self.study]} ({self.file_name})",
            sentences=[made, *self.notes],
            figures=[
                Figure(caption=one.caption, label=one.caption, spec=figures.drawn(one))
                for one in self.drawings
            ],
            tables=self.tables,
        )


def read_included(path: Path) -> Included:
    """Reads what `linker analyze STUDY … --json` printed.

    Raises:
        InvalidRequestError: It cannot be read, is no such document, or holds something else than
            it should; says where.
    """
    try:
        return _document(path.name, strict_json.parse(read_bytes(path)))
    except ValueError as error:
        raise InvalidRequestError(
            f"--include {path.name}: {error}. Give a file that `linker analyze STUDY … --json` "
            "of this version wrote, with nothing else in it.",
            param="include",
        ) from error


def _document(file_name: str, value: Any) -> Included:
    record = _typed(value, dict, "the document")
    if "made_by" not in record:
        raise ValueError("no made_by says which study it is of")
    made_by = _get(record, "made_by", dict, "")
    study = _get(made_by, "study", str, "made_by")
    if study not in HEADINGS:
        raise ValueError(f"made_by.study is {study!r:.60}, expected one of {', '.join(HEADINGS)}")
    return Included(
        file_name=file_name,
        study=study,
        version=_get(made_by, "version", str, "made_by"),
        base=_get(made_by, "base", str, "made_by"),
        fine_tunes=_each(made_by, "fine_tunes", "made_by", _text),
        tables=_each(record, "tables", "", _table),
        drawings=_each(record, "figures", "", _drawing),
        notes=_each(record, "notes", "", _text),
    )


def _table(value: Any, where: str) -> Table:
    record = _typed(value, dict, where)
    columns = _each(record, "columns", where, _text)
    rows = _each(record, "rows", where, _row)
    if not columns:
        raise ValueError(f"{where} has no columns")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"{where}.rows[{number}] has {len(row)} cells, expected {len(columns)}"
            )
    sentences = [f"{_get(record, 'title', str, where)}.", *_each(record, "notes", where, _text)]
    return Table(caption=" ".join(sentences), columns=columns, rows=rows, folded=len(rows) > _LONG)


def _drawing(value: Any, where: str) -> Drawing:
    record = _typed(value, dict, where)
    words = {key: _get(record, key, str, where) for key in ("caption", "x_title", "y_title")}
    shape = _get(record, "shape", str, where)
    if shape not in tuple(Shape):
        raise ValueError(f"{where}.shape is {shape!r:.60}, expected {' or '.join(Shape)}")
    x = _each(record, "x", where, _place)
    series = _by_name(record, "series", where, _number, len(x))
    intervals = _by_name(record, "intervals", where, _interval, len(x))
    if unknown := intervals.keys() - series.keys():
        raise ValueError(f"{where}.intervals has {min(unknown)!r:.60}, which is no series")
    return Drawing(shape=Shape(shape), x=x, series=series, intervals=intervals, **words)


def _by_name(
    record: Mapping[str, Any], key: str, where: str, read: Callable[[Any, str], Any], count: int
) -> dict[str, tuple[Any, ...]]:
    """Returns name -> values, as many as there are places."""
    found = _get(record, key, dict, where)
    values = {name: _each(found, name, f"{where}.{key}", read) for name in found}
    for name, listed in values.items():
        if len(listed) != count:
            raise ValueError(
                f"{where}.{key}.{name:.60} has {len(listed)} values, expected {count}, one for "
                "each x"
            )
    return values


def _row(value: Any, where: str) -> tuple[Cell, ...]:
    return tuple(_cell(cell, where) for cell in _typed(value, list, where))


def _cell(value: Any, where: str) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{where} holds {_kind(value)}, expected texts and numbers")


def _place(value: Any, where: str) -> str | float:
    if isinstance(value, str):
        return value
    number = _number(value, where)
    if number is None:
        raise ValueError(f"{where} is null, expected a number or a text")
    return number


def _number(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{where} is {_kind(value)}, expected a number or null")


def _interval(value: Any, where: str) -> tuple[float, float] | None:
    if value is None:
        return None
    ends = [_number(end, where) for end in _typed(value, list, where)]
    if len(ends) != 2 or None in ends:
        raise ValueError(f"{where} is no interval, expected [low, high]")
    low, high = (end for end in ends if end is not None)
    return low, high


def _text(value: Any, where: str) -> str:
    text: str = _typed(value, str, where)
    return text


def _each(
    record: Mapping[str, Any], key: str, where: str, read: Callable[[Any, str], Any]
) -> tuple[Any, ...]:
    """Returns a list's entries, each read with its own place."""
    place = f"{where}.{key}".lstrip(".")
    entries = _get(record, key, list, where)
    return tuple(read(entry, f"{place}[{number}]") for number, entry in enumerate(entries))


def _get(record: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    place = f"{where}.{key:.60}".lstrip(".")
    if key not in record:
        raise ValueError(f"there is no {place}")
    return _typed(record[key], kind, place)


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {_kind(value)}, expected {_KINDS[kind]}")
    return value


def _kind(value: Any) -> str:
    """Returns what a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _KINDS.get(type(value), "a number")
