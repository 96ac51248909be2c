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
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from linker_core.errors import (
    BadCheckpointError,
    InsufficientCapacityError,
    NotReadyError,
)
from linker_core.sharing.delta import VERSION, DeltaFile
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.weights.checkpoint import Identity
from server.onboarding.catalog import ServedModel, TextSide
from server.onboarding.encoder import Encoder
from server.onboarding.pairs import open_again
from server.onboarding.processes import OnStageProgress
from server.onboarding.timing import Stopwatch
from server.registry.records import Json

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
        self._held: Counter[str] = Counter()  # that no row speaks of yet
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
            InsufficientCapacityError: The disk is full.
            LinkerError: Why the worker ended.
        """
        if text.delta is not None or not plan.has_residuals:
            return Weights(text.path, text.identity)
        assert donor is not None
        name = delta_name(plan.to_json())
        folder = self._directory / name
        async with self._turn:
            watch.enter("encode")
            try:
                identity = await self._find(folder, plan, donor.text, on_progress)
                if identity is None:
                    identity = await self._encode(folder, plan, text, donor.text, on_progress)
            finally:
                watch.stop()
            self._sound[name] = identity
        return Weights(folder, identity)

    def has(self, plan: Json) -> bool:
        """Whether nothing has to be encoded to load a stored plan, as far as names tell."""
        return _keeps_no_folder(plan) or (self._directory / delta_name(plan)).is_dir()

    @contextlib.contextmanager
    def held(self, plan: SharePlan) -> Iterator[None]:
        """Keeps a plan's folder from being swept although no row speaks of it yet."""
        name = delta_name(plan.to_json())
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1

    async def sweep(self, plans: Iterable[Json]) -> None:
        """Removes the folders that none of the stored plans needs."""
        kept = {delta_name(plan) for plan in plans if not _keeps_no_folder(plan)}
        kept |= {name for name, count in self._held.items() if count}
        for name in await asyncio.to_thread(self._names):
            if name not in kept and not self._held[name] and _NAME.fullmatch(name):
                self._sound.pop(name, None)
                await asyncio.to_thread(_remove, self._directory / name)

    async def clear_unfinished(self) -> None:
        """Removes what was being written when its writer ended. Nothing may be written now."""
        for name in await asyncio.to_thread(self._names):
            if not _NAME.fullmatch(name):
                await asyncio.to_thread(_remove, self._directory / name)

    async def _find(
        self, folder: Path, plan: SharePlan, donor: TextSide, on_progress: OnStageProgress
    ) -> Identity | None:
        """Returns the identity of a folder that is there and sound."""
        try:
            identity = await asyncio.to_thread(_opened, folder, plan)
            if identity is None or self._sound.get(folder.name) == identity:
                return identity
            read = await self._encoder.verify(folder, donor=donor.path, on_progress=on_progress)
        except BadCheckpointError as error:
            logger.warning("a stored delta is damaged and is encoded anew: %s", error.message)
            return None
        return identity if read.identity == identity else None

    async def _encode(
        self,
        folder: Path,
        plan: SharePlan,
        text: TextSide,
        donor: TextSide,
        on_progress: OnStageProgress,
    ) -> Identity:
        target = folder.with_name(_UNFINISHED + folder.name)
        await asyncio.to_thread(self._make_room, target)
        try:
            await self._encoder.encode(
                plan, donor=donor.path, variant=text.path, target=target, on_progress=on_progress
            )
            return await asyncio.to_thread(_finish, target, folder, plan, (text, donor))
        except InsufficientCapacityError as error:
            raise InsufficientCapacityError(
                f"The delta of the model could not be stored: {error.message}"
            ) from error
        finally:
            await self.clear_unfinished()

    def _make_room(self, target: Path) -> None:
        with _disk_faults():
            self._directory.mkdir(parents=True, exist_ok=True)
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
    decisive = [VERSION, plan["donor_fingerprint"], plan["variant_fingerprint"]]
    if plan["policy"] != Policy.ADAPTER:  # whose rungs follow from the other two
        decisive.append(sorted(plan["rungs"].items()))
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _keeps_no_folder(plan: Json) -> bool:
    return plan["policy"] == Policy.DELTA or not SharePlan.from_json(plan).has_residuals


def _opened(folder: Path, plan: SharePlan) -> Identity | None:
    """Returns what the files of a plan's folder are now; None where there is none.

    Raises:
        BadCheckpointError: It is damaged, or of another plan.
    """
    if not folder.is_dir():
        return None
    with DeltaFile.open(folder) as delta:
        if delta.plan.rungs != plan.rungs:
            raise BadCheckpointError("The folder holds another plan's rungs.")
        return delta.identity


def _finish(target: Path, folder: Path, plan: SharePlan, sources: tuple[TextSide, ...]) -> Identity:
    """Gives a folder that has just been written its name, if it was made of the right files.

    Raises:
        BadCheckpointError: A file of its sources changed meanwhile.
    """
    for source in sources:
        with open_again(source):
            pass
    identity = _opened(target, plan)
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


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be removed: %s", folder, os.strerror(error.errno or 0))
