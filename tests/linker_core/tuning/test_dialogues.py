from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.tuning import dialogues
from linker_core.tuning.dialogues import Dialogue, Turn, load_dialogues, text_digests

TIMES, OVER = "\u00d7", "\u00f7"
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(path: Path) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        load_dialogues(path)
    assert caught.value.param == "calibration"
    return caught.value.message


def test_shipped_dialogues_are_varied_and_end_with_an_answer() -> None:
    shipped = load_dialogues(None)
    assert len(shipped) >= 100
    assert all(dialogue.turns[-1].role == "assistant" for dialogue in shipped)
    assert not any(dialogue.given or dialogue.plain for dialogue in shipped)
    kinds = Counter(dialogue.kind for dialogue in shipped)
    assert kinds.keys() == {"chat", "essay", "instruction", "mathematics"}
    assert min(kinds.values()) >= 25
    assert sum(dialogue.turns[0].role == "system" for dialogue in shipped) >= 4
    assert sum(len(dialogue.turns) >= 4 for dialogue in shipped) >= 12
    endings = [dialogue.turns[-1].content.splitlines()[-1] for dialogue in shipped]
    assert sum(re.fullmatch(r"#### [\d.,]+", ending) is not None for ending in endings) >= 12


def test_shipped_dialogues_hold_no_prompt_twice() -> None:
    shipped = load_dialogues(None)
    first = [next(t.content for t in d.turns if t.role == "user") for d in shipped]
    assert len(set(first)) == len(first)


def test_shipped_arithmetic_is_right() -> None:
    """Every `a op b … = c` in an answer."""
    number = r"\$?€?£?\d[\d,]*(?:\.\d+)?"
    equation = re.compile(rf"({number}(?: [-+{TIMES}{OVER}] {number})+) = ({number})")
    checked = 0
    for dialogue in load_dialogues(None):
        for turn in dialogue.turns:
            for left, right in equation.findall(turn.content if turn.role != "system" else ""):
                value = _value(re.sub(r"[,$€£]", "", left).split())
                assert value == pytest.approx(float(re.sub(r"[,$€£]", "", right))), left
                checked += 1
    assert checked >= 60


def _value(words: list[str]) -> float:
    """Evaluates numbers and operators in turns, products first."""
    terms = [float(words[0])]
    for operator, word in zip(words[1::2], words[2::2], strict=True):
        value = float(word)
        if operator == TIMES:
            terms[-1] *= value
        elif operator == OVER:
            terms[-1] /= value
        else:
            terms.append(value if operator == "+" else -value)
    return sum(terms)


def test_user_file_comes_before_the_shipped_dialogues(tmp_path: Path) -> None:
    file = write(
        tmp_path / "own.jsonl",
        {"messages": [USER, ANSWER], "id": 7},
        {"text": "Once upon a time", "kind": "tale"},
    )
    file.write_text(file.read_text().replace("\n", "\r\n\n"))
    loaded = load_dialogues(file)
    assert loaded[:2] == [
        Dialogue(
            turns=(Turn(role="user", content="Hi"), Turn(role="assistant", content="Hello!")),
            kind="given",
            given=True,
        ),
        Dialogue(
            turns=(Turn(role="assistant", content="Once upon a time"),),
            kind="tale",
            plain=True,
            given=True,
        ),
    ]
    assert loaded[2:] == load_dialogues(None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([USER, ANSWER], 'either "messages" or "text"'),
        ({}, 'either "messages" or "text"'),
        ({"text": "a", "messages": [USER, ANSWER]}, 'either "messages" or "text"'),
        ({"text": 5}, "text is not a string"),
        ({"text": " \n"}, "text is empty"),
        ({"messages": "Hi"}, "messages is not a list"),
        ({"messages": {"role": "user"}}, "messages is not a list"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [USER, "Hello"]}, r"messages\[1\]: expected an object"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\]: expected an object"),
        ({"messages": [{**USER, "name": "x"}, ANSWER]}, r"messages\[0\]: expected an object"),
        ({"messages": [{**USER, "role": "tool"}, ANSWER]}, r"messages\[0\].role is 'tool'"),
        ({"messages": [{**USER, "role": ["user"]}, ANSWER]}, r"messages\[0\].role is \['user'\]"),
        ({"messages": [{**USER, "content": [1]}, ANSWER]}, r"\[0\].content is not a string"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, r"messages\[1\].content is empty"),
        ({"text": "a", "kind": ""}, "kind is not a string of 1 to 40"),
        ({"text": "a", "kind": "k" * 41}, "kind is not a string of 1 to 40"),
        ({"text": "a", "kind": ["k"]}, "kind is not a string of 1 to 40"),
        ({"text": "a", "kind": None}, "kind is not a string of 1 to 40"),
        ({"messages": [USER, ANSWER], "kind": 1}, "kind is not a string of 1 to 40"),
    ],
)
def test_row_that_is_no_dialogue_is_refused_with_its_line(
    tmp_path: Path, row: Any, reason: str
) -> None:
    message = refused(write(tmp_path / "own.jsonl", {"messages": [USER, ANSWER]}, row))
    assert "line 2:" in message
    assert re.search(reason, message)


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"\xff\xfe",
        b'{"text": "a", "text": "b"}',
        b'{"text": "\\ud800"}',
        b'{"text": "a", "x": NaN}',
        b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"text": "' + b"a" * (1 << 20) + b'"}',
    ],
)
def test_row_that_is_not_strict_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "own.jsonl").write_bytes(data)
    assert "line 1:" in refused(tmp_path / "own.jsonl")


def test_file_that_is_absent_irregular_or_empty_is_refused(tmp_path: Path) -> None:
    assert "cannot be opened" in refused(tmp_path / "absent")
    assert "cannot be opened" in refused(Path("a\0b"))
    assert "not a regular file" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refused(tmp_path / "fifo")
    assert "not a regular file" in refused(Path("/dev/zero"))
    (tmp_path / "empty").write_bytes(b"\n\n")
    assert "no rows" in refused(tmp_path / "empty")


def test_file_beyond_the_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert "larger than 64 MiB" in refused(tmp_path / "large")
    monkeypatch.setattr(dialogues, "MAX_ROWS", 200)
    assert len(load_dialogues(write(tmp_path / "full", *[{"text": "a"}] * 200))) > 200
    assert "more than 200 rows" in refused(write(tmp_path / "many", *[{"text": "a"}] * 201))


def test_text_digests_find_a_prompt_again_whatever_its_case_and_spacing(tmp_path: Path) -> None:
    def digests(name: str, *rows: object) -> set[str]:
        return text_digests([d for d in load_dialogues(write(tmp_path / name, *rows)) if d.given])

    first = digests("a", {"messages": [USER, ANSWER]})
    again = digests("b", {"messages": [{**USER, "content": " HI\n"}, {**ANSWER, "content": "No."}]})
    other = digests("c", {"messages": [{**USER, "content": "Why?"}, ANSWER]})
    assert first & again
    assert not first & other
    assert digests("d", {"text": "Some  text"}) == digests("e", {"text": "some text "})


def test_more_kinds_than_can_be_weighed_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "a b", "kind": str(i)}) + "\n" for i in range(33)))
    with pytest.raises(InvalidRequestError, match="33 kinds"):
        load_dialogues(file)
