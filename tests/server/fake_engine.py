"""An engine process without tensors: it speaks the protocol and answers a prompt with itself.

The first token of a prompt may ask for a fault instead; see `Fault`.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import signal
import struct
import sys
import time
from dataclasses import dataclass, field
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path

from linker_core.config import EngineConfig
from linker_core.engine.messages import (
    Abort,
    CancelLoad,
    Command,
    EngineReady,
    FinishReason,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLoad,
    ModelLoaded,
    ModelUnloaded,
    PromptLogprob,
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
from linker_core.errors import (
    ConflictError,
    InsufficientCapacityError,
    LinkerError,
    ModelNotFoundError,
    NotReadyError,
    NumericalError,
    UnusableModelError,
)
from tests.server.fake_memory import FakeMemory

FAKE_ENGINE = (sys.executable, "-m", "tests.server.fake_engine")
MUTE_ENGINE = (sys.executable, "-c", "import time; time.sleep(600)")  # never reads commands
TOO_BIG, KILLER = "too-big", "killer"  # model names that fail to load, or end the process
UNUSABLE = "unusable"  # a model name that is loaded and cannot give its first token
STUCK = "stuck"  # a model name whose loading takes until it is cancelled or unloaded
# "refuse", "unusable" or "die": what happens to plans that replace others.
REPLACING = "LINKER_TEST_REPLACING"
MAX_MODEL_LEN = 200
_PR_SET_PDEATHSIG = 1


class Fault(IntEnum):
    """What a prompt's first token makes the engine do."""

    DIE = 501  # after two tokens
    WAIT = 502  # one token, then nothing until the abort
    FAIL = 503  # the sequence fails at once
    HANG = 504  # the whole loop stands still
    FLOOD = 505  # ten thousand tokens in one message
    SLOW = 506  # a token every 50 ms, so that there is time to do something meanwhile
    MUTE = 507  # a first token that is text, then nothing
    PAUSE = 508  # says the prompt twice, then nothing until the abort


@dataclass
class Running:
    """A sequence on its way."""

    submit: Submit
    num_done: int = 0

    def prompt_logprobs(self) -> tuple[PromptLogprob, ...]:
        """The prompt's tokens come second each time, every one less likely than the last."""
        num_top = self.submit.sampling.prompt_logprobs or 0
        return tuple(
            PromptLogprob(
                token_id=token,
                logprob=-float(place),
                rank=2,
                top_logprobs=((7, -0.5), (token, -float(place)))[:num_top],
            )
            for place, token in enumerate(self.submit.prompt_ids[1:], start=1)
        )

    def next_token(self) -> TokenOutput:
        prompt, sampling = self.submit.prompt_ids, self.submit.sampling
        is_first = self.num_done == 0
        token = prompt[self.num_done % len(prompt)]
        self.num_done += 1
        reason = None
        if token in sampling.stop_token_ids and self.num_done > sampling.min_tokens:
            reason = FinishReason.STOP
        elif self.num_done >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        top = ((token, -0.5), (7, -1.5))
        return TokenOutput(
            request_id=self.submit.request_id,
            token_id=token,
            finish_reason=reason,
            logprob=None if sampling.logprobs is None else -0.5,
            top_logprobs=top[: sampling.logprobs or 0],
            prompt_logprobs=(
                self.prompt_logprobs()
                if is_first and sampling.prompt_logprobs is not None
                else None
            ),
            num_cached_tokens=len(prompt) // 2 if is_first else None,
            queued_s=0.0 if is_first else None,
        )


