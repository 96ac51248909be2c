"""Fingerprints of checkpoints, each file hashed, and checked for NaN, once in this process's life.

A file is known by device, inode, size and both of its times; a change of its content shows there.
"""

from __future__ import annotations

from typing import TypeVar

from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Identity
from server.onboarding.pairs import files_changed
from server.onboarding.processes import OnStageProgress
from server.onboarding.scanner import Scanner
from server.onboarding.timing import Stopwatch
from server.residency.catalog import TextSide

_MAX_REMEMBERED = 4096
_Key = tuple[Identity, ModelConfig]
_Value = TypeVar("_Value")


class Fingerprints:
    """What is known of checkpoints. Event loop only.

    Args:
        scanner: Hashes and checks.
    """

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._digests: dict[_Key, str] = {}
        self._finite: dict[_Key, None] = {}  # a set that remembers its order

    async def find(
        self,
        text: TextSide,
        *,
        finite: bool = False,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> str:
        """Returns the digest of a checkpoint; reads it only for what is not known yet.

        Args:
            text: A validated checkpoint.
            finite: Whether its weights must have been checked for NaN and infinity.
            watch: Told of the stages hash and scan.
            on_progress: Hears of each progress line.

        Raises:
            BadCheckpointError: The files cannot be read or have changed, or weights are not finite.
        """
        key = (text.identity, text.config)
        digest = self._digests.get(key)
        checked = not finite or key in self._finite
        if digest is not None and checked:
            return digest

        def follow(stage: str, done: int, total: int) -> None:
            on_progress(stage, done, total)
            if stage == "hashing" and done == total and not checked:
                watch.enter("scan")

        watch.enter("hash" if digest is None else "scan")
        result = await self._scanner.run(
            text.path, hashed=digest is None, scanned=not checked, on_progress=follow
        )
        watch.stop()
        if result.identity != text.identity:
            raise files_changed()
        if not checked:
            self.note_finite(text)
        if digest is None:
            assert result.fingerprint is not None
            digest = result.fingerprint
            _remember(self._digests, key, digest)
        return digest

    def known(self, text: TextSide) -> str | None:
        """Returns the digest of a checkpoint if it was read in this process's life."""
        return self._digests.get((text.identity, text.config))

    def note_finite(self, text: TextSide) -> None:
        """Remembers that a scan has looked at every weight of a checkpoint."""
        _remember(self._finite, (text.identity, text.config), None)


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    known[key] = value
    if len(known) > _MAX_REMEMBERED:
        del known[next(iter(known))]
