"""MMLU's files as multiple-choice tasks: CSV rows of a question, four answers and the letter."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from analysis.evaluation.texts import read_text, refusal
from linker_core.errors import InvalidRequestError
from linker_core.tuning.tasks import Choice, Example, Task

SUBJECTS: Final = (  # FM 3.6
    "abstract_algebra",
    "college_physics",
    "college_computer_science",
    "high_school_us_history",
)
LIMIT: Final = 25  # FM's questions of a subject
_LETTERS: Final = "ABCD"
_SUFFIX: Final = "_test.csv"
_PARAM: Final = "mmlu"


def load_mmlu(
    directory: Path, subjects: Sequence[str] = SUBJECTS, *, limit: int = LIMIT
) -> list[Task]:
    """Returns the first questions of some subjects, from files `SUBJECT_test.csv`.

    The prompt is lm-eval's, zero-shot: the subject, the question, four lettered answers, and the
    model is asked which letter is likeliest. FM says neither which 25 questions nor which prompt.

    Args:
        directory: Of the files; untrusted.
        subjects: Their names.
        limit: Questions of each.

    Raises:
        InvalidRequestError: A subject that is not there, or a file that is something else.
    """
    try:
        there = {
            path.name.removesuffix(_SUFFIX): path
            for path in directory.iterdir()
            if path.name.endswith(_SUFFIX)
        }
    except OSError as error:
        reason = f"the directory cannot be read; give one with *{_SUFFIX}"
        raise refusal(directory, reason, param=_PARAM) from error
    tasks = []
    for subject in subjects:
        if subject not in there:
            near = difflib.get_close_matches(subject, there, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Its {len(there)} files end {_SUFFIX}."
            raise InvalidRequestError(
                f"--mmlu {directory.name}: no subject {subject!r:.60}. {hint}", param=_PARAM
            )
        tasks.append(Task(name=subject, examples=tuple(_examples(there[subject], subject, limit))))
    return tasks


def _examples(path: Path, subject: str, limit: int) -> list[Example]:
    reader = csv.reader(io.StringIO(read_text(path, param=_PARAM), newline=""), strict=True)
    examples: list[Example] = []
    try:
        for number, row in enumerate(reader, start=1):
            if len(examples) == limit:
                break
            examples.append(_example(row, number, subject.replace("_", " ")))
    except (csv.Error, ValueError) as error:
        raise refusal(path, str(error)[:300], param=_PARAM) from error
    return examples


def _example(row: Sequence[str], number: int, subject: str) -> Example:
    if len(row) != len(_LETTERS) + 2 or row[-1].strip() not in tuple(_LETTERS):
        raise ValueError(f"row {number}: expected a question, four answers and one of {_LETTERS}")
    question, *answers, right = (cell.strip() for cell in row)
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, answers, strict=True))
    context = (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{question}\n{listed}\nAnswer:"
    )
    return Example(
        choices=tuple(
            Choice(context=context, continuation=f" {letter}", num_chars=1) for letter in _LETTERS
        ),
        gold=_LETTERS.index(right),
        normed=False,
    )
