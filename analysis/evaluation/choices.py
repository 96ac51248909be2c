"""Multiple choice by likelihood, for one model as it is now.

Legend: B sequences of a batch, T tokens, n rows that predict a continuation's token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.evaluation.token_loss import finite
from analysis.model import StudyModel
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.scoring import EncodedChoice, encode_choice, judge
from linker_core.tuning.tasks import Task
from linker_core.weights.architecture import ModelConfig

_BATCH_TOKENS: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceScore:
    """Which questions were answered right; nothing is right of a model that diverged."""

    right: tuple[bool, ...]
    chance: float  # share that guessing gives
    diverged: bool = False  # whether some choice's likelihood is no number

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN where the model diverged."""
        return math.nan if self.diverged else sum(self.right) / len(self.right)

    @property
    def stderr(self) -> float:
        """Of the accuracy, as of independent questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, len(self.right) - 1))

    def points_from(self, baseline: ChoiceScore) -> tuple[float, float]:
        """Returns the change in points from a model that was asked the same, and its error.

        The standard error is of the mean of the questions' own changes: most questions get the same
        answer from both models, so it is smaller than two independent scores would have. Both are
        NaN where one of the models diverged.
        """
        assert len(self.right) == len(baseline.right)
        if self.diverged or baseline.diverged:
            return math.nan, math.nan
        changes = np.array(self.right, dtype=float) - np.array(baseline.right, dtype=float)
        deviation = changes.std(ddof=1) if len(changes) > 1 else 0.0
        return 100 * float(changes.mean()), 100 * float(deviation) / math.sqrt(len(changes))

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; None for what is not finite."""
        return {
            "accuracy": finite(self.accuracy),
            "stderr": finite(self.stderr),
            "chance": self.chance,
            "num_questions": len(self.right),
        }


def pooled(scores: Sequence[ChoiceScore]) -> ChoiceScore:
    """Returns the score over the questions of all."""
    right = tuple(answer for score in scores for answer in score.right)
    chance = sum(score.chance * len(score.right) for score in scores) / len(right)
    diverged = any(score.diverged for score in scores)
    return ChoiceScore(right=right, chance=chance, diverged=diverged)


class Questions:
    """Tasks as one tokenizer writes them.

    Args:
        tasks: What is asked.
        tokenizer: Of the models that are asked.
        config: Of those models.

    Raises:
        InvalidRequestError: The tokenizer fails on a choice, or it has no tokens of its own.
    """

    def __init__(self, tasks: Sequence[Task], tokenizer: Tokenizer, config: ModelConfig) -> None:
        self._tasks = tuple(tasks)
        self._choices = [
            encode_choice(choice, tokenizer, config)
            for task in tasks
            for example in task.examples
            for choice in example.choices
        ]
        # A choice's last token is only predicted: choices of one token share what is read.
        self._asking: dict[tuple[int, ...], list[int]] = {}
        for index, choice in enumerate(self._choices):
            self._asking.setdefault(tuple(choice.token_ids[:-1]), []).append(index)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is read; 0 without a question."""
        return max(map(len, self._asking), default=0)

    @torch.no_grad()
    def ask(self, model: StudyModel) -> dict[str, ChoiceScore]:
        """Returns each task's score."""
        likelihoods = np.zeros(len(self._choices))
        for batch in _batches(sorted(self._asking, key=len)):
            longest = max(map(len, batch))
            ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch])
            hidden_BTH = model.hidden(ids_BT)
            for ids, hidden_TH in zip(batch, hidden_BTH, strict=True):
                for index in self._asking[ids]:
                    likelihoods[index] = _likelihood(model, hidden_TH, self._choices[index])
        scores: dict[str, ChoiceScore] = {}
        first = 0
        for task in self._tasks:
            stop = first + sum(len(example.choices) for example in task.examples)
            scores[task.name] = _score(task, likelihoods[first:stop])
            first = stop
        return scores


def _score(task: Task, likelihoods: NDArray[np.float64]) -> ChoiceScore:
    """Returns a task's score from the log-probabilities of all its choices, in order."""
    if np.isnan(likelihoods).any():  # argmax would take them for the likeliest
        nothing = (False,) * len(task.examples)
        return ChoiceScore(right=nothing, chance=task.chance, diverged=True)
    right: list[bool] = []
    first = 0
    for example in task.examples:
        stop = first + len(example.choices)
        right.append(judge(example, likelihoods[first:stop]).reported)
        first = stop
    return ChoiceScore(right=tuple(right), chance=task.chance)


def _likelihood(model: StudyModel, hidden_TH: torch.Tensor, choice: EncodedChoice) -> float:
    """Returns the log-probability of a choice's continuation."""
    targets_n = torch.tensor(choice.token_ids[choice.start :], device=hidden_TH.device)
    rows_nH = hidden_TH[choice.start - 1 : len(choice.token_ids) - 1]
    log_probs_nV = model.logits(rows_nH).log_softmax(-1)
    return float(log_probs_nV.gather(1, targets_n[:, None]).double().sum())


def _batches(sequences: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Parts sequences, shortest first, into batches of a bounded number of tokens."""
    batches: list[list[tuple[int, ...]]] = []
    for ids in sequences:
        if batches and (len(batches[-1]) + 1) * len(ids) <= _BATCH_TOKENS:
            batches[-1].append(ids)
        else:
            batches.append([ids])
    return batches
