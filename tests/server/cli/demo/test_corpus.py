from __future__ import annotations

import subprocess
import sys
from functools import cache

from server.cli.demo import corpus as subject
from server.cli.demo.corpus import Corpus, conversations, instructions, read_corpus

DIGEST = (
    "import hashlib; from server.cli.demo.corpus import read_corpus;"
    "print(hashlib.sha256(repr(read_corpus()).encode()).hexdigest())"
)


@cache
def corpus() -> Corpus:
    return read_corpus()


def digest(hash_seed: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_corpus_is_the_same_in_every_process() -> None:
    assert digest("1") == digest("2")


def test_corpus_is_large_enough_to_learn_from() -> None:
    assert sum(map(len, corpus().prose)) > 500_000
    assert sum(map(len, corpus().sources)) > 1_000_000
    assert len(instructions(corpus().entries)) > 500


def test_entries_are_found_by_their_dotted_names() -> None:
    summaries = {entry.name: entry.summary for entry in corpus().entries}
    assert summaries["textwrap.dedent"] == (
        "Remove any common leading whitespace from every line in `text`.".replace("`", "")
    )
    assert "zipfile.ZipFile.close" in summaries or "queue.Queue.put" in summaries
    assert not [name for name in summaries if name.startswith("_")]


def test_instruction_answers_with_the_summary() -> None:
    found = [
        answer.content
        for question, answer in instructions(corpus().entries)
        if question.content == "What is queue.Queue.put?"
    ]
    assert found == ["Put an item into the queue."]


def test_conversation_asks_twice_and_answers_in_another_voice() -> None:
    for dialogue in conversations(corpus().entries):
        assert [message.role for message in dialogue] == ["user", "assistant"] * 2
        assert dialogue[1].content.startswith("Sure thing! ")


def test_no_answer_is_longer_than_a_line_or_without_an_end() -> None:
    for _, answer in instructions(corpus().entries):
        assert "\n" not in answer.content
        assert answer.content.endswith(".")
        assert len(answer.content) in subject._SUMMARY_CHARS
