"""What a tuner says of a pair: from the registry, or measured now and kept there."""

from __future__ import annotations

import asyncio

from linker_core.config import MatmulPrecision
from linker_core.sharing.plan import SharePlan
from linker_core.sharing.rungs import ENCODING
from linker_core.tuning.request import TuneGoal, TuneRequest, tuning_key
from linker_core.tuning.result import TuneResult
from server.onboarding.pairs import Pair, files_changed
from server.onboarding.processes import OnStageProgress
from server.onboarding.stored import restored
from server.onboarding.timing import Stopwatch
from server.onboarding.tuner import Tuner, encode_text
from server.registry.store import Registry


class Pricing:
    """Finds prices. Whoever calls sees to it that one is found at a time.

    Args:
        registry: Keeps what was measured.
        tuner: Measures.
        calibration: The text: None for the shipped dialogues, "self", or a file of JSON lines.
        precision: What the engine multiplies with.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        tuner: Tuner,
        calibration: str | None,
        precision: MatmulPrecision,
    ) -> None:
        self._registry = registry
        self._tuner = tuner
        self._calibration = calibration
        self._precision: MatmulPrecision = precision

    def holds(self, plan: SharePlan) -> bool:
        """Whether a plan costs what its price says, as deltas are rounded and multiplied now."""
        price = plan.price
        if price is None:
            return True
        rounded_so = price.encoding == ENCODING or not plan.has_residuals
        return rounded_so and price.matmul_precision in (None, self._precision)

    async def find(
        self, pair: Pair, goal: TuneGoal, *, watch: Stopwatch, on_progress: OnStageProgress
    ) -> TuneResult:
        """Returns the frontier of a pair and the choice towards a goal.

        The same pair, goal and text, as the variant encodes it, are measured once at a precision.

        Raises:
            BadCheckpointError: Files changed while they were read, or ended the worker.
            InvalidRequestError: The calibration text cannot be used.
            InsufficientCapacityError: There is no room for a tuner.
        """
        donor, variant = pair.donor.text, pair.text
        # The fingerprints cover no tokenizer and no template; what they make of the text does.
        text = await asyncio.to_thread(
            encode_text, donor, variant, self._calibration, device=self._tuner.device
        )
        place = (*pair.fingerprints, tuning_key(goal, text.source_digest, self._precision))
        stored = await asyncio.to_thread(self._registry.tuning, *place)
        known = restored(TuneResult.from_json, stored)
        if known is not None:
            return known
        watch.enter("tune")
        request = TuneRequest(
            donor=str(donor.path),
            variant=str(variant.path),
            report=pair.report,
            donor_fingerprint=pair.donor.fingerprint,
            goal=goal,
            calibration=self._calibration,
            matmul_precision=self._precision,
        )
        tuned = await self._tuner.run(request, nbytes=text.nbytes, on_progress=on_progress)
        watch.stop()
        if (tuned.identity, tuned.donor_identity) != (variant.identity, donor.identity):
            raise files_changed()
        if text.digest not in (None, tuned.result.calibration):
            raise files_changed()  # the tokenizer, the template or the calibration file
        await asyncio.to_thread(self._registry.save_tuning, *place, tuned.result.to_json())
        return tuned.result
