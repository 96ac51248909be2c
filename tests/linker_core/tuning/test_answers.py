"""A variant's own answers against transformers' greedy ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linker_core.pace import Pace
from linker_core.tuning import answers as answers_module
from linker_core.tuning.answers import own_answers
from linker_core.tuning.calibration import CalibrationPrompt
from linker_core.tuning.request import SELF_CALIBRATION, TuneGoal
from linker_core.tuning.tuner import tune
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.engine.families import reference_greedy, reference_model
from tests.linker_core.tuning.pairs import make_pair
from tests.linker_core.tuning.test_tuner import request
from tests.tiny import make_checkpoint

LENGTH = 10


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "ANSWER_TOKENS", LENGTH)


def prompts(count: int) -> list[CalibrationPrompt]:
    generator = torch.Generator().manual_seed(3)
    return [
        CalibrationPrompt(
            token_ids=tuple(torch.randint(3, 512, (5 + n,), generator=generator).tolist()),
            kind="talk",
            text_digest=str(n),
        )
        for n in range(count)
    ]


def answered(
    path: Path, given: list[CalibrationPrompt], *, enough: int = 10_000
) -> list[list[int]]:
    with Checkpoint.open(path) as checkpoint:
        return own_answers(
            checkpoint,
            given,
            enough_tokens=enough,
            device="cpu",
            pace=Pace(),
            precision="highest",
        )


def test_answers_are_the_variants_greedy_ones(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "variant")
    given = prompts(19)  # more than are answered at once
    model = reference_model(path)
    assert answered(path, given) == [
        until_stop(reference_greedy(model, list(prompt.token_ids), LENGTH)) for prompt in given
    ]


def until_stop(token_ids: list[int], stop: int = 2) -> list[int]:
    return token_ids[: token_ids.index(stop) + 1] if stop in token_ids else token_ids


def test_answer_ends_with_its_stop_token(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "variant")
    (whole,) = answered(path, prompts(1))
    stop = whole[4]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    (cut,) = answered(path, prompts(1))
    assert cut == whole[: whole.index(stop) + 1]


def test_no_more_prompts_are_answered_than_it_takes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "variant")
    given = prompts(40)
    first = answered(path, given, enough=1)
    assert len(first) == 16
    assert answered(path, given, enough=sum(map(len, first))) == first
    assert len(answered(path, given, enough=sum(map(len, first)) + 1)) == 32
    assert len(answered(path, given[:20])) == 20


def test_plans_are_priced_on_the_variants_own_answers(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=2)
    goal = TuneGoal(rungs={name: str(rung) for name, rung in pair.aliasing("mlp.").items()})
    asked = request(pair, goal)
    result = tune(replace(asked, calibration=SELF_CALIBRATION))
    shipped = tune(asked)
    assert result.calibration != shipped.calibration
    assert 500 < result.reference_tokens <= 120 * LENGTH  # of all the prompts that were short
    assert result.chosen.price.kl > 0
    assert tune(replace(asked, calibration=SELF_CALIBRATION)).chosen == result.chosen
