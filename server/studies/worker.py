"""The study worker as the server meets it: a request in, records of tensors out, then a summary.

Records are found tensor by tensor, so that a worker that is ended has not worked in vain: the next
one is given what there is.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linker_core.errors import BadCheckpointError, LinkerError, from_record
from linker_core.pace import Spent
from linker_core.weights.checkpoint import Identity
from server.onboarding.processes import never_busy, run_worker, worker_fault
from server.registry.records import Json
from server.studies.failures import FILES_FAULTS
from server.studies.files import Places, UnfitError, replaced

STUDY_COMMAND = (sys.executable, "-P", "-m", "analysis.worker")
# The matrices are as small as families are: more threads of OpenBLAS would but wait for each other
# (of 70 fine-tunes eleven times as long on two cores), and heed no pace.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
_BASE = "the base"  # where it is no model
SEED = 0  # of the null model's draws, the bootstrap's and the chain's


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker is to study."""

    base_name: str | None
    places: Places
    done: deque[bytes]  # records of earlier workers as JSON; each goes when it is told

    def to_json(self) -> dict[str, Any]:
        """Returns the worker's first line."""
        return {
            "base": {"name": self.base_name, "path": str(self.places.base.path)},
            "variants": {name: str(place.path) for name, place in self.places.variants.items()},
            "num_done": len(self.done),
            "seed": SEED,
        }

    def told(self) -> Iterator[bytes]:
        """Yields the lines after it, and lets go of each."""
        while self.done:
            yield self.done.popleft()


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who hears what a worker says while it works."""

    on_opened: Callable[[int], None]  # tensors in all
    on_record: Callable[[str, Json], None]  # a tensor's name, what was found
    on_spent: Callable[[Spent], None]  # since this worker began


class StudyWorker:
    """Starts study workers and reads what they say.

    Args:
        command: The worker's command line.
        busy: Whether sequences run now; the worker holds back while they do.
    """

    def __init__(
        self,
        command: Sequence[str] = STUDY_COMMAND,
        *,
        busy: Callable[[], bool] = never_busy,
    ) -> None:
        self._command = command
        self._busy = busy

    async def run(self, order: Order, listener: Listener) -> Json:
        """Returns the summary of a study. Cancelling the wait kills the worker.

        Raises:
            UnfitError: The files of some variants are not those that were validated, or the worker
                says what is wrong with them.
            LinkerError: What else the worker says, or why it died.
        """
        hearing = _Hearing(order.places, listener)
        try:
            summary = await run_worker(
                self._command,
                request=order.to_json(),
                more=order.told(),
                busy=self._busy,
                on_progress=_ignore_progress,
                on_said=hearing.hear,
                environment=ENVIRONMENT,
            )
        except LinkerError as error:
            raise await _whose(error, order.places) from error
        return hearing.checked_summary(summary)


class _Hearing:
    """Understands a worker's lines; what it should not have said raises, see `run_worker`."""

    def __init__(self, places: Places, listener: Listener) -> None:
        self._places = places
        self._listener = listener
        self._opened = False

    def hear(self, message: Mapping[str, Any]) -> None:
        """Takes one line."""
        if "opened" in message:
            self._hear_opened(message["opened"])
        elif self._opened:
            self._hear_record(message)
        else:
            raise ValueError("a record before the files are known")

    def checked_summary(self, summary: object) -> Json:
        """Returns a result that can be stored.

        Raises:
            EngineFailureError: It cannot.
        """
        if not self._opened or not isinstance(summary, dict) or not _is_storable(summary):
            raise worker_fault()
        return summary

    def _hear_opened(self, opened: Mapping[str, Any]) -> None:
        read, meant = opened["variants"], self._places.variants
        if read.keys() != meant.keys():
            raise ValueError("other variants than were asked for")
        if _identity(opened["base"]) != self._places.base.identity:
            raise replaced(_BASE)
        others = [name for name in meant if _identity(read[name]) != meant[name].identity]
        if others:
            raise UnfitError({name: replaced(name) for name in others})
        num_tensors = opened["num_tensors"]
        if type(num_tensors) is not int or num_tensors < 1:
            raise ValueError(f"{num_tensors!r:.50} tensors")
        self._opened = True
        self._listener.on_opened(num_tensors)

    def _hear_record(self, message: Mapping[str, Any]) -> None:
        record, spent = message["record"], Spent(*(float(s) for s in message["spent"]))
        name = record["name"]
        if not isinstance(name, str) or not _is_storable(record):
            raise ValueError("a record that cannot be stored")
        self._listener.on_record(name, record)
        self._listener.on_spent(spent)


async def _whose(error: LinkerError, places: Places) -> LinkerError | UnfitError:
    """Returns what a worker has failed of as an error of the variants that it is about, if any."""
    if error.param is None:
        # A worker that dies of a file that was cut short says nothing.
        is_files = isinstance(error, BadCheckpointError)
        return await asyncio.to_thread(_traced, error, places) if is_files else error
    said = from_record(error.to_record() | {"param": None})  # nobody else has asked for anything
    for name in places.variants:
        # What the machine lacks it may have soon, though no file of the variant changes.
        if error.param == f"variants.{name}" and isinstance(error, FILES_FAULTS):
            return UnfitError({name: said})
    return said


def _traced(error: LinkerError, places: Places) -> LinkerError | UnfitError:
    if not places.base.is_unchanged():
        return replaced(_BASE)
    changed = [name for name, place in places.variants.items() if not place.is_unchanged()]
    return UnfitError({name: replaced(name) for name in changed}) if changed else error


def _identity(record: Sequence[Sequence[Any]]) -> Identity:
    return tuple((n, d, i, s, m, c) for n, d, i, s, m, c in record)


def _is_storable(value: Any) -> bool:
    """Whether JSON has finite numbers alone, which is all that every database takes."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return True
    return all(map(_is_storable, value))


def _ignore_progress(_stage: str, _done: int, _total: int) -> None:
    """Records say how far it is."""
