"""Other studies' documents in a report: whole, or refused with the place and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.drawing import Drawing, Shape
from analysis.report.content import Section
from analysis.report.included import read_included
from analysis.report.page import render_page
from linker_core.errors import InvalidRequestError
from tests.analysis.report.reading import Reading

NASTY = '</script><img src="http://x.example/y">'
DRAWING = Drawing(
    caption="Losses.",
    shape=Shape.CURVES,
    x_title="scale",
    y_title="nats",
    x=[0.5, 1],
    series={"kernel": [2.0, None], "uniform": [3.0, 4.0]},
    intervals={"kernel": [(1.5, 2.5), None]},
)


def document() -> dict[str, Any]:
    return {
        "made_by": {"study": "eval", "version": "1.2", "base": "base", "fine_tunes": ["a", "b"]},
        "conditions": [{"of": "no concern here"}],
        "tables": [
            {
                "title": "Scores",
                "columns": ["weights", "PPL", "best"],
                "rows": [["kernel", 71.234, True], [NASTY, "inf", None]],
                "notes": ["Windows of 40."],
            }
        ],
        "figures": [DRAWING.to_json()],
        "notes": ["Paired intervals."],
    }


def included(folder: Path, record: object) -> Section:
    path = folder / "eval.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return read_included(path).section(base="base", fine_tunes=["b", "a"])


def test_a_document_becomes_a_section_with_tables_figures_and_methods(tmp_path: Path) -> None:
    section = included(tmp_path, document())
    assert section.heading == "Evaluation (eval.json)"
    assert section.sentences == [
        "From `linker analyze eval` 1.2 on base with a, b.",
        "Paired intervals.",
    ]
    (table,) = section.tables
    assert table.caption == "Scores. Windows of 40."
    assert table.rows == (("kernel", 71.234, "yes"), (NASTY, "inf", None))
    (figure,) = section.figures
    kernel, uniform = figure.spec["data"]
    assert (kernel["y"], uniform["y"]) == ([2.0, None], [3.0, 4.0])
    assert kernel["error_y"]["array"] == [0.5, 0.0]
    assert "error_y" not in uniform


def test_a_study_of_other_models_says_so(tmp_path: Path) -> None:
    record = document()
    record["made_by"]["fine_tunes"] = ["a", "c"]
    assert "not the models of the other sections" in included(tmp_path, record).sentences[0]


def test_a_long_table_is_folded(tmp_path: Path) -> None:
    record = document()
    record["tables"][0]["rows"] = [["kernel", 1, None]] * 41
    assert included(tmp_path, record).tables[0].folded


def test_values_without_an_interval_have_no_error_bars(tmp_path: Path) -> None:
    record = document()
    record["figures"][0]["intervals"]["kernel"] = [None, None]
    (figure,) = included(tmp_path, record).figures
    assert not any(trace.get("error_y") for trace in figure.spec["data"])


def test_a_series_called_like_a_date_is_no_date(tmp_path: Path) -> None:
    record = document()
    record["figures"][0] |= {"x": ["2024-01-01", "1e5"], "shape": "bars"}
    (figure,) = included(tmp_path, record).figures
    assert figure.spec["layout"]["xaxis"]["type"] == "category"


def test_what_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    record = document()
    record["made_by"]["base"] = record["notes"][0] = record["tables"][0]["title"] = NASTY
    record["figures"][0] |= {"caption": NASTY, "x_title": NASTY, "series": {NASTY: [1, 2]}}
    record["figures"][0]["intervals"] = {}
    read = Reading(render_page("Title", [], [included(tmp_path, record)]))
    assert read.addresses == []
    assert read.open_tags == []
    assert [NASTY, "inf", "-"] in read.rows


def changed(*keys: str | int, value: object) -> Callable[[], dict[str, Any]]:
    """Returns what makes a document that holds a value at another's place."""

    def make() -> dict[str, Any]:
        record: Any = document()
        place = record
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return dict(record)

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (changed("made_by", "study", value="report"), "made_by.study is 'report', expected one"),
        (changed("made_by", "fine_tunes", value="a"), "made_by.fine_tunes is a text, expected a l"),
        (changed("made_by", "base", value=None), "made_by.base is null, expected a text"),
        (changed("tables", value={}), "tables is an object, expected a list"),
        (changed("tables", 0, "rows", 1, value=["x", 1]), "tables[0].rows[1] has 2 cells, exp"),
        (changed("tables", 0, "rows", 0, value=["x", 1, []]), "tables[0].rows[0] holds a list"),
        (changed("tables", 0, "columns", value=[]), "tables[0] has no columns"),
        (changed("tables", 0, "notes", value=[1]), "tables[0].notes[0] is a number, expected a te"),
        (changed("figures", 0, "shape", value="pie"), "figures[0].shape is 'pie', expected curves"),
        (changed("figures", 0, "x", value=[1]), "kernel has 2 values, expected 1"),
        (changed("figures", 0, "x", value=[1, None]), "figures[0].x[1] is null"),
        (changed("figures", 0, "series", "kernel", value=["2", 1]), "kernel[0] is a text"),
        (changed("figures", 0, "series", "kernel", value=[True, 1]), "kernel[0] is true"),
        (changed("figures", 0, "series", value={"k": [1, 1]}), "has 'kernel', which is no series"),
        (changed("figures", 0, "intervals", "kernel", value=[[1], None]), "expected [low, high]"),
        (list, "the document is a list, expected an object"),
        (lambda: {"conditions": []}, "no made_by says which study"),
        (lambda: {"made_by": document()["made_by"]}, "there is no tables"),
        (lambda: '{"made_by": NaN}', "NaN is not a JSON number"),
        (lambda: '{"made_by": 1e999}', "out of range"),
        (lambda: "[" * 100_000, "nested deeper"),
        (lambda: "Traceback", "Expecting value"),
    ],
)
def test_what_is_no_such_document_is_refused_with_place_and_remedy(
    tmp_path: Path, make: Callable[[], object], reason: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        included(tmp_path, make())
    message = refused.value.message
    assert message.startswith("--include eval.json: ")
    assert reason in message
    assert "Give a file that `linker analyze STUDY … --json`" in message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"--include eval\.json"):
        read_included(tmp_path / "eval.json")
