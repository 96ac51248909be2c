"""The engine: takes commands, steps every family, reports events. One thread owns all its state.

Knows nothing of processes or sockets; the worker feeds it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from linker_core.config import EngineConfig
from linker_core.engine.devices import still_computes
from linker_core.engine.family import FamilyOutput
from linker_core.engine.grammar_builds import GrammarBuilds
from linker_core.engine.leaving import check_unused, rehome
from linker_core.engine.loading import LoadQueue
from linker_core.engine.messages import (
    Abort,
    CancelLoad,
    Command,
    Event,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelUnloaded,
    Release,
    RequestFailed,
    Reserve,
    Reserved,
    ReserveFailed,
    Shutdown,
    Snapshot,
    StepOutput,
    Submit,
    TokenOutput,
    UnloadFailed,
    UnloadModel,
)
from linker_core.engine.prefix import key_root
from linker_core.engine.requests import check_submit
from linker_core.engine.resident_model import ResidentModel
from linker_core.engine.residents import Residents
from linker_core.engine.sequence import SequenceState
from linker_core.engine.snapshot import take_snapshot
from linker_core.engine.start_deadlines import StartDeadlines
from linker_core.errors import DeadlineError, LinkerError

SNAPSHOT_INTERVAL_S = 0.5
# How long loading may hold the loop: short beside a decode step while sequences run.
BUSY_SLICE_S, IDLE_SLICE_S = 0.02, 0.1
GRAMMAR_WAIT_S = 0.01  # for a grammar, while there is nothing else to do
MAX_CRASHED_STEPS = 3  # in a row; then the process is to be replaced


class EngineBrokenError(Exception):
    """Nothing is computed any more; only a new process can help."""


class Engine:
    """Serves every loaded model.

    Args:
        config: Settings.
        clock: Monotonic seconds, by the clock of those who submit.
    """

    def __init__(
        self, config: EngineConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.device = torch.device(config.device)
        self.residents = Residents(config, device=self.device, clock=clock)
        self._clock = clock
        self._loading = LoadQueue(self.residents, clock=clock)
        self._sequences: dict[str, tuple[ResidentModel, SequenceState]] = {}
        self._grammars = GrammarBuilds()
        self._start_deadlines = StartDeadlines()
        self._arrivals = itertools.count()
        self._events: list[Event] = []
        self._crashed_steps = 0
        self._changed = False  # since the last snapshot
        self._snapshot_due_s = clock()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do beyond what new commands bring."""
        return bool(self._sequences) or self._loading.busy or bool(self._events)

    def handle(self, command: Command) -> None:
        """Takes one command; what it causes is reported by the next `step`."""
        self._changed = True
        match command:
            case Submit():
                self._submit(command)
            case Abort():
                self._abort(command.request_id)
            case LoadModel():
                self._loading.add(command)
            case CancelLoad():
                self._conclude(*self._loading.cancel(command.model))
            case UnloadModel():
                self._unload(command)
            case Reserve():
                self._reserve(command)
            case Release():
                self.residents.pool.budget.release(command.name)
                self._take_snapshot()
            case Shutdown():
                raise AssertionError("the worker leaves on Shutdown")

    def step(self) -> list[Event]:
        """Schedules, runs and postprocesses one batch of every family, and moves what is loading.

        Returns:
            What happened since the last call, at most one StepOutput.

        Raises:
            EngineBrokenError: Several steps in a row failed, and not for what they were to compute;
                or a load failed on a device that computes nothing any more.
        """
        self._advance_loading()
        self._admit_constrained()
        self._refuse_late()
        self._step_families()
        self._finish_unloading()
        self._report_snapshot()
        events, self._events = self._events, []
        return events

    def snapshot(self) -> Snapshot:
        """Returns what it holds now."""
        sequences = [sequence for _, sequence in self._sequences.values()]
        return take_snapshot(self.residents, sequences, self.device)

    def close(self) -> None:
        """Lets the process end without waiting for what nobody waits for any more."""
        self._grammars.close()

    def _submit(self, command: Submit) -> None:
        served = self.residents.served.get(command.model)
        try:
            served = check_submit(command, served)
        except LinkerError as error:
            self._refuse(command.request_id, error)
            return
        assert command.request_id not in self._sequences
        submitted_s = self._clock() if command.submitted_s is None else command.submitted_s
        sequence = SequenceState(
            request_id=command.request_id,
            model=command.model,
            slot=served.slot,
            vocab_size=served.vocab_size,
            tokens=list(command.prompt_ids),
            num_prompt=len(command.prompt_ids),
            sampling=command.sampling,
            arrival=next(self._arrivals),
            submitted_s=submitted_s,
            priority=command.priority,
            tenant=command.tenant,
            key_root=key_root(
                plan_fingerprint=served.plan_fingerprint,
                slot=served.slot,
                salt=command.cache_salt,
            ),
        )
        if command.sampling.grammar is None:
            served.family.add(sequence)
        else:
            try:
                self._grammars.start(sequence, served.directory)
            except LinkerError as error:
                self._refuse(command.request_id, error)
                return
        self._sequences[command.request_id] = (served, sequence)
        if command.start_within_s is not None:
            self._start_deadlines.add(command.request_id, submitted_s + command.start_within_s)

    def _abort(self, request_id: str) -> None:
        found = self._sequences.pop(request_id, None)
        if found is not None:
            served, sequence = found
            if not self._grammars.cancel(sequence):
                served.family.remove(sequence)

    def _unload(self, command: UnloadModel) -> None:
        name = command.model
        self._conclude(*self._loading.cancel(name))
        served = self.residents.served.get(name)
        if served is None:
            self._events.append(ModelUnloaded(model=name))
            return
        try:
            if command.heir is not None:
                rehome(served, command.heir, residents=self.residents, loading=self._loading)
                self._take_snapshot()
            check_unused(served, residents=self.residents, loading=self._loading)
        except LinkerError as error:
            self._events.append(UnloadFailed(model=name, error=error.to_record()))
            return
        served.unloading = True

    def _reserve(self, command: Reserve) -> None:
        try:
            self.residents.pool.budget.reserve(command.name, command.nbytes)
        except LinkerError as error:
            self._events.append(ReserveFailed(name=command.name, error=error.to_record()))
            return
        self._conclude(Reserved(name=command.name))

    def _advance_loading(self) -> None:
        for event in self._loading.advance(BUSY_SLICE_S if self._sequences else IDLE_SLICE_S):
            if isinstance(event, LoadProgress):
                self._events.append(event)
                continue
            # That no model is blamed for a device which has failed: the process is blamed.
            if isinstance(event, LoadFailed) and not still_computes(self.device):
                raise EngineBrokenError(f"the device {self.device} computes nothing any more")
            self._conclude(event)

    def _admit_constrained(self) -> None:
        """Queues the sequences whose grammars have been compiled meanwhile."""
        others = len(self._sequences) - self._grammars.num_pending
        timeout_s = 0.0 if others or self._loading.busy else GRAMMAR_WAIT_S
        for sequence, matcher in self._grammars.finished(timeout_s):
            if isinstance(matcher, LinkerError):
                del self._sequences[sequence.request_id]
                self._refuse(sequence.request_id, matcher)
            else:
                served, _ = self._sequences[sequence.request_id]
                served.family.add(sequence, matcher)

    def _refuse_late(self) -> None:
        """Gives up sequences that no step has taken in time."""
        for request_id in self._start_deadlines.due(self._clock()):
            found = self._sequences.get(request_id)
            if found is not None and found[1].num_cached is None:
                self._abort(request_id)
                message = "The request waited too long for its turn; try again in a moment."
                self._refuse(request_id, DeadlineError(message))

    def _refuse(self, request_id: str, error: LinkerError) -> None:
        self._events.append(RequestFailed(request_id=request_id, error=error.to_record()))

    def _step_families(self) -> None:
        tokens: list[TokenOutput] = []
        for family in list(self.residents.families.values()):
            output = family.step()
            tokens.extend(output.tokens)
            self._events.extend(output.failed)
            for sequence in output.ended:
                del self._sequences[sequence.request_id]
            self._count_crash(output)
        if tokens:
            self._events.append(StepOutput(tokens=tuple(tokens)))

    def _count_crash(self, output: FamilyOutput) -> None:
        if output.crashed:
            self._crashed_steps += 1
        elif output.tokens:
            self._crashed_steps = 0
        if self._crashed_steps >= MAX_CRASHED_STEPS:
            raise EngineBrokenError(f"{self._crashed_steps} steps in a row failed")

    def _finish_unloading(self) -> None:
        for served in self.residents.leaving():
            if any(user is served for user, _ in self._sequences.values()):
                continue
            self.residents.unload(served)
            self._grammars.forget_model(served.slot)
            if served.is_replaced:
                self._take_snapshot()
            else:
                self._conclude(ModelUnloaded(model=served.name))

    def _conclude(self, *events: Event) -> None:
        """Reports what somebody waits for, and before it what it has changed."""
        if events:
            self._take_snapshot()
            self._events.extend(events)

    def _report_snapshot(self) -> None:
        if self._changed and self._clock() >= self._snapshot_due_s:
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        self._events.append(self.snapshot())
        self._changed = bool(self._sequences)
        self._snapshot_due_s = self._clock() + SNAPSHOT_INTERVAL_S