@dataclass
class FakeEngine:
    connection: Connection
    memory: FakeMemory
    running: dict[str, Running] = field(default_factory=dict)
    queued: list[LoadModel] = field(default_factory=list)  # until their names are free
    leaving: set[str] = field(default_factory=set)  # unloaded once their sequences have ended

    def handle(self, command: Command) -> None:
        match command:
            case LoadModel():
                self.queued.append(command)
                self.load_queued()
            case CancelLoad():
                self.cancel(command.model)
            case UnloadModel():
                self.unload(command)
            case Submit():
                self.submit(command)
            case Abort():
                self.running.pop(command.request_id, None)
                self.report()
            case Reserve():
                self.reserve(command)
            case Release():
                self.memory.reserved.pop(command.name, None)
                self.report()
            case Shutdown():
                sys.exit(0)

    def load_queued(self) -> None:
        while self.queued and self.queued[0].model not in self.leaving:
            self.load(self.queued.pop(0))

    def load(self, command: LoadModel) -> None:
        # What was loaded, and in which order, for tests to read.
        with Path(command.path, "loads.log").open("a") as log:
            log.write(f"{command.model} {command.donor} {command.plan.policy.value}\n")
        if command.replaces and os.environ.get(REPLACING) == "die":
            os._exit(1)
        if command.model == KILLER:
            os._exit(1)
        if command.model == STUCK:
            return
        fault = os.environ.get(REPLACING) if command.replaces else command.model
        try:
            if fault in (TOO_BIG, "refuse"):
                raise InsufficientCapacityError("It needs 2 bytes and 1 is free.")
            if fault == UNUSABLE:
                raise UnusableModelError("It gave numbers that are not finite.")
            moved = self.memory.load(command, leaving=self.leaving)
        except LinkerError as error:
            self.report()
            self.connection.send(LoadFailed(model=command.model, error=error.to_record()))
            return
        self.connection.send(LoadProgress(model=command.model, done_bytes=moved, total_bytes=moved))
        self.report()
        self.connection.send(
            ModelLoaded(
                model=command.model,
                bytes=self.memory.bytes_of(command.model),
                max_model_len=min(command.max_model_len or MAX_MODEL_LEN, MAX_MODEL_LEN),
                alias_seconds=0.25,
                move_seconds=0.5,
            )
        )

    def reserve(self, command: Reserve) -> None:
        if command.nbytes > self.memory.free_bytes():
            error = InsufficientCapacityError("There is no room.").to_record()
            self.connection.send(ReserveFailed(name=command.name, error=error))
            return
        self.memory.reserved[command.name] = command.nbytes
        self.report()
        self.connection.send(Reserved(name=command.name))

    def unload(self, command: UnloadModel) -> None:
        """Like the engine: a donor in use needs an heir, running sequences end first."""
        model = command.model
        self.cancel(model)
        if model in self.memory.models:
            try:
                if command.heir is not None:
                    self.memory.rehome(model, command.heir, leaving=self.leaving)
                    self.report()
                if users := self.memory.dependants(model):
                    raise ConflictError(f"{model} is the donor of {', '.join(users)}.")
            except LinkerError as error:
                self.connection.send(UnloadFailed(model=model, error=error.to_record()))
                return
        self.leaving.add(model)
        self.finish_unloading()

    def cancel(self, model: str) -> None:
        """Forgets what has not come yet: what is stuck, or waits for its name."""
        waiting = [command for command in self.queued if command.model == model]
        self.queued = [command for command in self.queued if command.model != model]
        for _ in range(len(waiting) + (model == STUCK)):
            error = NotReadyError("The loading was cancelled.").to_record()
            self.connection.send(LoadFailed(model=model, error=error))

    def finish_unloading(self) -> None:
        busy = {sequence.submit.model for sequence in self.running.values()}
        for model in self.leaving - busy:
            self.leaving.remove(model)
            self.memory.unload(model)
            self.report()
            self.connection.send(ModelUnloaded(model=model))
        self.load_queued()

    def submit(self, command: Submit) -> None:
        if command.model not in self.memory.models or command.model in self.leaving:
            missing = ModelNotFoundError(f"Model '{command.model}' is not loaded.").to_record()
            self.connection.send(RequestFailed(request_id=command.request_id, error=missing))
            return
        first = command.prompt_ids[0]
        if first == Fault.FAIL:
            error = NumericalError("The logits of this request were not finite.").to_record()
            self.connection.send(RequestFailed(request_id=command.request_id, error=error))
        elif first == Fault.HANG:
            time.sleep(600)
        else:
            self.running[command.request_id] = Running(command)
            self.report()

    def step(self) -> None:
        tokens: list[TokenOutput] = []
        for request_id, sequence in list(self.running.items()):
            fault = sequence.submit.prompt_ids[0]
            if fault == Fault.DIE and sequence.num_done == 2:
                os._exit(1)
            if fault in (Fault.WAIT, Fault.MUTE) and sequence.num_done:
                continue
            if fault == Fault.PAUSE and sequence.num_done == 2 * len(sequence.submit.prompt_ids):
                continue
            if fault == Fault.SLOW:
                time.sleep(0.05)
            count = 10_000 if fault == Fault.FLOOD else 1
            tokens += [sequence.next_token() for _ in range(count)]
            if fault == Fault.FLOOD:
                tokens = [token._replace(finish_reason=None) for token in tokens]
            if tokens[-1].finish_reason is not None:
                del self.running[request_id]
        if tokens:
            self.connection.send(StepOutput(tokens=tuple(tokens)))
            if any(token.finish_reason for token in tokens):
                self.report()
        self.finish_unloading()

    def report(self) -> None:
        memory = self.memory
        running = [sequence.submit.model for sequence in self.running.values()]
        self.connection.send(
            Snapshot(
                models={model: memory.bytes_of(model) for model in memory.models},
                load={m: ModelLoad(running=running.count(m), waiting=0) for m in memory.models},
                device="cpu",
                device_weight_bytes=memory.weight_bytes(),
                device_kv_bytes=memory.kv_bytes(),
                device_free_bytes=memory.free_bytes(),
                reserved_bytes=sum(memory.reserved.values()),
                kv_usage_ratio=0.25,
                num_preemptions=3,
                prefix_queries=48,
                prefix_hits=32,
                batch_variants={1: 5, 3: 2},
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--heartbeat-fd", type=int, required=True)
    parser.add_argument("--config", type=EngineConfig.from_json, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(arguments.socket_fd)
    heartbeat = mmap.mmap(arguments.heartbeat_fd, 8)
    connection.send(EngineReady(device=arguments.config.device))
    engine, beat = FakeEngine(connection, FakeMemory(arguments.config)), 0
    engine.report()
    while True:
        beat += 1
        heartbeat[:8] = struct.pack("<Q", beat)
        try:
            while connection.poll(0 if engine.running else 0.02):
                engine.handle(connection.recv())
            engine.step()
        except (EOFError, OSError):
            return


if __name__ == "__main__":
    main()
