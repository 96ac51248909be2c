"""Delta folders that came from elsewhere: read to their end before anything is made of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from linker_core.errors import InvalidRequestError
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity
from server.onboarding.catalog import ServedModel, TextSide
from server.onboarding.encoder import Encoder
from server.onboarding.pairs import files_changed
from server.onboarding.processes import OnStageProgress
from server.onboarding.request import OnboardRequest

_MAX_REMEMBERED = 4096
_Key = tuple[Identity, ModelConfig, str]


class Imports:
    """What is known of delta folders. Event loop only.

    Args:
        encoder: Reads them.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._digests: dict[_Key, str] = {}

    async def fingerprint(
        self, text: TextSide, donor: ServedModel, *, on_progress: OnStageProgress
    ) -> str:
        """Returns the digest of a delta folder, which is read once in this process's life.

        It is made of the content. What the folder says its variant's fingerprint was proves
        nothing, so nothing is looked up by that.

        Raises:
            BadCheckpointError: The content is not what the header says, is not finite, does not fit
                the donor, or has changed.
        """
        key = (text.identity, text.config, donor.fingerprint)
        known = self._digests.get(key)
        if known is not None:
            return known
        read = await self._encoder.verify(text.path, donor=donor.text.path, on_progress=on_progress)
        if read.identity != text.identity:
            raise files_changed()
        digest = await asyncio.to_thread(_fingerprint, text)
        self._digests[key] = digest
        if len(self._digests) > _MAX_REMEMBERED:
            del self._digests[next(iter(self._digests))]
        return digest


def adopted_plan(request: OnboardRequest, text: TextSide, fingerprint: str) -> SharePlan:
    """Returns a delta's plan as this server's own; its price stays the exporter's claim.

    Raises:
        InvalidRequestError: There is a budget, and no price that could be held against it.
    """
    assert text.delta is not None
    # Defaults are for what is planned here; a budget for a delta was asked for.
    budget_kl = request.budget_kl if request.policy == Policy.DELTA else None
    if budget_kl is not None and text.delta.price is None:
        raise InvalidRequestError(
            "The delta states no price that budget_kl could be held against. Leave budget_kl out, "
            "or export the delta with a priced plan.",
            param="budget_kl",
        )
    return replace(
        text.delta, policy=Policy.DELTA, variant_fingerprint=fingerprint, budget_kl=budget_kl
    )


def _fingerprint(text: TextSide) -> str:
    with DeltaFile.open(text.path) as delta:
        digest = delta.fingerprint
        if delta.identity != text.identity:
            raise files_changed()
        return digest
