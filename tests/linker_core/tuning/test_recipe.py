"""BS appendix E: its numbers come out, and what is reported is what its plans do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.pace import Pace
from linker_core.sharing.plan import Fingerprints, Policy, SharePlan
from linker_core.sharing.planner import plan_variant
from linker_core.sharing.report import BlockScan, ScanReport
from linker_core.sharing.scan import scan
from linker_core.sharing.similarity import PairSums
from linker_core.sharing.thresholds import CONSERVATIVE, Thresholds, load_tiers
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.recipe import paper_recipe
from linker_core.tuning.recipe_result import RecipePlan, RecipeResult, SweepPoint, TaskScore
from linker_core.tuning.recipe_rules import (
    MAX_POINTS,
    PAPER_POINTS,
    RecipeRequest,
    fitted_tau_frob,
    is_boundary,
    quality_slope,
    sweep_thresholds,
    widening_tau_cos,
    widest_that_holds,
)
from linker_core.tuning.scoring import TaskScorer
from linker_core.tuning.tasks import load_task_set, load_tasks
from linker_core.tuning.texts import calibration_text
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.engine.families import CPU
from tests.linker_core.tuning.pairs import Pair, make_pair

TABLE_8 = {
    "Mistral-7B-v0.3": 0.006, "Qwen2.5-3B": 0.011, "Qwen2.5-7B": 0.015, "Qwen2.5-0.5B": 0.045,
    "Llama-3.1-8B": 0.045, "Gemma-2-2B": 0.049, "Llama-3.2-3B": 0.110, "Llama-3.2-1B": 0.156,
}  # fmt: skip


def report(epsilons: Sequence[float], *, cos: float | Sequence[float] = 0.995) -> ScanReport:
    """A scan whose blocks have these ε and cosines."""
    cosines = [cos] * len(epsilons) if isinstance(cos, float) else cos
    blocks = []
    for index, (epsilon, cosine) in enumerate(zip(epsilons, cosines, strict=True)):
        sums = PairSums(
            dot=cosine, donor_square=1.0, variant_square=1.0, delta_square=epsilon**2,
            identical=False, count=1,
        )  # fmt: skip
        blocks.append(BlockScan(index=index, params={"mlp.up_proj.weight": sums}))
    return ScanReport(
        donor="donor", variant="variant", bytes_read=0, scan_seconds=0.0, blocks=tuple(blocks),
        outside_blocks={}, identical_rows={},
    )  # fmt: skip


def num_shared(scanned: ScanReport, quality_budget: float) -> int:
    tau_frob = fitted_tau_frob(quality_budget)
    thresholds = Thresholds(tau_cos=0.99, tau_frob=tau_frob, source="fit")
    return sum(thresholds.shares(block) for block in scanned.blocks)


def test_fit_gives_the_paper_s_operating_points() -> None:
    assert quality_slope() == pytest.approx(0.78, abs=0.001)
    assert [fitted_tau_frob(lost) for _, lost in PAPER_POINTS] == [0.06, 0.13]
    assert [tau for tau, _ in PAPER_POINTS] == [0.06, 0.13]


def test_fit_shares_what_the_paper_says_at_five_and_ten_per_cent() -> None:
    small_qwen = report([TABLE_8["Qwen2.5-0.5B"]] * 24)
    assert num_shared(small_qwen, 0.05) == 24
    # Llama-3.2-1B: none at 5 %, 13 of 16 at 10 %; table 8 gives the mean, appendix L the ends.
    assert num_shared(report([TABLE_8["Llama-3.2-1B"]] * 16), 0.05) == 0
    ends = (16 * TABLE_8["Llama-3.2-1B"] - 13 * 0.125) / 3
    small_llama = report([ends, *[0.125] * 13, ends, ends])
    assert small_llama.mean_epsilon == pytest.approx(0.156)
    assert (num_shared(small_llama, 0.05), num_shared(small_llama, 0.10)) == (0, 13)


def test_boundary_families_are_those_of_the_paper() -> None:
    found = {name for name, epsilon in TABLE_8.items() if is_boundary(report([epsilon] * 4))}
    assert found == {"Llama-3.2-3B", "Llama-3.2-1B"}


def test_sweep_goes_from_nothing_over_every_block_above_tau_cos() -> None:
    scanned = report([0.03, 0.01, 0.02, 0.02, 0.015], cos=[0.995, 0.995, 0.995, 0.995, 0.98])
    assert sweep_thresholds(scanned, 0.99) == [
        Thresholds(tau_cos=0.99, tau_frob=tau, source="sweep") for tau in (0.0, 0.01, 0.02, 0.03)
    ]


def test_sweep_of_many_blocks_is_thinned_and_keeps_its_ends() -> None:
    taus = [one.tau_frob for one in sweep_thresholds(report([n / 1000 for n in range(1, 81)]), 0.9)]
    assert len(taus) == MAX_POINTS
    assert (taus[0], taus[-1]) == (0.0, 0.08)
    steps = [1000 * (b - a) for a, b in pairwise(taus)]
    assert 5 <= round(min(steps)) <= round(max(steps)) <= 6


def test_widest_that_holds_is_taken_even_above_one_that_does_not() -> None:
    points = [
        SweepPoint(tau_frob=tau, blocks_shared=0, score=0.5, retention=1.0, holds=holds)
        for tau, holds in ((0.0, True), (0.01, False), (0.02, True), (0.03, False))
    ]
    assert widest_that_holds(points).tau_frob == 0.02


def test_tau_cos_is_a_recognised_tier_s_own_or_the_band_s() -> None:
    tier = load_tiers()["Gemma-2-2B"]
    named = Thresholds(tau_cos=tier.tau_cos, tau_frob=tier.tau_frob, source="tier Gemma-2-2B")
    assert (widening_tau_cos(named), widening_tau_cos(CONSERVATIVE)) == (0.999, 0.99)


@pytest.mark.parametrize(("heldout", "mean", "worst"), [({"a": 1.02, "b": 0.9}, 2.0, 8.0)])
def test_over_promise_is_points_of_retention_beyond_the_held_out_tasks(
    plan: RecipePlan, heldout: dict[str, float], mean: float, worst: float
) -> None:
    promised = replace(plan, promised=0.98, heldout=heldout)
    assert promised.over_promise_mean == pytest.approx(mean)
    assert promised.over_promise_worst == pytest.approx(worst)


def test_over_promise_is_unknown_where_no_held_out_task_tells_anything(plan: RecipePlan) -> None:
    unknown = replace(plan, heldout={})
    assert (unknown.over_promise_mean, unknown.over_promise_worst) == (None, None)
    assert unknown.to_json()["heldout_worst"] is None


def question(number: int, gold: int) -> dict[str, Any]:
    words = ["owl", "fish", "kite", "moss"]
    return {
        "query": f"{words[number % 4]} number {number} likes",
        "choices": [f"the {words[(number + 1) % 4]}", f"some {words[(number + 2) % 4]} soup"],
        "gold": gold,
    }


def write_tasks(folder: Path, *, piqa_gold: Sequence[int]) -> Path:
    folder.mkdir()
    for name, offset in (("arc", 50), ("hella", 100)):
        rows = [question(offset + n, n % 2) for n in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [
        {"goal": one["query"], "sol1": one["choices"][0], "sol2": one["choices"][1], "label": gold}
        for one, gold in ((question(n, 0), gold) for n, gold in enumerate(piqa_gold))
    ]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def request(pair: Pair, tasks: Path, *, quality_budget: float = 0.05) -> RecipeRequest:
    return RecipeRequest(
        donor=pair.donor.path,
        variant=pair.variant.path,
        report=pair.report,
        donor_fingerprint="donor",
        tasks=load_task_set(tasks),
        quality_budget=quality_budget,
    )


def run(pair: Pair, tasks: Path, *, quality_budget: float = 0.05) -> RecipeResult:
    return paper_recipe(request(pair, tasks, quality_budget=quality_budget))


def own_golds(pair: Pair, folder: Path) -> list[int]:
    """What the variant itself answers, so that it has every question of PIQA right."""
    tasks = write_tasks(folder, piqa_gold=[0] * 16)
    (piqa,) = [task for task in load_tasks(tasks) if task.name == "piqa"]
    asker = TaskScorer(
        pair.variant.config,
        Tokenizer.load(pair.variant.path),
        pair.reader(),
        [piqa],
        device=CPU,
        pace=Pace(),
        precision="highest",
    )
    (likelihoods,) = asker.likelihoods([pair.base])
    by_context = {}
    for number, one in enumerate(piqa.examples):
        rates = [likelihoods[2 * number + i] / one.choices[i].num_chars for i in (0, 1)]
        by_context[one.choices[0].context] = int(rates[1] > rates[0])
    return [by_context[f"Question: {question(n, 0)['query']}\nAnswer:"] for n in range(16)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Four blocks of growing ε, all above the band's cosine and on average no boundary case."""
    scale = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight"), 0.05)
    probe = make_pair(tmp_path_factory.mktemp("probe"), layers=4)
    for name in probe.variant.tensors:
        if "layers" in name:
            scale[name] = (0.02, 0.05, 0.08, 0.12)[int(name.split(".")[2])]
    return make_pair(tmp_path_factory.mktemp("recipe"), layers=4, scale=scale)


