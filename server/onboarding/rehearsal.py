"""The dry run: what onboarding a model would share, cost and take. Loads nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linker_core.errors import NotReadyError
from linker_core.sharing.rungs import COARSE, AnyRung, Rung, coarse
from linker_core.weights.architecture import DTYPE_BYTES, ModelConfig
from linker_core.weights.keys import parse_key
from linker_core.weights.shapes import expected_tensors
from server.onboarding.adapters import Source
from server.onboarding.admission import Admission
from server.onboarding.donor_choice import DonorChoice
from server.onboarding.pairs import make_frontier
from server.onboarding.planner import OnStage, Planned, Planner
from server.onboarding.planning import may_be_measured
from server.onboarding.prediction import Needs, Rungs
from server.onboarding.prepare import read_shape, read_source
from server.onboarding.request import OnboardRequest
from server.onboarding.timing import Stopwatch
from server.registry.records import JobStage
from server.residency.catalog import ServedModel, TextSide

_MATRIX = 2  # dimensions

ChooseDonor = Callable[
    [OnboardRequest, Source | ModelConfig, Stopwatch, OnStage], Awaitable[DonorChoice]
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What onboarding would do now."""

    donor: str | None  # None: it would be the donor of a family of its own
    donor_choice: Mapping[str, Any]  # DonorChoice.to_json
    policy: str
    bytes: Mapping[str, int]  # logical, unique, shared, checkpoint
    needs: Needs
    free_bytes: int
    seconds: Mapping[str, float]
    region: str | None = None  # what follows is None where there are shapes alone
    mean_cos: float | None = None
    mean_epsilon: float | None = None
    blocks: list[dict[str, Any]] | None = None  # index, rung, cos, epsilon, rungs
    price: Mapping[str, Any] | None = None
    budget_kl: float | None = None
    rung_bytes: Mapping[str, int] | None = None  # unique bytes by kind of rung
    bits_per_weight: float | None = None
    frontier: list[dict[str, Any]] | None = None  # None: nothing was tuned

    @property
    def needed_bytes(self) -> int:
        """What has to be free for it."""
        return self.needs.total


class Rehearsal:
    """Makes dry runs.

    Args:
        choose: Returns the donor of what is onboarded, or of a shape, and why.
        planner: Plans.
        admission: Knows the engine's memory.
    """

    def __init__(self, *, choose: ChooseDonor, planner: Planner, admission: Admission) -> None:
        self._choose = choose
        self._planner = planner
        self._admission = admission

    async def run(self, request: OnboardRequest, path: Path) -> DryRun:
        """Validates, hashes, scans and prices what lies at a path, as onboarding would.

        A directory with a config.json alone is answered from shapes.

        Raises:
            NotReadyError: There is no engine that could say what is free.
            LinkerError: See `Onboarder.rehearse`.
        """
        free_bytes = self._free_bytes()
        watch = Stopwatch()
        watch.enter("open")
        shape = await asyncio.to_thread(read_shape, path)
        if shape is not None:
            choice = await self._choose(request, shape, watch, ignore_stage)
            return self._from_shape(request, shape, choice, free_bytes, watch)
        source = await asyncio.to_thread(read_source, path)
        watch.stop()
        choice, planned = await self._planned(request, source, watch)
        tuned = planned.tuned
        points = (
            None if tuned is None else await asyncio.to_thread(make_frontier, tuned, planned.text)
        )
        return self._from_plan(planned, choice, points, watch)

    async def _planned(
        self, request: OnboardRequest, source: Source, watch: Stopwatch
    ) -> tuple[DonorChoice, Planned]:
        """Plans when it is its turn; beside whoever has that if no tuner is needed."""
        if isinstance(source, TextSide) and source.delta is None and not may_be_measured(request):
            with suppress(NotReadyError):  # a donor is on its way; it has come when the turn does
                async with self._planner.aside:
                    return await self._plan(request, source, watch)
        async with self._planner.turn:
            return await self._plan(request, source, watch)

    async def _plan(
        self, request: OnboardRequest, source: Source, watch: Stopwatch
    ) -> tuple[DonorChoice, Planned]:
        choice = await self._choose(request, source, watch, ignore_stage)
        planned = await self._planner.plan(
            request, source, choice.donor, watch=watch, on_stage=ignore_stage, hold_budget=False
        )
        return choice, planned

    def _from_plan(
        self,
        planned: Planned,
        choice: DonorChoice,
        points: list[dict[str, Any]] | None,
        watch: Stopwatch,
    ) -> DryRun:
        plan, donor = planned.plan, planned.donor
        return DryRun(
            donor=None if donor is None else donor.name,
            donor_choice=choice.to_json(),
            policy=plan.policy.value,
            bytes=plan.bytes_by_kind,
            needs=self._needs(plan.rungs, plan.unique_bytes, planned.text.config, donor),
            free_bytes=self._free_bytes() if planned.free_bytes is None else planned.free_bytes,
            seconds=watch.to_json(),
            region=plan.region,
            mean_cos=plan.mean_cos,
            mean_epsilon=plan.mean_epsilon,
            blocks=_verdicts(planned),
            price=None if plan.price is None else plan.price.to_json(),
            budget_kl=plan.budget_kl,
            rung_bytes=plan.rung_bytes,
            bits_per_weight=plan.bits_per_weight,
            frontier=points,
        )

    def _from_shape(
        self,
        request: OnboardRequest,
        config: ModelConfig,
        choice: DonorChoice,
        free_bytes: int,
        watch: Stopwatch,
    ) -> DryRun:
        donor = choice.donor
        held = bytes_of_shape(config, None if donor is None else donor.text.config)
        watch.stop()
        return DryRun(
            donor=None if donor is None else donor.name,
            donor_choice=choice.to_json(),
            policy="donor" if donor is None else request.policy,
            bytes=held,
            needs=self._needs(_rungs_of_shape(config), held["unique"], config, donor),
            free_bytes=free_bytes,
            seconds=watch.to_json(),
            budget_kl=request.budget_kl,
        )

    def _needs(
        self, rungs: Rungs, unique_bytes: int, config: ModelConfig, donor: ServedModel | None
    ) -> Needs:
        prediction = self._admission.prediction
        if donor is None:
            return prediction.of_head(rungs, unique_bytes, config, None)
        return prediction.of_variant(rungs, unique_bytes, donor.name)

    def _free_bytes(self) -> int:
        snapshot = self._admission.snapshot()
        if snapshot is None:
            raise NotReadyError("The engine is not running, so nobody knows what is free.")
        return snapshot.unreserved_bytes


