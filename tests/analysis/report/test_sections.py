"""What the report says: the study's numbers, with their nulls, and none that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis.gram import gram_pass
from analysis.record import TensorStudy
from analysis.report.content import Section, between, percent, percents, text_of
from analysis.report.fine_tunes import fine_tune_sections
from analysis.report.shares import share_sections
from analysis.report.tensors import method_section, tensor_section
from analysis.selection import select
from analysis.study import study_tensor
from analysis.summary import summarise
from tests.analysis.planted import Planted, Structure, plant_family

NUM_DRAWS = 40


def studied(
    planted: Planted, globs: Sequence[str] = ()
) -> tuple[list[TensorStudy], dict[str, Any]]:
    with planted.open() as family:
        studies = [
            study_tensor(gram, names=family.names, seed=0, num_draws=NUM_DRAWS)
            for gram in gram_pass(family, select(family.base, globs))
        ]
    summary = summarise(studies, base="base", names=planted.names, seed=0, num_draws=NUM_DRAWS)
    return studies, summary


def sections_of(studies: list[TensorStudy], summary: dict[str, Any]) -> dict[str, Section]:
    sections = [
        *share_sections(studies, summary),
        *fine_tune_sections(studies, summary),
        tensor_section(studies),
        method_section(studies, summary),
    ]
    return {section.heading: section for section in sections}


@pytest.fixture(scope="module")
def five(small_family: Planted) -> tuple[list[TensorStudy], dict[str, Any]]:
    return studied(small_family)


def test_shares_stand_beside_their_intervals_and_nulls(
    five: tuple[list[TensorStudy], dict[str, Any]],
) -> None:
    studies, summary = five
    sections = sections_of(studies, summary)
    (table,) = sections["By component"].tables
    rows = {row[0]: row for row in table.rows}
    assert set(rows) == set(summary["components"])
    for name, row in summary["components"].items():
        assert rows[name][2] == percent(row["pc1_centred"])
        assert rows[name][3] == percents(row["interval_centred"])
        assert rows[name][4] == percent(row["null95_centred"])
    (figure,) = sections["By component"].figures
    *groups, null = figure.spec["data"]
    assert [bars["name"] for bars in groups] == ["attention", "MLP", "all"]
    drawn = {
        name: (share, up, down)
        for bars in groups
        for name, share, up, down in zip(
            bars["x"], bars["y"], bars["error_y"]["array"], bars["error_y"]["arrayminus"],
            strict=True,
        )
    }  # fmt: skip
    assert list(figure.spec["layout"]["xaxis"]["categoryarray"]) == list(summary["components"])
    assert list(null["y"]) == [row["null95_centred"] for row in summary["components"].values()]
    assert set(drawn) == set(summary["components"])
    for name, row in summary["components"].items():
        share, up, down = drawn[name]
        assert share == row["pc1_centred"]
        low, high = row["interval_centred"]
        assert up == pytest.approx(max(0.0, high - row["pc1_centred"]))
        assert down == pytest.approx(max(0.0, row["pc1_centred"] - low))


def test_every_tensor_has_its_row(five: tuple[list[TensorStudy], dict[str, Any]]) -> None:
    studies, summary = five
    (table,) = sections_of(studies, summary)["Tensors"].tables
    assert [row[0] for row in table.rows] == [study.name for study in studies]
    assert [row[1] for row in table.rows] == [percent(study.pc1_centred) for study in studies]


def test_pairs_are_each_shown_once(five: tuple[list[TensorStudy], dict[str, Any]]) -> None:
    studies, summary = five
    (table,) = sections_of(studies, summary)["Cosines between fine-tunes"].tables
    matrix = summary["pairwise_cosine"]["matrix"]
    assert len(table.rows) == 10
    assert table.rows[0][:2] == ("one and two", matrix[0][1])


def test_method_says_draws_seed_and_runs(five: tuple[list[TensorStudy], dict[str, Any]]) -> None:
    text = " ".join(sections_of(*five)["Method"].sentences)
    assert f"{NUM_DRAWS} times" in text
    assert "seed 0" in text
    assert "F32" in text


def test_two_fine_tunes_have_a_shared_fraction_and_no_pc1(tmp_path: Path) -> None:
    studies, summary = studied(plant_family(tmp_path, Structure(num_variants=2)))
    sections = sections_of(studies, summary)
    (table,) = sections["What the two fine-tunes share"].tables
    assert table.rows[-1] == ("all", percent(summary["shared_fraction"]["mean"]))
    assert not {"By component", "Who makes PC1", "Stability"} & set(sections)


def test_one_fine_tune_has_norms_and_diagnostics_alone(tmp_path: Path) -> None:
    sections = sections_of(*studied(plant_family(tmp_path, Structure(num_variants=1))))
    assert list(sections) == ["Fine-tunes", "Diagnostics", "Tensors", "Method"]


def test_unchanged_fine_tunes_are_reported_without_shares(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=3, scale=0.0))
    sections = sections_of(*studied(planted))
    assert "By component" not in sections
    kinds = {row[0] for row in sections["Diagnostics"].tables[0].rows}
    assert "degenerate" in kinds


def test_tensors_outside_the_layers_need_no_figure(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=3))
    sections = sections_of(*studied(planted, ["model.norm.weight"]))
    assert not any(section.figures for section in sections.values() if "layer" in section.heading)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (text_of(None), "-"),
        (text_of(float("nan")), "-"),
        (text_of(0.123456), "0.1235"),
        (text_of(12), "12"),
        (percent(0.1234), "12.3 %"),
        (percents((0.1, 0.25)), "10.0 to 25.0 %"),
        (between((0.1, 0.25)), "0.1 to 0.25"),
        (between(None), None),
    ],
)
def test_numbers_as_text(text: str | None, expected: str | None) -> None:
    assert text == expected
