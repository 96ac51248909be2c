"""Instruction perplexity: which records, which tokens, which loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from analysis.evaluation.instructions import (
    Instruction,
    encode_instructions,
    instruct_loss,
    load_instructions,
)
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint

RECORDS = [
    Instruction(instruction="Add.", input="1, 2", output="3"),
    Instruction(instruction="Name a fish.", input="", output="A salmon is one of many fish."),
    Instruction(instruction="Say it.", input=" ", output="It"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StudyModel:
    path = make_checkpoint(tmp_path_factory.mktemp("instructions") / "base")
    with Checkpoint.open(path) as checkpoint:
        return StudyModel.open(checkpoint)


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def _records(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"number {i}", "input": "", "output": "yes"} for i in range(count)]


def test_the_last_records_of_a_file_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "alpaca.json", _records(9))
    assert [one.instruction for one in load_instructions(path, limit=2)] == ["number 7", "number 8"]
    assert len(load_instructions(path, limit=50)) == 9


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "Expecting value"),
        ({"instruction": "a"}, "array"),
        ([], "array"),
        ([3], "record 0: expected an object"),
        ([*_records(3), {"instruction": "a", "output": None}], "record 3: output"),
        ([{"output": "a"}], "record 0: instruction"),
        ([{"instruction": "a", "output": "b", "input": 3}], "record 0: input"),
        ("[" * 100 + "]" * 100, "nested"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    tmp_path: Path, content: Any, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        load_instructions(_write(tmp_path / "bad.json", content))
    assert refused.value.param == "instruct"


def test_prompts_are_in_alpacas_format_with_the_input_only_where_there_is_one() -> None:
    assert RECORDS[0].prompt.startswith("Below is an instruction that describes a task, paired ")
    assert RECORDS[0].prompt.endswith("\n\n### Input:\n1, 2\n\n### Response:\n")
    assert "### Input" not in RECORDS[1].prompt
    assert "### Input" not in RECORDS[2].prompt
    assert RECORDS[1].prompt.endswith("### Instruction:\nName a fish.\n\n### Response:\n")


def test_losses_are_those_of_each_record_alone(model: StudyModel) -> None:
    encoded = encode_instructions(RECORDS, model.tokenizer, vocab_size=512, context=1000)
    loss = instruct_loss(model, encoded)
    for i, record in enumerate(RECORDS):
        prompt = model.tokenizer.encode(record.prompt, add_special_tokens=True)
        ids = model.tokenizer.encode(record.prompt + record.output, add_special_tokens=True)
        assert ids[: len(prompt)] == prompt  # bytes: no token spans the seam
        alone = model.losses(torch.tensor([ids]))[0].double()
        assert loss.record.num_tokens[i] == len(ids) - 1
        assert loss.record.nats[i] == pytest.approx(float(alone.sum()), rel=1e-5)
        assert loss.response.num_tokens[i] == len(ids) - len(prompt)
        assert loss.response.nats[i] == pytest.approx(
            float(alone[len(prompt) - 1 :].sum()), rel=1e-5
        )


def test_a_token_over_the_seam_belongs_to_the_response() -> None:

    class Joining:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert add_special_tokens
            ids = list(text.encode())
            return ids if text.endswith("\n") else [*ids[:-2], 256]

    record = Instruction(instruction="a", input="", output="b")
    joining = cast(Tokenizer, Joining())
    (encoded,) = encode_instructions([record], joining, vocab_size=512, context=1000)
    assert encoded.response == len(record.prompt) - 1
    assert encoded.token_ids[-1] == 256


def test_records_end_at_the_context_and_those_without_a_response_in_it_are_left_out(
    model: StudyModel,
) -> None:
    lengths = [len(model.tokenizer.encode(r.prompt, add_special_tokens=True)) for r in RECORDS]
    context = min(lengths) + 2
    encoded = encode_instructions(RECORDS, model.tokenizer, vocab_size=512, context=context)
    assert len(encoded) == sum(length < context for length in lengths)
    assert all(len(record.token_ids) <= context for record in encoded)
    with pytest.raises(InvalidRequestError, match="context of 20 tokens"):
        encode_instructions(RECORDS, model.tokenizer, vocab_size=512, context=20)


def test_ids_that_the_model_lacks_are_refused(model: StudyModel) -> None:
    with pytest.raises(InvalidRequestError, match="beyond"):
        encode_instructions(RECORDS, model.tokenizer, vocab_size=40, context=1000)
