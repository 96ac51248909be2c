from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.tuning.tasks import MAX_TASKS, Choice, Example, load_task_set, load_tasks

PIQA = {"goal": "Dry a cup", "sol1": "Use a towel", "sol2": "Use soup", "label": 0}
WINOGRANDE = {
    "sentence": "The wine hit the bed, but the _ stayed clean. ",
    "option1": "bed",
    "option2": "wine",
    "answer": "2",
}
QUERY = {"query": "One and one is", "choices": ["two", " a fish", "x"], "gold": 0}


def write(folder: Path, name: str, *rows: object) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def only_example(folder: Path, row: object) -> Example:
    (task,) = load_tasks(write(folder, "task.jsonl", row))
    (example,) = task.examples
    return example


def refused(folder: Path, **options: int) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        load_tasks(folder, **options)
    assert caught.value.param == ("limit" if options else "tasks")
    return caught.value.message


def test_piqa_row_asks_for_the_solutions(tmp_path: Path) -> None:
    # A prompt that the row has written out otherwise does not count.
    row = {**PIQA, "query": "Goal: Dry a cup\nAnswer:", "choices": ["a", "b"], "gold": 1}
    assert only_example(tmp_path, row) == Example(
        choices=tuple(
            Choice(
                context="Question: Dry a cup\nAnswer:", continuation=f" {text}", num_chars=len(text)
            )
            for text in ("Use a towel", "Use soup")
        ),
        gold=0,
        normed=True,
    )


def test_winogrande_row_puts_the_options_into_the_text_and_asks_for_the_rest(
    tmp_path: Path,
) -> None:
    assert only_example(tmp_path, WINOGRANDE) == Example(
        choices=tuple(
            Choice(
                context=f"The wine hit the bed, but the {option}",
                continuation=" stayed clean.",
                num_chars=13,
            )
            for option in ("bed", "wine")
        ),
        gold=1,
        normed=False,
    )


@pytest.mark.parametrize("stated", [{"gold": 1}, {"label": 1}, {"gold": 1, "label": 1}])
def test_written_out_row_asks_for_its_choices(tmp_path: Path, stated: dict[str, int]) -> None:
    row = {"query": QUERY["query"], "choices": QUERY["choices"], **stated}
    example = only_example(tmp_path, row)
    assert [choice.continuation for choice in example.choices] == [" two", "  a fish", " x"]
    assert [choice.num_chars for choice in example.choices] == [3, 7, 1]
    assert {choice.context for choice in example.choices} == {"One and one is"}
    assert (example.gold, example.normed) == (1, True)


def test_tasks_come_by_name_and_other_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "piqa_val.jsonl", PIQA)
    write(tmp_path, "arc.jsonl", QUERY, {**QUERY, "choices": ["a", "b"]})
    (tmp_path / "README.md").write_text("not JSON")
    tasks = load_tasks(tmp_path)
    assert [task.name for task in tasks] == ["arc", "piqa_val"]
    assert tasks[0].chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert tasks[1].chance == 0.5


def test_task_set_holds_out_all_but_piqa(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="0 and 1") as caught:
        load_task_set(write(tmp_path, "arc.jsonl", QUERY, QUERY))
    assert caught.value.param == "tasks"
    write(tmp_path, "hella.jsonl", QUERY)
    found = load_task_set(write(tmp_path, "PIQA-val.jsonl", PIQA, PIQA), limit=1)
    assert found.sweep.name == "PIQA-val"
    assert [(task.name, len(task.examples)) for task in found.heldout] == [("arc", 1), ("hella", 1)]
    with pytest.raises(InvalidRequestError, match="2 and 2"):
        load_task_set(write(tmp_path, "piqa.jsonl", PIQA))
    for file in ("arc", "hella", "PIQA-val"):
        (tmp_path / f"{file}.jsonl").unlink()
    with pytest.raises(InvalidRequestError, match="1 and 0"):
        load_task_set(tmp_path)


