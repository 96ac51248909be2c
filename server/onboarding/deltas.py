"""The delta folders of resident variants: made, found again, checked and swept.

A folder holds what a plan with residuals keeps of a variant; the engine loads it in place of the
checkpoint. It is named by what decides its content, so the same plan is encoded once, and is
complete or not there: what is being written has another name.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from linker_core.errors import (
    BadCheckpointError,
    InsufficientCapacityError,
    NotReadyError,
)
from linker_core.sharing.delta import VERSION, DeltaFile
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.sharing.rungs import ENCODING, AnyRung, Rung
from linker_core.weights.checkpoint import Identity
from server.onboarding.adapters import AdapterSide, Source, check_unchanged
from server.onboarding.encoder import Encoder
from server.onboarding.pairs import open_again
from server.onboarding.processes import OnStageProgress
from server.onboarding.timing import Stopwatch
from server.onboarding.unbroken import unbroken
from server.registry.records import Json
from server.residency.catalog import ServedModel, TextSide

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = "unfinished-"


class Weights(NamedTuple):
    """What the engine loads a model from."""

    path: Path
    identity: Identity


class Deltas:
    """The folders under the state directory. Event loop only.

    Args:
        directory: Holds them and nothing else; made when it is needed.
        encoder: Makes and checks them.
    """

    def __init__(self, directory: Path, encoder: Encoder) -> None:
        self._directory = directory
        self._encoder = encoder
        self._sound: dict[str, Identity] = {}  # read to their end in this process's life
        self._fresh: set[str] = set()  # asked for; rows may not speak of them yet
        self._turn = asyncio.Lock()  # of the one encoder that runs

    async def weights(
        self,
        plan: SharePlan,
        text: TextSide,
        donor: ServedModel | None,
        *,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> Weights:
        """Returns what a planned model is loaded from; encodes it where that is not there yet.

        Args:
            plan: The model's.
            text: Its checkpoint or delta folder.
            donor: Its donor.
            watch: Takes the seconds of stage encode.
            on_progress: Hears of each progress line.

        Raises:
            BadCheckpointError: Files were replaced since they were validated.
            InsufficientCapacityError: The disk is full, or the encoder finds no memory.
            LinkerError: Why the worker ended.
        """
        if text.delta is not None or not plan.has_residuals:
            return Weights(text.path, text.identity)
        assert donor is not None
        base = donor.text

        async def encode(target: Path) -> None:
            await self._encoder.encode(
                plan, donor=base.path, variant=text.path, target=target, on_progress=on_progress
            )
            await asyncio.to_thread(_check_same, text, base)

        name = delta_name(plan.to_json())
        return await self._provide(name, base, encode, plan.rungs, watch, on_progress)

    async def converted(
        self,
        adapter: AdapterSide,
        donor: ServedModel,
        fingerprint: str,
        *,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> Path:
        """Returns the delta folder of an adapter, made where it is not there yet.

        Args:
            adapter: The adapter.
            donor: Its base.
            fingerprint: Of what the two make.
            watch: Takes the seconds of stage encode.
            on_progress: Hears of each progress line.

        Raises:
            LinkerError: See `weights`; or the adapter is damaged or does not fit.
        """
        base = donor.text

        async def convert(target: Path) -> None:
            await self._encoder.convert(
                adapter.path,
                donor=base.path,
                donor_fingerprint=donor.fingerprint,
                target=target,
                on_progress=on_progress,
            )
            await asyncio.to_thread(_check_same, adapter, base)

        name = delta_name(
            {
                "policy": Policy.ADAPTER,
                "donor_fingerprint": donor.fingerprint,
                "variant_fingerprint": fingerprint,
            }
        )
        weights = await self._provide(name, base, convert, None, watch, on_progress)
        return weights.path

    def has(self, plan: Json) -> bool:
        """Whether nothing has to be encoded to load a stored plan, as far as names tell."""
        return _keeps_no_folder(plan) or (self._directory / delta_name(plan)).is_dir()

    async def sweep(self, plans: Iterable[Json], *, settled: bool = False) -> None:
        """Removes the folders that none of the stored plans needs.

        Args:
            plans: All that are stored.
            settled: Whether they speak of every folder that was asked for; else those stay, too.
        """
        kept = {delta_name(plan) for plan in plans if not _keeps_no_folder(plan)}
        if settled:
            self._fresh.clear()
        for name in await asyncio.to_thread(self._names):
            if name not in kept | self._fresh and _NAME.fullmatch(name):
                self._sound.pop(name, None)
                # Gone at once, so that nobody finds it while it is being removed.
                gone = _renamed(self._directory / name, f"{_UNFINISHED}{name}-gone")
                await asyncio.to_thread(_remove, gone)

    async def clear_unfinished(self) -> None:
        """Removes what was being written when its writer ended. Nothing may be written now."""
        for name in await asyncio.to_thread(self._names):
            if not _NAME.fullmatch(name):
                await asyncio.to_thread(_remove, self._directory / name)

    async def _provide(
        self,
        name: str,
        donor: TextSide,
        make: Callable[[Path], Awaitable[None]],
        rungs: Mapping[str, AnyRung] | None,
        watch: Stopwatch,
        on_progress: OnStageProgress,
    ) -> Weights:
        """Returns a folder that is found sound, or made now."""
        folder = self._directory / name
        self._fresh.add(name)
        async with self._turn:
            watch.enter("encode")
            try:
                identity = await self._find(folder, donor, rungs, on_progress)
                if identity is None:
                    identity = await self._make(folder, make)
            finally:
                watch.stop()
            self._sound[name] = identity
        return Weights(folder, identity)

    async def _find(
        self,
        folder: Path,
        donor: TextSide,
        rungs: Mapping[str, AnyRung] | None,
        on_progress: OnStageProgress,
    ) -> Identity | None:
        """Returns the identity of a folder that is there and sound."""
        try:
            identity = await asyncio.to_thread(_opened, folder, rungs)
            if identity is None or self._sound.get(folder.name) == identity:
                return identity
            read = await self._encoder.verify(folder, donor=donor.path, on_progress=on_progress)
        except BadCheckpointError as error:
            logger.warning("a stored delta is damaged and is encoded anew: %s", error.message)
            return None
        return identity if read == identity else None

    async def _make(self, folder: Path, make: Callable[[Path], Awaitable[None]]) -> Identity:
        target = folder.with_name(_UNFINISHED + folder.name)
        await unbroken(asyncio.to_thread(self._make_room, target))
        try:
            await make(target)
            return await unbroken(asyncio.to_thread(_finish, target, folder))
        except InsufficientCapacityError as error:
            raise InsufficientCapacityError(
                f"The delta of the model could not be made: {error.message}"
            ) from error
        finally:
            await self.clear_unfinished()

    def _make_room(self, target: Path) -> None:
        with _disk_faults():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove(target)

    def _names(self) -> list[str]:
        try:
            return [entry.name for entry in self._directory.iterdir()]
        except FileNotFoundError:
            return []  # nothing was encoded so far
        except OSError as error:
            logger.warning("the delta folders cannot be listed: %s", error)
            return []


def delta_name(plan: Json) -> str:
    """Returns the name of the folder of a stored plan: a digest of all that decides its content."""
    decisive = [VERSION, ENCODING, plan["donor_fingerprint"], plan["variant_fingerprint"]]
    if plan["policy"] != Policy.ADAPTER:  # whose rungs follow from the others
        decisive.append(sorted(plan["rungs"].items()))
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _keeps_no_folder(plan: Json) -> bool:
    return plan["policy"] == Policy.DELTA or set(plan["rungs"].values()) <= set(Rung)


def _check_same(source: Source, donor: TextSide) -> None:
    """Refuses what was read if it is not what was validated.

    Raises:
        BadCheckpointError: A file changed.
    """
    for one in (source, donor):
        if isinstance(one, AdapterSide):
            check_unchanged(one)
        else:
            with open_again(one):
                pass


def _opened(folder: Path, rungs: Mapping[str, AnyRung] | None) -> Identity | None:
    """Returns what the file in a folder is now; None where there is no folder.

    Raises:
        BadCheckpointError: It is damaged, or has other rungs than it must have.
    """
    if not folder.is_dir():
        return None
    with DeltaFile.open(folder) as delta:
        if rungs is not None and delta.plan.rungs != rungs:
            raise BadCheckpointError("The folder holds another plan's rungs.")
        return delta.identity


def _finish(target: Path, folder: Path) -> Identity:
    """Gives a folder that has just been written its name."""
    identity = _opened(target, None)
    assert identity is not None
    _remove(folder)
    with _disk_faults():
        target.rename(folder)
        descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return identity


@contextlib.contextmanager
def _disk_faults() -> Iterator[None]:
    """Makes what the disk says an error that operators understand."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientCapacityError(
                f"The delta of the model cannot be stored: {reason}. Free space in the state "
                "directory, or onboard with policy exact or thresholds."
            ) from error
        raise NotReadyError(f"The state directory cannot be written: {reason}.") from error


def _renamed(folder: Path, name: str) -> Path:
    try:
        return folder.rename(folder.with_name(name))
    except OSError as error:
        logger.warning("%s cannot be renamed: %s", folder, os.strerror(error.errno or 0))
        return folder


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be removed: %s", folder, os.strerror(error.errno or 0))
