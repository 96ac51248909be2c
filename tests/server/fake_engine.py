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
from dataclasses import dataclass, field, replace
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
    ModelBytes,
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
    NotReadyError,
    NumericalError,
)

FAKE_ENGINE = (sys.executable, "-m", "tests.server.fake_engine")
MUTE_ENGINE = (sys.executable, "-c", "import time; time.sleep(600)")  # never reads commands
TOO_BIG, KILLER = "too-big", "killer"  # model names that fail to load, or end the process
STUCK = "stuck"  # a model name whose loading takes until it is cancelled or unloaded
REPLACING = "LINKER_TEST_REPLACING"  # "refuse" or "die": what happens to plans that replace others
MAX_MODEL_LEN = 200
FREE_BYTES = 1 << 30
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
        )


@dataclass
class FakeEngine:
    connection: Connection
    budget_bytes: int
    models: dict[str, ModelBytes] = field(default_factory=dict)
    donors: dict[str, str | None] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)  # unloaded once their sequences have ended

    def handle(self, command: Command) -> None:
        match command:
            case LoadModel():
                self.load(command)
            case CancelLoad():
                self.cancel(command.model)
            case UnloadModel():
                self.unload(command.model)
            case Submit():
                self.submit(command)
            case Abort():
                self.running.pop(command.request_id, None)
                self.report()
            case Reserve():
                self.reserve(command)
            case Release():
                self.reserved.pop(command.name, None)
                self.report()
            case Shutdown():
                sys.exit(0)

    def load(self, command: LoadModel) -> None:
        # What was loaded, and in which order, for tests to read.
        with Path(command.path, "loads.log").open("a") as log:
            log.write(f"{command.model} {command.donor} {command.plan.policy.value}\n")
        assert command.replaces == (command.model in self.models)
        if command.replaces and os.environ.get(REPLACING) == "die":
            os._exit(1)
        refused = command.replaces and os.environ.get(REPLACING) == "refuse"
        if command.model == TOO_BIG or refused:
            error = InsufficientCapacityError("It needs 2 bytes and 1 is free.").to_record()
            self.connection.send(LoadFailed(model=command.model, error=error))
            return
        if command.model == KILLER:
            os._exit(1)
        if command.model == STUCK:
            return
        assert command.donor is None or command.donor in self.models
        plan = command.plan
        self.connection.send(
            LoadProgress(
                model=command.model, done_bytes=plan.unique_bytes, total_bytes=plan.unique_bytes
            )
        )
        self.donors[command.model] = command.donor
        self.models[command.model] = ModelBytes(
            logical=plan.logical_bytes, unique=plan.unique_bytes, shared=plan.shared_bytes
        )
        self.report()
        self.connection.send(
            ModelLoaded(
                model=command.model,
                bytes=self.models[command.model],
                max_model_len=min(command.max_model_len or MAX_MODEL_LEN, MAX_MODEL_LEN),
                alias_seconds=0.25,
                move_seconds=0.5,
            )
        )

    def reserve(self, command: Reserve) -> None:
        if command.nbytes > self.free_bytes():
            error = InsufficientCapacityError("There is no room.").to_record()
            self.connection.send(ReserveFailed(name=command.name, error=error))
            return
        self.reserved[command.name] = command.nbytes
        self.report()
        self.connection.send(Reserved(name=command.name))

    def free_bytes(self) -> int:
        held = sum(model.unique for model in self.models.values())
        return self.budget_bytes - held - sum(self.reserved.values())

    def unload(self, model: str) -> None:
        """Like the engine: a donor in use is refused, running sequences end first."""
        users = [name for name in self.models if self.donors[name] == model]
        if users:
            error = ConflictError(f"{model} is the donor of {', '.join(users)}.").to_record()
            self.connection.send(UnloadFailed(model=model, error=error))
            return
        self.cancel(model)
        self.leaving.add(model)
        self.finish_unloading()

    def cancel(self, model: str) -> None:
        """Only what is stuck has not come yet."""
        if model == STUCK:
            error = NotReadyError("The loading was cancelled.").to_record()
            self.connection.send(LoadFailed(model=model, error=error))

    def finish_unloading(self) -> None:
        busy = {sequence.submit.model for sequence in self.running.values()}
        for model in self.leaving - busy:
            self.leaving.remove(model)
            self.models.pop(model, None)
            self.report()
            self.connection.send(ModelUnloaded(model=model))

    def submit(self, command: Submit) -> None:
        assert command.model in self.models
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
            if fault == Fault.SLOW:
                time.sleep(0.05)
            count = 10_000 if fault == Fault.FLOOD else 1
            tokens += [sequence.next_token() for _ in range(count)]
            if fault == Fault.FLOOD:
                tokens = [replace(token, finish_reason=None) for token in tokens]
            if tokens[-1].finish_reason is not None:
                del self.running[request_id]
        if tokens:
            self.connection.send(StepOutput(tokens=tuple(tokens)))
            if any(token.finish_reason for token in tokens):
                self.report()
        self.finish_unloading()

    def report(self) -> None:
        held = sum(model.unique for model in self.models.values())
        running = [sequence.submit.model for sequence in self.running.values()]
        self.connection.send(
            Snapshot(
                models=dict(self.models),
                load={m: ModelLoad(running=running.count(m), waiting=0) for m in self.models},
                device="cpu",
                device_weight_bytes=held,
                device_kv_bytes=1024,
                device_free_bytes=self.free_bytes(),
                reserved_bytes=sum(self.reserved.values()),
                kv_usage_ratio=0.25,
                num_preemptions=3,
                prefix_queries=48,
                prefix_hits=32,
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
    config = arguments.config
    engine, beat = FakeEngine(connection, config.memory_budget_bytes or FREE_BYTES), 0
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
