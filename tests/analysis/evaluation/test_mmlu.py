"""MMLU's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.evaluation.mmlu import SUBJECTS, load_mmlu
from linker_core.errors import InvalidRequestError

ROWS = '"What is 1, and\n1?",0,1,2,3,C\nWhich way is up?,left,right,up,down, C\nThird,a,b,c,d,A\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "plain_algebra_test.csv").write_text(ROWS)
    return tmp_path


def test_questions_ask_for_the_likeliest_letter(folder: Path) -> None:
    (task,) = load_mmlu(folder, ["plain_algebra"], limit=2)
    assert [example.gold for example in task.examples] == [2, 2]
    choices = task.examples[0].choices
    assert [choice.continuation for choice in choices] == [" A", " B", " C", " D"]
    assert {choice.context for choice in choices} == {
        "The following are multiple choice questions (with answers) about plain algebra.\n\n"
        "What is 1, and\n1?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    }
    assert task.chance == 0.25


def test_a_subject_that_is_not_there_is_refused_with_a_near_one(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="plain_algebra"):
        load_mmlu(folder, ["plain_algbra"])
    with pytest.raises(InvalidRequestError, match="no subject"):
        load_mmlu(folder, ["../secret"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("question,a,b,c,d\n", "row 1"),
        ("question,a,b,c,d,E\n", "one of ABCD"),
        ('"open,a,b,c,d,A\n', "unexpected end"),
        (b"\xff,a,b,c,d,A\n", "UTF-8"),
        ("", "no text"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, content: str | bytes, reason: str
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "x_test.csv").write_bytes(data)
    with pytest.raises(InvalidRequestError, match=reason):
        load_mmlu(tmp_path, ["x"])


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="directory"):
        load_mmlu(tmp_path / "nowhere")


@pytest.mark.shared
def test_the_four_subjects_of_the_paper_give_a_hundred_questions(shared: Path) -> None:
    tasks = load_mmlu(shared / "data" / "mmlu" / "test")
    assert [(task.name, len(task.examples)) for task in tasks] == [(s, 25) for s in SUBJECTS]
