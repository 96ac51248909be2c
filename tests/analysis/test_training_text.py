"""A file of rows as a tiny model reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.training_text import read_training_text
from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint

ROWS = (
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
    {"text": "All of this is learnt"},
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(make_checkpoint(tmp_path / "model")) as opened:
        yield opened


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_read_training_text_learns_answers_and_whole_texts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    texts = read_training_text(checkpoint, written(tmp_path / "rows.jsonl", *ROWS), max_tokens=99)
    tokenizer = Tokenizer.load(checkpoint.path)
    learnt = {
        tokenizer.decode(
            [text.token_ids[i] for span in text.responses for i in span], skip_special_tokens=False
        )
        for text in texts
    }
    whole = tokenizer.encode(str(ROWS[1]["text"]), add_special_tokens=True)
    assert learnt == {"Yes<|im_end|>", tokenizer.decode(whole[1:])}


def test_read_training_text_cuts_what_is_long(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", {"text": "word " * 400})
    (short,) = read_training_text(checkpoint, file, max_tokens=7)
    (long,) = read_training_text(checkpoint, file, max_tokens=100_000)
    assert len(short.token_ids) == 7
    assert len(long.token_ids) == checkpoint.config.max_position_embeddings


def test_read_training_text_stops_at_enough_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", *({"text": f"{i} is a number"} for i in range(9)))
    texts = read_training_text(checkpoint, file, max_tokens=9, enough_tokens=20)
    counts = [len(span) for text in texts for span in text.responses]
    assert sum(counts[:-1]) < 20 <= sum(counts)


def test_read_training_text_of_no_dialogue_names_the_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match=r"rows\.jsonl: .*line 1"):
        read_training_text(checkpoint, written(tmp_path / "rows.jsonl", {"a": 1}), max_tokens=9)
