"""Multiple choice against a plain computation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.evaluation.choices import ChoiceScore, Questions, pooled
from analysis.model import StudyModel
from linker_core.tuning.tasks import Choice, Example, Task
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StudyModel:
    path = make_checkpoint(tmp_path_factory.mktemp("choices") / "base")
    with Checkpoint.open(path) as checkpoint:
        return StudyModel.open(checkpoint)


def _example(context: str, answers: list[str], *, gold: int, normed: bool) -> Example:
    return Example(
        choices=tuple(
            Choice(context=context, continuation=f" {answer}", num_chars=len(answer))
            for answer in answers
        ),
        gold=gold,
        normed=normed,
    )


LETTERS = Task(
    name="letters",
    examples=tuple(
        _example(f"Question {n}: {'?' * n}", list("ABCD"), gold=n % 4, normed=False)
        for n in range(16)
    ),
)
SENTENCES = Task(
    name="sentences",
    examples=tuple(
        _example(f"So {n} then", [f"it is {n}", "no", "it is much more"], gold=n % 3, normed=True)
        for n in range(14)
    ),
)


def _likelihood(model: StudyModel, choice: Choice) -> float:
    encode = model.tokenizer.encode
    ids = encode(choice.context + choice.continuation, add_special_tokens=True)
    start = len(encode(choice.context, add_special_tokens=True))
    return -float(model.losses(torch.tensor([ids]))[0, start - 1 :].sum())


def _right(model: StudyModel, example: Example) -> bool:
    values = [_likelihood(model, choice) for choice in example.choices]
    if example.normed:
        values = [v / c.num_chars for v, c in zip(values, example.choices, strict=True)]
    return int(np.argmax(values)) == example.gold


def test_answers_are_those_of_each_choice_alone(model: StudyModel) -> None:
    scores = Questions([LETTERS, SENTENCES], model.tokenizer, model.config).ask(model)
    for task in (LETTERS, SENTENCES):
        expected = tuple(_right(model, example) for example in task.examples)
        assert 0 < sum(expected) < len(expected)  # or the comparison says little
        assert scores[task.name].right == expected
        assert scores[task.name].chance == task.chance


def test_no_tasks_ask_nothing(model: StudyModel) -> None:
    assert Questions([], model.tokenizer, model.config).ask(model) == {}


def test_scores_have_their_binomial_error() -> None:
    score = ChoiceScore(right=(True, False, False, False, True), chance=0.5)
    assert score.accuracy == 0.4
    assert score.stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 4))


def test_the_change_of_a_score_is_paired_by_question() -> None:
    before = ChoiceScore(right=(True, False, False, True), chance=0.25)
    after = ChoiceScore(right=(True, True, False, True), chance=0.25)
    points, stderr = after.points_from(before)
    assert points == pytest.approx(25)
    assert stderr == pytest.approx(100 * np.std([0, 1, 0, 0], ddof=1) / 2)
    assert before.points_from(before) == (0, 0)


def test_pooling_counts_every_question_once() -> None:
    one = ChoiceScore(right=(True,), chance=0.5)
    three = ChoiceScore(right=(False, False, True), chance=0.25)
    score = pooled([one, three])
    assert score.right == (True, False, False, True)
    assert score.chance == pytest.approx(0.3125)


def test_a_model_that_diverged_has_no_accuracy(tmp_path: Path) -> None:
    with Checkpoint.open(make_checkpoint(tmp_path / "base")) as checkpoint:
        broken = StudyModel.open(checkpoint)
        questions = Questions([LETTERS, SENTENCES], broken.tokenizer, broken.config)
        sound = pooled(tuple(questions.ask(broken).values()))
        broken.put("model.norm.weight", np.full(broken.config.hidden_size, np.nan))
    scores = questions.ask(broken)
    assert [score.diverged for score in scores.values()] == [True, True]
    score = pooled(tuple(scores.values()))
    assert not any(score.right)
    assert (score.to_json()["accuracy"], score.to_json()["stderr"]) == (None, None)
    for change in (score.points_from(sound), sound.points_from(score)):
        assert all(map(math.isnan, change))


def test_one_score_that_diverged_makes_the_pooled_one_so() -> None:
    score = pooled([
        ChoiceScore(right=(True,), chance=0.5),
        ChoiceScore(right=(False,), chance=0.5, diverged=True),
    ])  # fmt: skip
    assert score.diverged
    assert math.isnan(score.accuracy)
