"""Prices are of the products that the engine computes, at either precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linker_core.config import MatmulPrecision
from linker_core.engine import devices
from linker_core.engine.cpu.arithmetic import CompiledArithmetic
from linker_core.engine.cpu.kernels import can_round
from linker_core.tuning import answers as answers_module
from linker_core.tuning.recipe import paper_recipe
from linker_core.tuning.request import SELF_CALIBRATION, TuneGoal
from linker_core.tuning.result import TuneResult
from linker_core.tuning.tuner import tune
from tests.benchmarks.precision import measure
from tests.linker_core.tuning.pairs import Pair, make_pair
from tests.linker_core.tuning.test_recipe import request as recipe_request
from tests.linker_core.tuning.test_recipe import write_tasks
from tests.linker_core.tuning.test_tuner import request
from tests.linker_core.tuning.test_walk import LENGTHS, token_ids, walked

PRECISIONS: tuple[MatmulPrecision, ...] = ("highest", "medium")
BOUND_NATS = 1e-3  # a tenth of the default budget


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("precision"), layers=2)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each arithmetic was told, as they are made."""
    told: list[bool] = []

    def make(*, rounded: bool) -> CompiledArithmetic:
        told.append(rounded)
        return CompiledArithmetic(rounded=rounded)

    monkeypatch.setattr(devices, "CompiledArithmetic", make)
    return told


def tuned(pair: Pair, precision: MatmulPrecision, *, calibration: str | None = None) -> TuneResult:
    rungs = {name: str(rung) for name, rung in pair.aliasing("mlp.").items()}
    asked = request(pair, TuneGoal(rungs=rungs))
    return tune(replace(asked, calibration=calibration, matmul_precision=precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_request_reaches_every_arithmetic_and_every_price(
    pair: Pair, precision: MatmulPrecision, rounded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "ANSWER_TOKENS", 10)
    result = tuned(pair, precision, calibration=SELF_CALIBRATION)
    assert len(rounded) >= 2  # the variant answers, then plans are walked
    assert set(rounded) == {precision == "medium"}
    assert {plan.price.matmul_precision for plan in result.frontier} == {precision}


def test_search_measures_harm_at_its_precision(pair: Pair, rounded: list[bool]) -> None:
    asked = request(pair, TuneGoal(budget_kl=0.02))
    tune(replace(asked, matmul_precision="medium"))
    assert len(rounded) == 2  # of the sensitivities and of the prices
    assert all(rounded)


def test_recipe_scores_and_prices_at_its_precision(
    pair: Pair, rounded: list[bool], tmp_path: Path
) -> None:
    asked = recipe_request(pair, write_tasks(tmp_path / "tasks", piqa_gold=[0] * 4))
    result = paper_recipe(replace(asked, matmul_precision="medium"))
    assert len(rounded) >= 3  # of both sets of tasks and of the prices
    assert all(rounded)
    assert {plan.price.matmul_precision for plan in result.plans} == {"medium"}


@pytest.mark.skipif(not can_round(), reason="no units for bfloat16")
def test_medium_walks_another_path_and_prices_both_sides_on_it(pair: Pair) -> None:
    (_, highest), (_, medium) = (
        walked(pair, [pair.base], pair.walk(LENGTHS, precision=precision), token_ids())[0]
        for precision in PRECISIONS
    )
    assert not torch.equal(highest, medium)
    torch.testing.assert_close(medium, highest, rtol=0, atol=0.05 * float(highest.abs().max()))
    at_highest, at_medium = (tuned(pair, precision).chosen.price for precision in PRECISIONS)
    assert at_highest.kl != at_medium.kl
    assert at_medium.kl == pytest.approx(at_highest.kl, rel=0.1)


@pytest.mark.skipif(not can_round(), reason="no units for bfloat16")
def test_variant_at_medium_is_its_own_reference(pair: Pair) -> None:
    rungs = {name: str(rung) for name, rung in pair.base.items()}
    asked = request(pair, TuneGoal(rungs=rungs))
    price = tune(replace(asked, matmul_precision="medium")).chosen.price
    assert (price.kl, price.top1, price.ppl_ratio) == (0.0, 1.0, 1.0)


@pytest.mark.shared
def test_medium_moves_trained_answers_less_than_the_budget(shared: Path) -> None:
    moved = measure(shared / "families" / "mini-qwen2" / "chat")
    assert moved.num_tokens >= 4000
    assert (moved.kl > 0) == can_round()
    assert moved.kl < BOUND_NATS
    assert 0.95 < moved.top1 <= 1