def test_limit_takes_the_same_examples_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{**QUERY, "query": f"{number} is"} for number in range(40)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (first,) = load_tasks(write(tmp_path / "a", "t.jsonl", *rows), limit=10)
    (again,) = load_tasks(write(tmp_path / "b", "t.jsonl", *reversed(rows)), limit=10)
    (more,) = load_tasks(tmp_path / "b", limit=20)
    (whole,) = load_tasks(tmp_path / "b", limit=1000)
    assert first.examples == again.examples == more.examples[:10]
    assert len(whole.examples) == 40
    contexts = [example.choices[0].context for example in first.examples]
    assert contexts != [f"{number} is" for number in range(10)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([QUERY], "expected an object"),
        ({}, "expected goal"),
        ({"question": "What?"}, "expected goal"),
        ({**PIQA, "goal": ""}, "goal is not a string with text"),
        ({**PIQA, "goal": 5}, "goal is not a string with text"),
        ({"goal": "a", "sol1": "b", "label": 0}, "sol2 is not a string with text"),
        ({**PIQA, "label": 2}, "label is 2, expected 0 to 1"),
        ({**PIQA, "label": -1}, "label is -1, expected 0 to 1"),
        ({**PIQA, "label": True}, "label is True, expected 0 to 1"),
        ({**PIQA, "label": "0"}, "label is '0', expected 0 to 1"),
        ({**PIQA, "label": 0.0}, "label is 0.0, expected 0 to 1"),
        ({**PIQA, "label": None}, "label is None, expected 0 to 1"),
        ({**WINOGRANDE, "sentence": "No blank."}, "sentence has no blank"),
        ({**WINOGRANDE, "sentence": "At its end is the _ "}, "sentence has no blank"),
        ({**WINOGRANDE, "answer": 2}, 'answer is 2, expected "1" or "2"'),
        ({**WINOGRANDE, "answer": "3"}, "answer is '3'"),
        ({**WINOGRANDE, "answer": ["1"]}, "answer is ['1']"),
        ({**WINOGRANDE, "option2": " "}, "option2 is not a string with text"),
        ({**QUERY, "query": "\n"}, "query is not a string with text"),
        ({**QUERY, "choices": "ab"}, "choices is not a list of 2 to 26"),
        ({**QUERY, "choices": ["a"]}, "choices is not a list of 2 to 26"),
        ({**QUERY, "choices": ["a"] * 27}, "choices is not a list of 2 to 26"),
        ({**QUERY, "choices": ["a", 1]}, "a choice is not a string with text"),
        ({**QUERY, "choices": ["a", ""]}, "a choice is not a string with text"),
        ({**QUERY, "gold": 3}, "gold is 3, expected 0 to 2"),
        ({**QUERY, "label": 1}, "gold or label"),
        ({"query": "a", "choices": ["a", "b"]}, "gold or label"),
    ],
)
def test_row_that_is_no_question_is_refused_with_its_line(
    tmp_path: Path, row: Any, reason: str
) -> None:
    message = refused(write(tmp_path, "task.jsonl", QUERY, row))
    assert "task.jsonl: line 2:" in message
    assert reason in message


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"\xff\xfe",
        b'{"query": "a", "query": "b"}',
        b'{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}',
        b'{"query": "a", "choices": ["a", "b"], "gold": NaN}',
        b'{"query": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"query": "' + b"a" * (1 << 20) + b'"}',
    ],
)
def test_row_that_is_not_strict_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "task.jsonl").write_bytes(data)
    assert "task.jsonl: line 1:" in refused(tmp_path)


def test_directory_without_tasks_or_with_too_many_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "absent")
    assert "cannot be read" in refused(Path("a\0b"))
    assert "0 files" in refused(tmp_path)
    for number in range(MAX_TASKS + 1):
        write(tmp_path, f"{number}.jsonl", QUERY)
    assert f"{MAX_TASKS + 1} files" in refused(tmp_path)


def test_file_that_is_irregular_empty_or_oddly_named_is_refused(tmp_path: Path) -> None:
    for name in ("fifo", "directory", "empty", "name"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "fifo" / "a.jsonl")
    assert "not a regular file" in refused(tmp_path / "fifo")
    (tmp_path / "directory" / "a.jsonl").mkdir()
    assert "not a regular file" in refused(tmp_path / "directory")
    (tmp_path / "empty" / "a.jsonl").write_bytes(b"\n")
    assert "no rows" in refused(tmp_path / "empty")
    assert "printable" in refused(write(tmp_path / "name", "a\x1b[2J.jsonl", QUERY))


def test_limit_out_of_range_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "task.jsonl", QUERY)
    assert "limit is 0" in refused(tmp_path, limit=0)
    assert "limit is 10001" in refused(tmp_path, limit=10_001)
