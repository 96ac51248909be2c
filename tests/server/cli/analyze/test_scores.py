"""Scores as they stand in a table: of a model that answers, and of one that diverged."""

from __future__ import annotations

import math

import pytest

from analysis.evaluation.choices import ChoiceScore
from analysis.evaluation.suite import Scores
from analysis.evaluation.sweep import changes
from server.cli.analyze.scores import change_cell, value_cell


def scores(*right: bool, diverged: bool = False) -> Scores:
    score = ChoiceScore(right=right, chance=0.25, diverged=diverged)
    return Scores(text={}, instruct=None, mmlu={"sums": score}, tasks={})


def test_an_accuracy_and_its_change_are_in_percent_and_points() -> None:
    before, after = scores(True, False, False, True), scores(True, True, False, True)
    assert value_cell(after.to_json(), "mmlu") == 75.0
    assert change_cell(changes(after, before)["mmlu"]) == "+25.0 ± 25.0"


def test_multiple_choice_of_a_model_that_diverged_says_so() -> None:
    sound, broken = scores(True, False), scores(False, False, diverged=True)
    assert value_cell(broken.to_json(), "mmlu") == "diverged"
    assert changes(broken, sound)["mmlu"] == {"points": None, "stderr": None}
    assert change_cell(changes(broken, sound)["mmlu"]) == "diverged"


@pytest.mark.parametrize("perplexity", [None, 3.5])
def test_a_perplexity_is_infinite_where_the_model_diverged(perplexity: float | None) -> None:
    value = value_cell({"instruct_record": {"perplexity": perplexity}}, "instruct_record")
    assert value == (math.inf if perplexity is None else perplexity)
    change = {"percent": perplexity, "low": None, "high": None}
    assert change_cell(change) == ("diverged" if perplexity is None else "+3.50 %")
