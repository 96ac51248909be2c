"""BS appendix E but for what is measured: what it is asked, its fit, sweep and boundary rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from linker_core.config import MatmulPrecision
from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import ScanReport
from linker_core.sharing.thresholds import BOUNDARY_EPSILON, Thresholds
from linker_core.tuning.recipe_result import SweepPoint
from linker_core.tuning.request import Device
from linker_core.tuning.tasks import TaskSet

DEFAULT_QUALITY_BUDGET: Final = 0.05
# BS appendix E: (τ_frob, quality budget) that its tuner names, Qwen2.5-0.5B and Llama-3.2-1B.
PAPER_POINTS: Final = ((0.06, 0.05), (0.13, 0.10))
MAX_POINTS: Final = 16  # of a sweep; each holds hidden states of its own
_TAU_DECIMALS: Final = 2  # every τ_frob in BS is a multiple of 0.01
_BAND_COS: Final = 0.99  # BS table 1: the least cosine of a post-trained family
_EXACT: Final = 0.0  # τ_frob under which only equal bytes are shared


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRequest:
    """One run of the recipe."""

    donor: Path
    variant: Path
    report: ScanReport
    donor_fingerprint: str  # recognises a tier
    tasks: TaskSet
    quality_budget: float = DEFAULT_QUALITY_BUDGET  # share of a score that may be lost
    calibration: str | None = None  # of the prices; see `calibration_text`
    device: Device = "cpu"
    matmul_precision: MatmulPrecision = "highest"  # that the variant is served with

    def check(self) -> None:
        """Refuses a budget that means nothing.

        Raises:
            InvalidRequestError: Out of range.
        """
        if not 0.0 <= self.quality_budget < 1.0:
            raise InvalidRequestError(
                f"quality_budget is {self.quality_budget}, expected 0 to less than 1: the share "
                "of a score that may be lost.",
                param="quality_budget",
            )


def quality_slope() -> float:
    """Returns the quality lost per unit of ε: a line through the origin and the paper's points.

    BS gives no formula, only that its heuristic is calibrated and where it ends up. Least squares
    over its two operating points gives 0.78, which reproduces both on the paper's grid of 0.01,
    and no sharing at 5 % where every block has the ε of table 8's Llama-3.2-1B, 0.156.
    """
    return sum(tau * lost for tau, lost in PAPER_POINTS) / sum(tau**2 for tau, _ in PAPER_POINTS)


def fitted_tau_frob(quality_budget: float) -> float:
    """Returns the widest τ_frob whose predicted loss of quality stays within a budget."""
    return round(quality_budget / quality_slope(), _TAU_DECIMALS)


def widening_tau_cos(default: Thresholds) -> float:
    """Returns the τ_cos under which fit and sweep widen τ_frob: a tier's own, else the band's.

    Under the conservative 0.999 widening would be idle beyond 0.045, since cos is about 1 - ε²/2;
    BS's own 0.06 and 0.13 need 0.99.
    """
    return default.tau_cos if default.source.startswith("tier ") else _BAND_COS


def sweep_thresholds(report: ScanReport, tau_cos: float) -> list[Thresholds]:
    """Returns thresholds that share nothing, one block, … all blocks of at least `tau_cos`.

    Where that is more than can be measured at once: evenly spaced ones, both ends among them.
    """
    epsilons = {block.epsilon for block in report.blocks if block.cos >= tau_cos}
    taus = sorted(epsilons | {_EXACT})
    if len(taus) > MAX_POINTS:
        last = len(taus) - 1
        taus = [taus[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    return [Thresholds(tau_cos=tau_cos, tau_frob=tau, source="sweep") for tau in taus]


def widest_that_holds(points: Sequence[SweepPoint]) -> SweepPoint:
    """Returns the point of the largest τ_frob that holds, even where a narrower one does not.

    There always is one: sharing equal bytes loses nothing.
    """
    return max((point for point in points if point.holds), key=lambda point: point.tau_frob)


def is_boundary(report: ScanReport) -> bool:
    """BS appendix E, step 3: whether the refinement is dropped for the conservative tier."""
    return report.mean_epsilon > BOUNDARY_EPSILON
