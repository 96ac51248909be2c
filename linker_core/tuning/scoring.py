"""Scores plans on multiple-choice tasks, all of them in one walk, as lm-eval does.

Legend: T tokens of all choices, R of their continuations, n rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from linker_core.config import MatmulPrecision
from linker_core.errors import InvalidRequestError
from linker_core.pace import Pace
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.recipe_result import TaskScore
from linker_core.tuning.shared_walk import LastHidden, SharedWalk
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.tasks import Choice, Example, Task
from linker_core.tuning.walk import Walk
from linker_core.weights.architecture import ModelConfig

MAX_SEQUENCE_TOKENS = 1024

Reals = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedChoice:
    """A choice as the model reads it."""

    token_ids: list[int]
    start: int  # where its continuation begins, at least 1


class Verdict(NamedTuple):
    """Whether one question is answered right."""

    plain: bool  # by the most likely choice
    normed: bool  # by the most likely choice per character
    reported: bool  # the one of the two that counts for the task


class TaskScorer:
    """Scores plans of one pair on some tasks.

    Args:
        config: The variant's shape.
        tokenizer: The variant's.
        reader: Of the pair.
        tasks: What is asked.
        device: Where the walk runs.
        pace: Slows the walk down while others need the machine.
        precision: Of the products; see `Walk`.

    Raises:
        InvalidRequestError: The tokenizer fails on a choice, or one is too long.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        reader: SectionReader,
        tasks: Sequence[Task],
        *,
        device: torch.device,
        pace: Pace,
        precision: MatmulPrecision,
    ) -> None:
        self._tasks = tuple(tasks)
        choices = [c for task in tasks for example in task.examples for c in example.choices]
        sequences = [encode_choice(choice, tokenizer, config) for choice in choices]
        rows, targets, self._choice_of_R = _predicting_rows(sequences)
        self._num_choices = len(choices)
        self._targets_R = torch.tensor(targets, device=device)
        lengths = [len(sequence.token_ids) for sequence in sequences]
        token_ids = [token for sequence in sequences for token in sequence.token_ids]
        self._shared = SharedWalk(
            Walk(config, lengths, device=device, pace=pace, precision=precision),
            reader,
            token_ids,
            rows,
        )

    @property
    def forward_passes(self) -> float:
        """Passes of the whole variant that the walks so far amount to."""
        return self._shared.forward_passes

    def score(self, plans: Sequence[Rungs]) -> list[dict[str, TaskScore]]:
        """Returns every plan's scores by task; equal plans are measured once."""
        distinct = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]
        scores = [self._scores(likelihoods) for likelihoods in self.likelihoods(distinct)]
        return [scores[distinct.index(plan)] for plan in plans]

    def likelihoods(self, plans: Sequence[Rungs]) -> list[Reals]:
        """Returns each plan's log-probability of every choice's continuation, all in order."""
        found = [self._likelihoods(last) for last in self._shared.last_hidden(plans)]
        self._shared.forget()
        return found

    def _likelihoods(self, last: LastHidden) -> Reals:
        found_R = np.empty(len(self._targets_R))
        for rows in self._shared.chunks():
            targets_n1 = self._targets_R[rows].unsqueeze(1)
            log_probs_nV = self._shared.log_probs(last, rows)
            found_R[rows] = log_probs_nV.gather(1, targets_n1).squeeze(1).cpu().numpy()
        sums = np.zeros(self._num_choices)
        np.add.at(sums, self._choice_of_R, found_R)
        return sums

    def _scores(self, likelihoods: Reals) -> dict[str, TaskScore]:
        scores: dict[str, TaskScore] = {}
        first = 0
        for task in self._tasks:
            length = sum(len(example.choices) for example in task.examples)
            scores[task.name] = score_task(task, likelihoods[first : first + length])
            first += length
        return scores


def judge(example: Example, likelihoods: Reals) -> Verdict:
    """Says whether a question is answered right by the log-likelihoods of its choices."""
    lengths = np.array([choice.num_chars for choice in example.choices])
    plain = int(np.argmax(likelihoods)) == example.gold
    normed = int(np.argmax(likelihoods / lengths)) == example.gold
    return Verdict(plain, normed, normed if example.normed else plain)


def score_task(task: Task, likelihoods: Reals) -> TaskScore:
    """Returns a task's score from the log-likelihoods of all its choices, in order."""
    plain: list[bool] = []
    normed: list[bool] = []
    reported: list[bool] = []
    first = 0
    for example in task.examples:
        verdict = judge(example, likelihoods[first : first + len(example.choices)])
        first += len(example.choices)
        plain.append(verdict.plain)
        normed.append(verdict.normed)
        reported.append(verdict.reported)
    num = len(task.examples)
    score = sum(reported) / num
    return TaskScore(
        acc=sum(plain) / num,
        acc_norm=sum(normed) / num,
        score=score,
        stderr=math.sqrt(score * (1 - score) / max(1, num - 1)),
    )


def encode_choice(choice: Choice, tokenizer: Tokenizer, config: ModelConfig) -> EncodedChoice:
    """Encodes context and continuation together and parts them after the context's tokens.

    As lm-eval: spaces at the context's end belong to the continuation, and what is too long loses
    tokens at its beginning. Deviates from it in that a tokenizer adds what it prescribes (bos).

    Raises:
        InvalidRequestError: The tokenizer fails on it, its ids are beyond the model's, or the
            continuation has no tokens of its own.
    """
    context = choice.context.rstrip(" ")
    continuation = choice.context[len(context) :] + choice.continuation
    ids = tokenizer.encode(context + continuation, add_special_tokens=True)
    start = len(tokenizer.encode(context, add_special_tokens=True))
    if max(ids, default=0) >= config.vocab_size:
        raise _refusal("its tokenizer makes ids beyond the model's last")
    limit = min(MAX_SEQUENCE_TOKENS, config.max_position_embeddings)
    cut = max(0, len(ids) - limit)
    if not 1 <= start - cut < len(ids) - cut:
        raise _refusal(
            f"{choice.continuation!r:.80} has no tokens of its own between 1 and {limit - 1}"
        )
    return EncodedChoice(token_ids=ids[cut:], start=start - cut)


def _predicting_rows(
    sequences: Sequence[EncodedChoice],
) -> tuple[list[int], list[int], npt.NDArray[np.int64]]:
    """Returns rows that predict a continuation's token, those tokens, and the choice of each."""
    rows: list[int] = []
    targets: list[int] = []
    choice_of: list[int] = []
    first = 0
    for number, sequence in enumerate(sequences):
        continuation = sequence.token_ids[sequence.start :]
        rows += [first + sequence.start - 1 + i for i in range(len(continuation))]
        targets += continuation
        choice_of += [number] * len(continuation)
        first += len(sequence.token_ids)
    return rows, targets, np.array(choice_of, dtype=np.int64)


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Tasks: the model cannot be asked: {reason}.", param="tasks")
