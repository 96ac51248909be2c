"""A budget kept on the calibration text is kept on text that no one has seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from linker_core.sharing.report import Region
from linker_core.sharing.rungs import Residual, Rung
from linker_core.sharing.scan import scan
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.calibration import CalibrationText, encode
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.reading import VariantReader
from linker_core.tuning.request import TuneGoal, TuneRequest
from linker_core.tuning.result import TuneResult
from linker_core.tuning.tuner import tune
from linker_core.weights.checkpoint import Checkpoint
from tests.linker_core.tuning.pairs import Pair
from tests.templates import compiled_in

pytestmark = [pytest.mark.shared, pytest.mark.slow, pytest.mark.timeout(900)]

BUDGETS_KL = (0.01, 0.05)
MOST_OF_A_COPY = {"instruct": 0.11, "chat": 0.11, "math": 0.13, "code": 0.25}  # at the first


def family_pair(shared: Path, name: str) -> Pair:
    family = shared / "families" / "mini-qwen2"
    donor, variant = (Checkpoint.open(family / folder) for folder in ("base", name))
    return Pair(donor=donor, variant=variant, report=scan(donor, variant))


def tuned(pair: Pair, budget_kl: float) -> TuneResult:
    return tune(
        TuneRequest(
            donor=str(pair.donor.path),
            variant=str(pair.variant.path),
            report=pair.report.to_json(),
            donor_fingerprint="base",
            goal=TuneGoal(budget_kl=budget_kl),
        )
    )


def held_out_text(pair: Pair) -> CalibrationText:
    """The family's dialogues for this variant that nothing was trained or calibrated on."""
    variant = pair.variant
    file = variant.path.parent / "heldout" / f"{variant.path.name}.jsonl"
    reader = VariantReader(
        tokenizer=Tokenizer.load(variant.path),
        template=compiled_in(variant.path),
        eos_token_ids=variant.eos_token_ids,
        vocab_size=variant.config.vocab_size,
    )
    dialogues = [dialogue for dialogue in load_dialogues(file) if dialogue.given]
    return encode(dialogues, reader, max_response_tokens=8_000)


@pytest.mark.parametrize("name", ["instruct", "chat", "math", "code"])
def test_budget_is_kept_on_text_that_is_held_out(shared: Path, name: str) -> None:
    pair = family_pair(shared, name)
    plans = {budget_kl: tuned(pair, budget_kl).chosen for budget_kl in BUDGETS_KL}
    text = held_out_text(pair)
    assert text.num_response_tokens >= 4_000
    prices = pair.pricer(text).price([plan.rungs for plan in plans.values()])
    for (budget_kl, chosen), price in zip(plans.items(), prices, strict=True):
        assert chosen.price.tokens >= 4_000
        assert chosen.price.kl_upper <= budget_kl
        assert price.kl <= 1.5 * budget_kl
    sizes = [plan.unique_bytes for plan in plans.values()]
    assert sizes[0] > sizes[1]
    assert sizes[0] <= MOST_OF_A_COPY[name] * pair.variant.nbytes


def test_variant_that_moved_far_aliases_no_matrix(shared: Path) -> None:
    pair = family_pair(shared, "code")
    assert pair.report.region is Region.OUTSIDE
    result = tuned(pair, 0.05)
    assert any(isinstance(rung, Residual) for rung in result.chosen.rungs.values())
    for name, rung in result.chosen.rungs.items():
        assert rung is not Rung.ALIAS or pair.base[name] is Rung.ALIAS
    assert any(plan.price.kl > 0.05 for plan in result.frontier)
