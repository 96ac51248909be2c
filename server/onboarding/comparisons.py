"""How close models are to donors they could lean on, each pair measured once. Event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from linker_core.sharing.report import Region, region
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity
from server.onboarding.fingerprints import Fingerprints
from server.onboarding.pairs import files_changed
from server.onboarding.processes import OnStageProgress
from server.onboarding.scanner import Nearness, Scanner
from server.onboarding.timing import Stopwatch
from server.registry.records import Json
from server.registry.store import Registry
from server.residency.catalog import ServedModel, TextSide

_MAX_REMEMBERED = 4096
_Key = tuple[Identity, ModelConfig, str]  # of the variant; the donor's fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How close a model is to a donor (means over all blocks), or why nobody can say."""

    mean_cos: float | None = None
    mean_epsilon: float | None = None
    error: str | None = None

    @property
    def region(self) -> Region | None:
        if self.mean_cos is None or self.mean_epsilon is None:
            return None
        return region(self.mean_cos, self.mean_epsilon)


class Comparisons:
    """What was measured: of a few rows in this process's life, or of whole models in the registry.

    Args:
        registry: Keeps whole scans by contents.
        scanner: Reads a few rows of each matrix.
        fingerprints: Knows the contents of files that were hashed.
    """

    def __init__(self, *, registry: Registry, scanner: Scanner, fingerprints: Fingerprints) -> None:
        self._registry = registry
        self._scanner = scanner
        self._fingerprints = fingerprints
        self._known: dict[_Key, Likeness] = {}

    def known(self, text: TextSide, donor: ServedModel) -> Likeness | None:
        """Returns how close a checkpoint is to a donor, or None if it was not measured yet."""
        return self._known.get(_key(text, donor))

    async def make(
        self,
        text: TextSide,
        donors: Sequence[ServedModel],
        *,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> None:
        """Measures what is not known yet; the caller holds the planner's turn, or `aside`.

        Args:
            text: A validated checkpoint.
            donors: Of its architecture's signature.
            watch: Takes the seconds.
            on_progress: Hears of each progress line.

        Raises:
            BadCheckpointError: The checkpoint cannot be read, or its files have changed.
        """
        missing = [donor for donor in donors if self.known(text, donor) is None]
        missing = [donor for donor in missing if not await self._recall(text, donor)]
        if not missing:
            return
        watch.enter("scan")
        try:
            identity, found = await self._scanner.compare(
                text.path, [donor.text.path for donor in missing], on_progress=on_progress
            )
        finally:
            watch.stop()
        if identity != text.identity:
            raise files_changed()
        for donor, nearness in zip(missing, found, strict=True):
            self._remember(_key(text, donor), _likeness(nearness, donor))

    async def _recall(self, text: TextSide, donor: ServedModel) -> bool:
        """Takes a pair's numbers from its whole scan, if its contents were scanned before."""
        fingerprint = self._fingerprints.known(text)
        if fingerprint is None:
            return False
        report: Json | None = await asyncio.to_thread(
            self._registry.scan, donor.fingerprint, fingerprint
        )
        if not report:  # a damaged one reads as an empty one
            return False
        likeness = Likeness(mean_cos=report["mean_cos"], mean_epsilon=report["mean_epsilon"])
        self._remember(_key(text, donor), likeness)
        return True

    def _remember(self, key: _Key, likeness: Likeness) -> None:
        self._known[key] = likeness
        if len(self._known) > _MAX_REMEMBERED:
            del self._known[next(iter(self._known))]


def _key(text: TextSide, donor: ServedModel) -> _Key:
    return text.identity, text.config, donor.fingerprint


def _likeness(found: Nearness, donor: ServedModel) -> Likeness:
    if found.error is not None:
        return Likeness(error=found.error)
    if found.identity != donor.text.identity:
        return Likeness(error="Its files were replaced since it was loaded.")
    return Likeness(mean_cos=found.mean_cos, mean_epsilon=found.mean_epsilon)
