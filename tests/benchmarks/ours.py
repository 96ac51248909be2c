"""Our plans of one pair: what the tuner chooses, and what any plan costs on a text and in tasks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from linker_core.sharing.plan import count_weights, plan_bytes
from linker_core.sharing.planner import count_own_rows
from linker_core.sharing.price import Price
from linker_core.sharing.rungs import AnyRung, Rung
from linker_core.tuning.calibration import CalibrationText
from linker_core.tuning.memory import MAX_PLANS_AT_ONCE
from linker_core.tuning.request import TuneGoal, TuneRequest
from linker_core.tuning.result import TuneResult
from linker_core.tuning.storages import Rungs
from linker_core.tuning.tasks import Task
from linker_core.tuning.tuner import tune
from tests.benchmarks.rewritten import Measured, accuracies, is_matrix
from tests.linker_core.tuning.pairs import Pair

BUDGETS_KL = (0.001, 0.003, 0.01, 0.03, 0.1)


class Ours:
    """Measures plans of one pair through the kernels that serve them.

    Args:
        pair: Donor and variant.
        text: What plans are priced on; the tuner does not see it.
        tasks: What plans are asked.
        kept: A folder for what the tuner finds: the tables of docs/fidelity.md have many goals in
            common. Nothing in it says which code found it, so a new tuner calls for a new folder.
    """

    def __init__(
        self,
        pair: Pair,
        text: CalibrationText,
        *,
        tasks: Sequence[Task] = (),
        kept: Path | None = None,
    ) -> None:
        self._pair = pair
        self._text = text
        self._tasks = tasks
        self._kept = kept
        self.num_weights = count_weights(pair.variant)

    def within_budget(self, budget_kl: float) -> Rungs:
        """Returns the plan that policy `budget` chooses on the shipped dialogues."""
        return self.tuned(TuneGoal(budget_kl=budget_kl)).chosen.rungs

    def within_bits(self, bits_per_weight: float) -> Rungs:
        """Returns the plan that policy `bytes` chooses on the shipped dialogues."""
        max_bytes = int(bits_per_weight * self.num_weights / 8)
        return self.tuned(TuneGoal(max_bytes=max_bytes)).chosen.rungs

    def tuned(self, goal: TuneGoal) -> TuneResult:
        """Returns what the tuner finds on the shipped dialogues."""
        if self._kept is None:
            return self._tune(goal)
        aim = goal.budget_kl if goal.max_bytes is None else goal.max_bytes
        variant = self._pair.variant.path
        file = self._kept / f"{variant.parent.name}-{variant.name}-{aim}.json"
        if not file.exists():
            file.write_text(json.dumps(self._tune(goal).to_json()))
        return TuneResult.from_json(json.loads(file.read_text()))

    def prices(self, plans: Sequence[Rungs]) -> list[Price]:
        """Returns what plans cost on the text."""
        pricer = self._pair.pricer(self._text)
        return [price for part in _parts(plans) for price in pricer.price(part)]

    def measure(self, plans: Sequence[Rungs]) -> list[Measured]:
        """Returns what plans take, cost on the text and score in the tasks."""
        variant, reader = self._pair.variant, self._pair.reader()
        scores = [
            score
            for part in _parts(plans)
            for score in accuracies(variant, reader, self._tasks, part)
        ]
        bits = [8 * self.unique_bytes(plan) / self.num_weights for plan in plans]
        return list(map(Measured, bits, self.prices(plans), scores))

    def unique_bytes(self, plan: Rungs) -> int:
        """Returns what only this variant holds."""
        donor, variant = self._pair.donor, self._pair.variant
        own_rows = count_own_rows(self._pair.report, variant, plan)
        return plan_bytes(plan, own_rows, donor=donor, variant=variant).unique_bytes

    def _tune(self, goal: TuneGoal) -> TuneResult:
        pair = self._pair
        return tune(
            TuneRequest(
                donor=str(pair.donor.path),
                variant=str(pair.variant.path),
                report=pair.report.to_json(),
                donor_fingerprint="",
                goal=goal,
            )
        )


def uniform(pair: Pair, rung: AnyRung) -> dict[str, AnyRung]:
    """Returns the plan with every matrix on one rung, embedding and head included."""
    tensors = pair.variant.tensors.items()
    return {
        name: rung if is_matrix(name, tensor.shape, embedding=True) else Rung.OWN
        for name, tensor in tensors
    }


def _parts(plans: Sequence[Rungs]) -> Iterator[Sequence[Rungs]]:
    """Yields as many plans as are walked at once."""
    for start in range(0, len(plans), MAX_PLANS_AT_ONCE):
        yield plans[start : start + MAX_PLANS_AT_ONCE]


def keep_argument(parser: argparse.ArgumentParser) -> None:
    """Declares where `Ours` keeps what the tuner finds."""
    parser.add_argument(
        "--keep", type=Path, help="an existing folder for plans, shared by these benchmarks"
    )


def named_variants(doc: str | None) -> tuple[Path, list[str], Path | None]:
    """Returns a family, its variants that are named or have held-out text, and where to keep plans.

    Args:
        doc: What the command says of itself.
    """
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    parser.add_argument("family", type=Path)
    parser.add_argument("variants", nargs="*")
    keep_argument(parser)
    args = parser.parse_args()
    held_out = sorted(path.stem for path in (args.family / "heldout").glob("*.jsonl"))
    return args.family, args.variants or held_out, args.keep