@pytest.fixture(scope="module")
def tasks(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    return write_tasks(folder / "used", piqa_gold=own_golds(pair, folder / "probe"))


@pytest.fixture(scope="module")
def result(pair: Pair, tasks: Path) -> RecipeResult:
    return run(pair, tasks)


@pytest.fixture
def plan(result: RecipeResult) -> RecipePlan:
    return result.chosen


def planned(pair: Pair, thresholds: Thresholds) -> SharePlan:
    """What the server makes of these thresholds."""
    return plan_variant(
        pair.report,
        pair.donor,
        pair.variant,
        policy=Policy.THRESHOLDS,
        fingerprints=Fingerprints("donor", "variant"),
        tau_cos=thresholds.tau_cos,
        tau_frob=thresholds.tau_frob,
    )


def test_plans_are_those_of_policy_thresholds(pair: Pair, result: RecipeResult) -> None:
    assert [plan.step for plan in result.plans] == ["default", "fit", "sweep"]
    for plan in result.plans:
        want = planned(pair, plan.thresholds)
        assert plan.rungs == want.rungs
        assert plan.unique_bytes == want.unique_bytes
        assert plan.blocks_shared == want.blocks.alias
    default, fit, _ = result.plans
    assert (default.thresholds, default.blocks_shared) == (CONSERVATIVE, 1)
    assert fit.thresholds == Thresholds(tau_cos=0.99, tau_frob=0.06, source="fit")
    assert fit.blocks_shared == 2


def test_sweep_scores_every_block_set_and_the_widest_that_holds_is_chosen(
    pair: Pair, result: RecipeResult
) -> None:
    epsilons = sorted(block.epsilon for block in pair.report.blocks)
    assert [point.tau_frob for point in result.sweep] == [0.0, *epsilons]
    assert [point.blocks_shared for point in result.sweep] == [0, 1, 2, 3, 4]
    own = result.tasks["piqa"].own.score
    assert own == 1.0
    for point in result.sweep:
        assert point.retention == point.score / own
        assert point.holds == (point.retention >= 0.95)
    assert result.sweep[0].retention == 1.0
    assert not result.boundary
    assert result.chosen is result.plans[2]
    widest = max(point.tau_frob for point in result.sweep if point.holds)
    assert result.chosen.thresholds.tau_frob == widest
    assert not result.sweep[-1].holds  # so that the budget bound


def test_scores_and_prices_are_those_of_the_plans_measured_alone(
    pair: Pair, tasks: Path, result: RecipeResult
) -> None:
    text = calibration_text(pair.variant, None, device="cpu", pace=Pace(), precision="highest")
    asker = TaskScorer(
        pair.variant.config,
        Tokenizer.load(pair.variant.path),
        pair.reader(),
        load_tasks(tasks),
        device=CPU,
        pace=Pace(),
        precision="highest",
    )
    own, *scores = asker.score([pair.base, *(plan.rungs for plan in result.plans)])
    assert own == {name: info.own for name, info in result.tasks.items()}
    prices = pair.pricer(text).price([plan.rungs for plan in result.plans])
    for plan, by_task, price in zip(result.plans, scores, prices, strict=True):
        assert plan.scores == by_task
        assert plan.promised == by_task["piqa"].score / own["piqa"].score
        assert plan.heldout == {n: by_task[n].score / own[n].score for n in ("arc", "hella")}
        assert plan.price.kl == pytest.approx(price.kl, rel=1e-4)
    assert result.plans[1].price.kl > result.plans[0].price.kl > 0


def test_budget_of_everything_takes_all_blocks(pair: Pair, tasks: Path) -> None:
    found = run(pair, tasks, quality_budget=0.99)
    assert found.chosen.blocks_shared == 4
    assert found.chosen.promised < 0.95


def test_boundary_case_drops_the_refinement_and_stays_conservative(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=2, scale=0.13)
    assert 0.10 < pair.report.mean_epsilon < 0.14
    found = run(pair, write_tasks(tmp_path / "tasks", piqa_gold=[0, 1] * 8), quality_budget=0.99)
    assert found.boundary
    assert found.plans[2].blocks_shared == 2  # what the refinement would have shared
    assert found.chosen is found.plans[0]
    assert found.chosen.blocks_shared == 0
    assert found.chosen.thresholds.source == "boundary"
    assert found.chosen.over_promise_worst == 0.0


def test_identical_blocks_are_shared_at_no_cost(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=2, scale={})
    tasks = write_tasks(tmp_path / "tasks", piqa_gold=[0, 1] * 8)
    found = run(pair, tasks, quality_budget=0.0)
    assert found.chosen.blocks_shared == 2
    assert found.chosen.price.kl == 0.0
    assert found.chosen.over_promise_worst == found.chosen.over_promise_mean == 0.0


def test_result_is_json(result: RecipeResult) -> None:
    record = json.loads(json.dumps(result.to_json()))
    assert record["chosen"] == record["plans"][2]
    assert record["chosen"]["kl"] == result.chosen.price.kl
    assert record["chosen"]["tau_frob"] == result.chosen.thresholds.tau_frob
    assert record["tasks"]["arc"]["num_examples"] == 12
    assert TaskScore(**record["tasks"]["piqa"]["own"]) == result.tasks["piqa"].own
    assert len(record["sweep"]) == 5


def test_progress_ends_within_what_was_announced(pair: Pair, tasks: Path) -> None:
    seen: list[tuple[int, int]] = []
    paper_recipe(request(pair, tasks), progress=lambda done, total: seen.append((done, total)))
    (total,) = {total for _, total in seen}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] <= total == 3 * (pair.donor.nbytes + pair.variant.nbytes)


