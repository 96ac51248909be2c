"""Sources that bring their own plan: delta folders from elsewhere, and LoRA adapters.

Delta folders are read to their end before anything is made of them.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity
from server.onboarding.adapters import AdapterSide, Source, adapter_digest
from server.onboarding.deltas import Deltas
from server.onboarding.encoder import Encoder
from server.onboarding.pairs import files_changed
from server.onboarding.prepare import read_text_side
from server.onboarding.processes import OnStageProgress
from server.onboarding.timing import Stopwatch
from server.residency.catalog import ServedModel, TextSide

_MAX_REMEMBERED = 4096
_Key = tuple[Identity, ModelConfig | None, str]


class Imports:
    """What is known of delta folders and adapters. Event loop only.

    Args:
        encoder: Reads delta folders.
        deltas: Keeps those that adapters become.
    """

    def __init__(self, encoder: Encoder, deltas: Deltas) -> None:
        self._encoder = encoder
        self._deltas = deltas
        self._digests: dict[_Key, str] = {}

    async def fingerprint(
        self, source: Source, donor: ServedModel, *, on_progress: OnStageProgress
    ) -> str:
        """Returns the digest of a source, which is read once in this process's life.

        It is made of the content. What the folder says its variant's fingerprint was proves
        nothing, so nothing is looked up by that.

        Raises:
            BadCheckpointError: The content is not what the header says, is not finite, does not fit
                the donor, or has changed.
        """
        config = None if isinstance(source, AdapterSide) else source.config
        key = (source.identity, config, donor.fingerprint)
        known = self._digests.get(key)
        if known is not None:
            return known
        if isinstance(source, AdapterSide):
            digest = await asyncio.to_thread(adapter_digest, source, donor.fingerprint)
        else:
            digest = await self._verified(source, donor, on_progress)
        self._digests[key] = digest
        if len(self._digests) > _MAX_REMEMBERED:
            del self._digests[next(iter(self._digests))]
        return digest

    async def text_side(
        self,
        source: Source,
        donor: ServedModel,
        *,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> TextSide:
        """Returns the text side of a source; an adapter's is that of the delta folder it becomes.

        Raises:
            LinkerError: See `Deltas.converted`.
        """
        if not isinstance(source, AdapterSide):
            return source
        digest = await self.fingerprint(source, donor, on_progress=on_progress)
        folder = await self._deltas.converted(
            source, donor, digest, watch=watch, on_progress=on_progress
        )
        return await asyncio.to_thread(read_text_side, folder)

    async def _verified(
        self, text: TextSide, donor: ServedModel, on_progress: OnStageProgress
    ) -> str:
        read = await self._encoder.verify(text.path, donor=donor.text.path, on_progress=on_progress)
        if read != text.identity:
            raise files_changed()
        return await asyncio.to_thread(_fingerprint, text)


def adopted_plan(source: Source, text: TextSide, fingerprint: str) -> SharePlan:
    """Returns the plan that a source brings as this server's own.

    A delta's price stays the exporter's claim, so it is held against no budget.

    Args:
        source: A delta folder or an adapter.
        text: Its text side.
        fingerprint: Of the source's content.
    """
    assert text.delta is not None
    policy = Policy.ADAPTER if isinstance(source, AdapterSide) else Policy.DELTA
    return replace(text.delta, policy=policy, variant_fingerprint=fingerprint, budget_kl=None)


def _fingerprint(text: TextSide) -> str:
    with DeltaFile.open(text.path) as delta:
        digest = delta.fingerprint
        if delta.identity != text.identity:
            raise files_changed()
        return digest