def bytes_of_shape(config: ModelConfig, donor: ModelConfig | None) -> dict[str, int]:
    """Returns what a model of a shape takes if it shares every block of its donor (BS Eq. 3).

    Args:
        config: Its shape.
        donor: Its donor's; None makes it a donor, which shares nothing.
    """
    logical = unique = checkpoint = 0
    for name, shape in expected_tensors(config).items():
        key = parse_key(name)
        assert key is not None
        count = math.prod(shape)
        own_bytes = count * DTYPE_BYTES[config.dtype]
        checkpoint += own_bytes
        if donor is not None and key.layer is not None:
            logical += count * DTYPE_BYTES[donor.dtype]  # an alias is in the donor's type
        else:
            logical += own_bytes
            unique += own_bytes
    return {
        "logical": logical,
        "unique": unique,
        "shared": logical - unique,
        "checkpoint": checkpoint,
    }


def _rungs_of_shape(config: ModelConfig) -> dict[str, Rung]:
    """Returns the rungs of a model that shares every block of its donor."""
    keys = {name: parse_key(name) for name in expected_tensors(config)}
    return {
        name: Rung.OWN if key is None or key.layer is None else Rung.ALIAS
        for name, key in keys.items()
    }


def _verdicts(planned: Planned) -> list[dict[str, Any]]:
    """Returns every block with its rung, the dearest of its matrices', and every parameter's."""
    config, dearest = planned.text.config, COARSE.index
    scores: list[tuple[float | None, float | None]]
    # A donor is like itself; of a delta nobody has seen both sides.
    scores = [(1.0, 0.0) if planned.donor is None else (None, None)] * config.num_layers
    if planned.report is not None:
        scores = [(block["cos"], block["epsilon"]) for block in planned.report["blocks"]]
    rungs: list[dict[str, AnyRung]] = [{} for _ in scores]
    matrices: list[list[str]] = [[] for _ in scores]
    for name, shape in expected_tensors(config).items():
        key = parse_key(name)
        assert key is not None
        if key.layer is not None:
            rung = rungs[key.layer][key.parameter] = planned.plan.rungs[name]
            if len(shape) == _MATRIX:
                matrices[key.layer].append(coarse(rung))
    return [
        {
            "index": index,
            "rung": max(matrices[index], key=dearest),
            "cos": cos,
            "epsilon": epsilon,
            "rungs": {parameter: str(rung) for parameter, rung in rungs[index].items()},
        }
        for index, (cos, epsilon) in enumerate(scores)
    ]


def ignore_stage(_stage: JobStage, _done_bytes: int, _total_bytes: int) -> None:
    """Nobody follows a dry run."""