@pytest.mark.parametrize("budget", [-0.01, 1.0, float("nan")])
def test_budget_out_of_range_is_refused(pair: Pair, tasks: Path, budget: float) -> None:
    with pytest.raises(InvalidRequestError, match="quality_budget is") as caught:
        run(pair, tasks, quality_budget=budget)
    assert caught.value.param == "quality_budget"


def test_sweep_on_a_task_that_the_variant_has_all_wrong_is_refused(
    pair: Pair, tmp_path: Path
) -> None:
    wrong = [1 - gold for gold in own_golds(pair, tmp_path / "probe")]
    with pytest.raises(InvalidRequestError, match="every question of piqa wrong"):
        run(pair, write_tasks(tmp_path / "tasks", piqa_gold=wrong))


@pytest.mark.shared
def test_fit_takes_a_trained_variant_s_blocks_whole_at_more_than_a_nat(shared: Path) -> None:
    """Within 5 % of quality as BS predicts it, and far from the variant's answers."""
    family = shared / "families" / "mini-qwen2"
    with Checkpoint.open(family / "base") as donor, Checkpoint.open(family / "instruct") as variant:
        found = paper_recipe(
            RecipeRequest(
                donor=donor.path,
                variant=variant.path,
                report=scan(donor, variant),
                donor_fingerprint="base",
                tasks=load_task_set(shared / "data" / "mc", limit=4),
            )
        )
    assert not found.boundary
    assert {info.num_examples for info in found.tasks.values()} == {4}
    assert found.tasks["arc_easy_val"].chance == pytest.approx(0.25, abs=0.05)
    fit = found.plans[1]
    assert fit.blocks_shared == 8
    assert fit.price.kl > 1.0
    assert len(found.sweep) == 9
