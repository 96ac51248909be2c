"""A validated variant with its donor and their scan; opens both again to plan.

Blocking: callers run what opens checkpoints in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from linker_core.errors import BadCheckpointError
from linker_core.sharing.plan import Fingerprints, SharePlan
from linker_core.sharing.planner import plan_donor
from linker_core.sharing.report import ScanReport
from linker_core.tuning.result import TuneResult
from linker_core.weights.checkpoint import Checkpoint
from server.onboarding import planning
from server.onboarding.request import OnboardRequest
from server.registry.records import Json
from server.residency.catalog import ServedModel, TextSide


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What is known of a variant before there is a plan.

    Every method raises `BadCheckpointError` where files were replaced since they were validated.
    """

    text: TextSide
    fingerprint: str
    donor: ServedModel
    report: Json  # ScanReport.to_json

    @property
    def fingerprints(self) -> Fingerprints:
        """Of both checkpoints."""
        return Fingerprints(self.donor.fingerprint, self.fingerprint)

    def draft(self, request: OnboardRequest) -> SharePlan:
        """Returns what the scan alone says; see `planning.draft_plan`."""
        with self._open() as pair:
            return planning.draft_plan(request, pair)

    def tuned(self, request: OnboardRequest, result: TuneResult) -> SharePlan:
        """Returns the plan that a tuner chose or priced; see `planning.tuned_plan`."""
        with self._open() as pair:
            return planning.tuned_plan(request, pair, result)

    @contextmanager
    def _open(self) -> Iterator[planning.OpenPair]:
        with open_again(self.donor.text) as donor, open_again(self.text) as variant:
            yield planning.OpenPair(
                donor=donor,
                variant=variant,
                report=ScanReport.from_json(self.report),
                fingerprints=self.fingerprints,
            )


def make_donor_plan(text: TextSide, fingerprint: str) -> SharePlan:
    """Returns the plan of a family's first model.

    Raises:
        BadCheckpointError: Its files were replaced.
    """
    with open_again(text) as checkpoint:
        return plan_donor(checkpoint, fingerprint=fingerprint)


def make_frontier(result: TuneResult, text: TextSide) -> list[dict[str, Any]]:
    """Returns a tuner's points without their rungs; see `planning.frontier`.

    Raises:
        BadCheckpointError: The variant's files were replaced.
    """
    with open_again(text) as variant:
        return planning.frontier(result, variant)


@contextmanager
def open_again(text: TextSide) -> Iterator[Checkpoint]:
    """Opens a checkpoint that was validated before, if its files are still the same.

    Raises:
        BadCheckpointError: They are not.
    """
    with Checkpoint.open(text.path) as checkpoint:
        if checkpoint.identity != text.identity:
            raise files_changed()
        yield checkpoint


def files_changed() -> BadCheckpointError:
    """Returns the error that says that what was read is not what was validated."""
    return BadCheckpointError(
        "A file of the model, of its donor or of the calibration text changed while it was being "
        "read. Restore the files and retry."
    )
