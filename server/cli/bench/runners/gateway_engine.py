"""An engine process without a model: it speaks the engine's protocol and has its tokens at once.

Started like the engine, with one option more: the core that it keeps to. Every step gives each
running sequence its next token, which is the next one of its prompt; a request's `seed` says how
many steps a second are made for it, 0 that all of its answer is one step. Without one a step
follows the other.
"""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from linker_core.config import EngineConfig
from linker_core.engine.messages import (
    Abort,
    Command,
    EngineReady,
    Event,
    FinishReason,
    LoadModel,
    ModelBytes,
    ModelLoad,
    ModelLoaded,
    ModelUnloaded,
    Shutdown,
    Snapshot,
    StepOutput,
    Submit,
    TokenOutput,
    UnloadModel,
)
from linker_core.lifeline import die_with_parent

MAX_MODEL_LEN = 32_768
_FREE_BYTES = 1 << 40
_IDLE_POLL_S = 0.05


@dataclass(slots=True)
class _Sequence:
    """A sequence on its way."""

    submit: Submit
    due_at: float  # monotonic seconds
    num_done: int = 0

    def next_tokens(self) -> list[TokenOutput]:
        """Takes the next step."""
        steps_per_s = self.submit.sampling.seed
        if steps_per_s:
            self.due_at += 1 / steps_per_s
        num_tokens = self.submit.sampling.max_tokens if steps_per_s == 0 else 1
        return [self._next_token() for _ in range(num_tokens)]

    def _next_token(self) -> TokenOutput:
        prompt = self.submit.prompt_ids
        token_id = prompt[self.num_done % len(prompt)]
        self.num_done += 1
        is_last = self.num_done >= self.submit.sampling.max_tokens
        return TokenOutput(
            request_id=self.submit.request_id,
            token_id=token_id,
            finish_reason=FinishReason.LENGTH if is_last else None,
            num_cached_tokens=0 if self.num_done == 1 else None,
            queued_s=0.0 if self.num_done == 1 else None,
        )


@dataclass(slots=True)
class InstantEngine:
    """What the engine's loop holds."""

    connection: Connection[Event, Command]
    models: set[str] = field(default_factory=set)
    running: dict[str, _Sequence] = field(default_factory=dict)

    def handle(self, command: Command) -> bool:
        """Obeys a command; False if it is the last."""
        match command:
            case Submit():
                self.running[command.request_id] = _Sequence(command, time.monotonic())
            case Abort():
                self.running.pop(command.request_id, None)
            case LoadModel():
                self._load(command)
            case UnloadModel():
                self.models.discard(command.model)
                self.connection.send(ModelUnloaded(model=command.model))
            case Shutdown():
                return False
        return True

    def step(self) -> None:
        """Sends what is due of each sequence."""
        now = time.monotonic()
        due = [sequence for sequence in self.running.values() if sequence.due_at <= now]
        tokens = tuple(token for sequence in due for token in sequence.next_tokens())
        for token in tokens:
            if token.finish_reason is not None:
                del self.running[token.request_id]
        if tokens:
            self.connection.send(StepOutput(tokens=tokens))

    def timeout_s(self) -> float:
        """Returns how long there is nothing to do but to listen."""
        due_at = min((each.due_at for each in self.running.values()), default=None)
        if due_at is None:
            return _IDLE_POLL_S
        return min(max(0.0, due_at - time.monotonic()), _IDLE_POLL_S)

    def report(self) -> None:
        """Says what the engine holds, which is nothing."""
        self.connection.send(
            Snapshot(
                models={model: ModelBytes(logical=0, unique=0, shared=0) for model in self.models},
                load={model: ModelLoad(running=0, waiting=0) for model in self.models},
                device="cpu",
                device_weight_bytes=0,
                device_kv_bytes=0,
                device_free_bytes=_FREE_BYTES,
                reserved_bytes=0,
                kv_usage_ratio=0.0,
                num_preemptions=0,
            )
        )

    def _load(self, command: LoadModel) -> None:
        self.models.add(command.model)
        self.report()
        self.connection.send(
            ModelLoaded(
                model=command.model,
                bytes=ModelBytes(logical=0, unique=0, shared=0),
                max_model_len=min(command.max_model_len or MAX_MODEL_LEN, MAX_MODEL_LEN),
                alias_seconds=0.0,
                move_seconds=0.0,
            )
        )


def serve(connection: Connection[Event, Command], heartbeat: mmap.mmap) -> None:
    """Runs the loop until Shutdown or the end of the connection."""
    connection.send(EngineReady(device="cpu"))
    engine, beat = InstantEngine(connection), 0
    engine.report()
    while True:
        beat += 1
        struct.pack_into("<Q", heartbeat, 0, beat)
        timeout_s = engine.timeout_s()
        while connection.poll(timeout_s):
            if not engine.handle(connection.recv()):
                return
            timeout_s = 0.0
        engine.step()


def main() -> None:
    """Serves the process that started this one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--heartbeat-fd", type=int, required=True)
    parser.add_argument("--config", type=EngineConfig.from_json, required=True)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    os.sched_setaffinity(0, {arguments.core})
    connection: Connection[Event, Command] = Connection(arguments.socket_fd)
    try:
        serve(connection, mmap.mmap(arguments.heartbeat_fd, 8))
    except (EOFError, OSError):
        return  # the server is gone


if __name__ == "__main__":
    main()
