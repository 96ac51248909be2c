"""Instruction perplexity: the cross-entropy on instructions in Alpaca's format (FM 3.6).

FM says "mean cross-entropy on instruction-formatted prompts" and not which tokens count. Both
readings are given: the whole record (template, instruction and response, all tokens but the first)
and the response alone, given all before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from analysis.evaluation.texts import check_ids, refusal
from analysis.evaluation.token_loss import TokenLoss
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.json_lines import MAX_ROWS, read_bytes
from linker_core.weights import strict_json

DEFAULT_LIMIT: Final = 200
_BATCH_TOKENS: Final = 2048  # short records are read together
_PARAM: Final = "instruct"
_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One record of Alpaca's format."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """The text up to where the response begins."""
        if self.input.strip():
            return _WITH_INPUT.format(instruction=self.instruction, input=self.input)
        return _WITHOUT_INPUT.format(instruction=self.instruction)


class EncodedInstruction(NamedTuple):
    """A record as a model reads it."""

    token_ids: list[int]
    response: int  # where it begins, at least 1


class InstructLoss(NamedTuple):
    """The two readings of FM's metric; a unit is a record."""

    record: TokenLoss
    response: TokenLoss


def load_instructions(path: Path, *, limit: int = DEFAULT_LIMIT) -> list[Instruction]:
    """Returns the last records of a JSON array of `{"instruction", "input", "output"}`.

    The last ones, because what trains on such a file mostly takes its beginning.

    Args:
        path: Of the file; untrusted.
        limit: How many at most.

    Raises:
        InvalidRequestError: It cannot be read, is too large, or holds something else.
    """
    try:
        rows = strict_json.parse(read_bytes(path))
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS:
            raise ValueError(f"expected a JSON array of 1 to {MAX_ROWS} records")
        first = max(0, len(rows) - limit)
        return [_instruction(row, first + i) for i, row in enumerate(rows[first:])]
    except ValueError as error:
        raise refusal(path, str(error)[:300], param=_PARAM) from error


def encode_instructions(
    instructions: Sequence[Instruction], tokenizer: Tokenizer, *, vocab_size: int, context: int
) -> list[EncodedInstruction]:
    """Returns the records as tokens; what is longer than the context loses its end.

    Raises:
        InvalidRequestError: The tokenizer fails on a text, or no response begins in the context.
    """
    encoded = []
    for instruction in instructions:
        prompt = tokenizer.encode(instruction.prompt, add_special_tokens=True)
        ids = tokenizer.encode(instruction.prompt + instruction.output, add_special_tokens=True)
        if ids[: len(prompt)] != prompt:  # a token that spans the seam belongs to the response
            same = (a == b for a, b in zip(prompt, ids, strict=False))
            prompt = prompt[: next((i for i, equal in enumerate(same) if not equal), len(ids))]
        ids = ids[:context]
        check_ids(ids, vocab_size=vocab_size)
        if 1 <= len(prompt) < len(ids):
            encoded.append(EncodedInstruction(ids, len(prompt)))
    if not encoded:
        raise InvalidRequestError(
            f"No response of the records begins within the model's context of {context} tokens.",
            param=_PARAM,
        )
    return encoded


@torch.no_grad()
def instruct_loss(model: StudyModel, records: Sequence[EncodedInstruction]) -> InstructLoss:
    """Returns the loss on records, in the order given."""
    whole = [0.0] * len(records)
    response = [0.0] * len(records)
    for batch in _batches(records):
        longest = max(len(records[i].token_ids) for i in batch)
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            ids_BT[row, : len(records[i].token_ids)] = torch.tensor(records[i].token_ids)
        losses_BT = model.losses(ids_BT).double()
        for row, i in enumerate(batch):
            own = losses_BT[row, : len(records[i].token_ids) - 1]
            whole[i] = float(own.sum())
            response[i] = float(own[records[i].response - 1 :].sum())
    return InstructLoss(
        TokenLoss(
            nats=tuple(whole), num_tokens=tuple(len(record.token_ids) - 1 for record in records)
        ),
        TokenLoss(
            nats=tuple(response),
            num_tokens=tuple(len(record.token_ids) - record.response for record in records),
        ),
    )


def _batches(records: Sequence[EncodedInstruction]) -> list[list[int]]:
    """Returns indices of records that are read together, of about the same length."""
    batches: list[list[int]] = []
    for i in sorted(range(len(records)), key=lambda i: len(records[i].token_ids)):
        fits = batches and (len(batches[-1]) + 1) * len(records[i].token_ids) <= _BATCH_TOKENS
        if fits:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _instruction(row: Any, index: int) -> Instruction:
    if not isinstance(row, Mapping):
        raise ValueError(f"record {index}: expected an object")
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"record {index}: {key} is not a string")
    if not isinstance(row.get("input", ""), str):
        raise ValueError(f"record {index}: input is not a string")
    return Instruction(
        instruction=row["instruction"], input=row.get("input", ""), output=row["output"]
    )
