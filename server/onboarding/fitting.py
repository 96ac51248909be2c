"""A plan for each of several variants, so that all of them fit into one memory. Loads nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from linker_core.errors import InvalidRequestError
from linker_core.tuning.fit import Fit, FitPoint, fit
from linker_core.tuning.result import PricedPlan
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.shapes import expected_tensors
from server.onboarding.adapters import AdapterSide
from server.onboarding.planner import Planner
from server.onboarding.prepare import read_source
from server.onboarding.rehearsal import ChooseDonor, ignore_stage
from server.onboarding.request import AUTO_DONOR, OnboardRequest
from server.onboarding.timing import Stopwatch
from server.residency.catalog import ServedModel, TextSide


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """Variants that are to be resident together."""

    sources: dict[str, str]  # name -> directory; the names are the answer's
    donor: str = AUTO_DONOR
    budget_bytes: int  # for the donor and all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """The plans of one variant that there are to choose from."""

    points: tuple[PricedPlan, ...]
    num_weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JointPlan:
    """A plan for each variant that fits."""

    donor: str
    donor_bytes: int
    budget_bytes: int
    found: Fit
    frontiers: dict[str, Frontier]  # by name
    seconds: dict[str, float]

    @property
    def least_bytes(self) -> int:
        """Of the budget under which all of them would fit."""
        return self.donor_bytes + self.found.least_bytes

    def chosen(self, name: str) -> PricedPlan | None:
        """Returns a variant's plan, or None if it does not fit."""
        place = self.found.chosen.get(name)
        return None if place is None else self.frontiers[name].points[place]


class Fitting:
    """Chooses plans of several variants together.

    Args:
        choose: Returns the donor of what is onboarded, or none, and why.
        planner: Prices.
    """

    def __init__(self, *, choose: ChooseDonor, planner: Planner) -> None:
        self._choose = choose
        self._planner = planner

    async def run(self, request: FitRequest, paths: Sequence[Path]) -> JointPlan:
        """Prices a spread of plans of every variant, and chooses: least worst KL, then least mean.

        The least that each can hold is among them, so one that is left out has no smaller plan.

        Args:
            request: What is asked.
            paths: The directories of its sources, in their order.

        Raises:
            InvalidRequestError: A source that brings its own plan, not all on one donor, or no room
                for that.
            LinkerError: Why one of them cannot be planned.
        """
        watch = Stopwatch()
        texts: dict[str, TextSide] = {}
        for name, path in zip(request.sources, paths, strict=True):
            watch.enter("open")
            source = await asyncio.to_thread(read_source, path)
            watch.stop()
            if isinstance(source, AdapterSide) or source.delta is not None:
                raise InvalidRequestError(
                    f"{name:.100} brings its own plan, so there is nothing to choose. Leave it "
                    "out, and take its bytes from the budget.",
                    param="models",
                )
            texts[name] = source
        frontiers: dict[str, Frontier] = {}
        async with self._planner.turn:
            donor = await self._one_donor(request, texts, watch)
            _check_room(request, donor)
            for name, text in texts.items():
                result = await self._planner.spread(text, donor, watch=watch, on_stage=ignore_stage)
                frontiers[name] = Frontier(
                    points=result.frontier, num_weights=_count_weights(text.config)
                )
        donor_bytes = donor.text.checkpoint_bytes
        points = {
            name: [FitPoint(plan.unique_bytes, plan.price.kl) for plan in frontier.points]
            for name, frontier in frontiers.items()
        }
        return JointPlan(
            donor=donor.name,
            donor_bytes=donor_bytes,
            budget_bytes=request.budget_bytes,
            found=await asyncio.to_thread(fit, points, request.budget_bytes - donor_bytes),
            frontiers=frontiers,
            seconds=watch.to_json(),
        )

    async def _one_donor(
        self, request: FitRequest, texts: dict[str, TextSide], watch: Stopwatch
    ) -> ServedModel:
        """Returns the donor that all variants lean on.

        Raises:
            InvalidRequestError: There is none, or there are several.
        """
        found: ServedModel | None = None
        for name, text in texts.items():
            asked = OnboardRequest(name="", source=str(text.path), donor=request.donor)
            choice = await self._choose(asked, text, watch, ignore_stage)
            donor = choice.donor
            if donor is None or found not in (None, donor):
                whose = "no resident donor's" if donor is None else f"{donor.name!r}'s"
                raise InvalidRequestError(
                    f"{name:.100} is of {whose} family, and all of them need the same donor. "
                    f"{choice.reason}",
                    param="models",
                )
            found = donor
        assert found is not None
        return found


def _check_room(request: FitRequest, donor: ServedModel) -> None:
    """Refuses, before anything is priced, a budget that the donor is beyond.

    Raises:
        InvalidRequestError: It is.
    """
    donor_bytes = donor.text.checkpoint_bytes
    if donor_bytes > request.budget_bytes:
        raise InvalidRequestError(
            f"budget_bytes is {request.budget_bytes}, but the donor {donor.name!r} alone takes "
            f"{donor_bytes}. Raise it: it is for the donor and all variants.",
            param="budget_bytes",
        )


def _count_weights(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(config).values())
