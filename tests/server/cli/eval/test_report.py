"""What sharing retains, in the numbers of BS table 7."""

from __future__ import annotations

import pytest

from server.cli.eval.report import Cell, retention, retention_table, score_table

# Mistral-7B: BS table 7, whose ratios are BS table 6.
TASKS = ("mmlu", "arc_challenge", "hellaswag", "winogrande")
INSTRUCT = dict(zip(TASKS, (0.611, 0.593, 0.730, 0.763), strict=True))
SHARED = dict(zip(TASKS, (0.615, 0.517, 0.703, 0.770), strict=True))


def scored(scores: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        task: {"metrics": {"acc": value, "acc_norm": value}, "stderr": {"acc": 0.01}}
        for task, value in scores.items()
    }


def test_retained_are_the_percentages_of_table_6() -> None:
    cells = retention(scored(INSTRUCT), scored(SHARED), TASKS)
    assert [round(100 * (cell.retained or 0)) for cell in cells] == [101, 87, 96, 101]
    assert [cell.metric for cell in cells] == ["acc", "acc_norm", "acc_norm", "acc"]


def test_only_cells_below_94_percent_are_marked() -> None:
    cells = retention(scored(INSTRUCT), scored(SHARED), TASKS)
    marked = [line for line in retention_table("m", cells, limit=None).splitlines() if "*" in line]
    assert len(marked) == 1
    assert "arc_challenge" in marked[0]
    assert "59.3" in marked[0]
    assert "51.7" in marked[0]
    assert "87.2%" in marked[0]


@pytest.mark.parametrize(
    ("unshared", "shared", "is_low"),
    [(0.5, 0.47, False), (0.5, 0.4699, True), (0.0, 0.0, False), (0.0, 0.3, False)],
)
def test_mark_begins_below_the_bar(unshared: float, shared: float, is_low: bool) -> None:
    assert Cell("t", "acc", unshared, shared).is_low is is_low


def test_score_of_a_few_samples_says_so() -> None:
    whole = score_table("m", scored(SHARED), TASKS, limit=None)
    few = score_table("m", scored(SHARED), TASKS, limit=5)
    assert few.startswith(whole)
    assert "first 5 samples" in few
    assert "0.6150 ± 0.0100" in whole
