"""Multiple-choice tasks from files of JSON lines, as questions of likelihood. Needs no torch.

Prompts are those of lm-eval 0.4, zero-shot and without a chat template, which is what BS scores
with. The files are untrusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from linker_core.errors import InvalidRequestError
from linker_core.tuning.json_lines import parse_rows, read_bytes

SWEEP_TASK: Final = "piqa"  # BS appendix E sweeps on it
DEFAULT_LIMIT: Final = 25  # examples of a task
MAX_LIMIT: Final = 10_000
MAX_TASKS: Final = 32
_MAX_CHOICES: Final = 26
_MAX_NAME_CHARS: Final = 60
_BLANK: Final = "_"  # of a WinoGrande sentence, stands for one of the options


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer: a text, and what a model is asked to find likely after it."""

    context: str
    continuation: str
    num_chars: int  # of the answer itself, what its likelihood is divided by


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question."""

    choices: tuple[Choice, ...]
    gold: int
    normed: bool
    """Whether the most likely answer per character is the model's, or the most likely one.

    lm-eval calls these acc_norm and acc and reports both for all but WinoGrande, whose
    continuations are one text. BS table 7's ARC and HellaSwag are acc_norm (HellaSwag at 52 % for
    Qwen2.5-0.5B; acc is about 40 %).
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Questions of one file."""

    name: str  # the file's, without its ending
    examples: tuple[Example, ...]

    @property
    def chance(self) -> float:
        """Share of right answers that guessing gives."""
        return sum(1 / len(e.choices) for e in self.examples) / len(self.examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """Tasks in two parts: what a sweep looks at, and what it does not."""

    sweep: Task
    heldout: tuple[Task, ...]  # at least one


def load_task_set(directory: Path, *, limit: int = DEFAULT_LIMIT) -> TaskSet:
    """Returns a directory's tasks; the sweep's is the one file whose name begins with "piqa".

    Args:
        directory: See `load_tasks`.
        limit: See `load_tasks`.

    Raises:
        InvalidRequestError: As `load_tasks`; or not one such file, or none beside it.
    """
    tasks = load_tasks(directory, limit=limit)
    sweep = [task for task in tasks if task.name.lower().startswith(SWEEP_TASK)]
    heldout = [task for task in tasks if task not in sweep]
    if len(sweep) != 1 or not heldout:
        raise _refusal(
            f"expected one file {SWEEP_TASK}*.jsonl for the sweep and others to hold out, but "
            f"there are {len(sweep)} and {len(heldout)}"
        )
    return TaskSet(sweep=sweep[0], heldout=tuple(heldout))


def load_tasks(directory: Path, *, limit: int = DEFAULT_LIMIT) -> list[Task]:
    """Returns the tasks in a directory's `*.jsonl` files by name.

    A row is PIQA's `{"goal", "sol1", "sol2", "label": 0 or 1}`, WinoGrande's `{"sentence",
    "option1", "option2", "answer": "1" or "2"}`, or `{"query", "choices", "gold" or "label"}` with
    the index of the right choice, in which HellaSwag's and ARC's prompts are written out. Other
    fields are not looked at.

    Args:
        directory: Of the files.
        limit: Examples of each task; those whose SHA-256 comes first, so the same ones every time.

    Raises:
        InvalidRequestError: Nothing there, too much of it, or a row is no question.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequestError(
            f"limit is {limit}, expected 1 to {MAX_LIMIT} examples of a task.", param="limit"
        )
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix == ".jsonl")
    except (OSError, ValueError) as error:
        raise _refusal("the directory cannot be read; give one with *.jsonl files") from error
    if not 1 <= len(files) <= MAX_TASKS:
        raise _refusal(f"{len(files)} files end in .jsonl, expected 1 to {MAX_TASKS}")
    return [_load(path, limit) for path in files]


def _load(path: Path, limit: int) -> Task:
    name = path.stem
    if len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise _refusal(f"{name!r:.80}: names have at most {_MAX_NAME_CHARS} printable characters")
    try:
        examples = parse_rows(read_bytes(path), _example)
    except ValueError as error:
        raise _refusal(f"{path.name}: {error}") from error
    return Task(name=name, examples=tuple(sorted(examples, key=_digest)[:limit]))


def _digest(example: Example) -> bytes:
    texts = (text for c in example.choices for text in (c.context, c.continuation))
    return hashlib.sha256("\0".join(texts).encode()).digest()


def _example(row: Any) -> Example:
    """Returns one row's question.

    Raises:
        ValueError: Says what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError("expected an object")
    if "goal" in row:
        question = f"Question: {_text(row, 'goal')}\nAnswer:"
        answers = [_text(row, "sol1"), _text(row, "sol2")]
        return _asked(question, answers, _index(row.get("label"), 2, "label"))
    if "sentence" in row:
        return _filled_in(row)
    if "query" in row:
        return _asked(_text(row, "query"), *_written_out(row))
    raise ValueError("expected goal, sol1, sol2; sentence, option1, option2; or query, choices")


def _written_out(row: Mapping[str, Any]) -> tuple[list[str], int]:
    choices = row.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= _MAX_CHOICES:
        raise ValueError(f"choices is not a list of 2 to {_MAX_CHOICES}")
    answers = [_text({"a choice": choice}, "a choice") for choice in choices]
    stated = {key: row[key] for key in ("gold", "label") if key in row}
    indices = {_index(value, len(choices), key) for key, value in stated.items()}
    if len(indices) != 1:
        raise ValueError("expected gold or label, and the same where both are given")
    return answers, indices.pop()


def _asked(question: str, answers: Sequence[str], gold: int) -> Example:
    return Example(
        choices=tuple(
            Choice(context=question, continuation=f" {answer}", num_chars=len(answer))
            for answer in answers
        ),
        gold=gold,
        normed=True,
    )


def _filled_in(row: Mapping[str, Any]) -> Example:
    """Returns a WinoGrande question: the option stands in the text, its rest is scored."""
    before, blank, rest = _text(row, "sentence").partition(_BLANK)
    rest = rest.strip()
    if not blank or not rest:
        raise ValueError(f"sentence has no blank ({_BLANK}) with text after it")
    answer = row.get("answer")
    if answer not in ("1", "2"):
        raise ValueError(f'answer is {answer!r:.40}, expected "1" or "2"')
    return Example(
        choices=tuple(
            Choice(
                context=before + _text(row, option), continuation=f" {rest}", num_chars=len(rest)
            )
            for option in ("option1", "option2")
        ),
        gold=int(answer) - 1,
        normed=False,
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is not a string with text in it")
    return value


def _index(value: object, num_choices: int, key: str) -> int:
    # A bool is an int to isinstance.
    if type(value) is not int or not 0 <= value < num_choices:
        raise ValueError(f"{key} is {value!r:.40}, expected 0 to {num_choices - 1}")
    return value


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Tasks: {reason}.", param="tasks")
