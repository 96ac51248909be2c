"""Engines that compete: how each is started, and one of their processes that answers rounds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import torch

from linker_core.errors import LinkerError
from server.cli.bench import process_tree
from server.cli.bench.figures import Round
from server.cli.bench.process_tree import TreeMemory

# What this process was given for itself, or set for itself, is not for others.
_OURS_ALONE: Final = ("OMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "PYTHON", "VIRTUAL_ENV")
_WARM_UP: Final = (2, 32, 4)  # streams, tokens of a prompt, tokens of an answer
_COMPLAINT_CHARACTERS: Final = 600
_PROMPT_IDS: Final = (260, 16_000)  # words, no bytes


class Stream(NamedTuple):
    """One request: an index into the engine's models, and the prompt."""

    model: int
    prompt_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How an engine's process is started.

    Attributes:
        name: In tables.
        command: Program and arguments.
        environment: Beside what every process gets.
        programs: A directory that goes in front of `PATH`.
        ours: Whether it may have what is set for this project's processes.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    programs: Path | None = None
    ours: bool = False

    def __str__(self) -> str:
        """As one would type it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.programs is not None:
            settings.append(f"PATH={self.programs}:$PATH")
        return " ".join([*settings, shlex.join(self.command)])

    def full_environment(self) -> dict[str, str]:
        """Returns the variables of the process."""
        own = _OURS_ALONE if not self.ours else ()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        if self.programs is not None:
            kept["PATH"] = f"{self.programs}:{kept['PATH']}"
        return {**kept, **self.environment}


class Contender:
    """A loaded engine, halted while it is not its turn."""

    def __init__(self, launch: Launch, process: subprocess.Popen[bytes], log: Path) -> None:
        self.launch = launch
        self.peak = TreeMemory(pss_bytes=0, anonymous_bytes=0)
        self._process = process
        self._log = log

    @property
    def name(self) -> str:
        """The launch's name."""
        return self.launch.name

    @property
    def pid(self) -> int:
        """Of the root of its processes."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Waits for the model, runs a first round and halts the process.

        Raises:
            LinkerError: It ended instead.
        """
        self._read()
        num_streams, prompt_tokens, answer_tokens = _WARM_UP
        self._ask(streams_of(num_streams, prompt_tokens=prompt_tokens, seed=0), answer_tokens)
        process_tree.pause(self.pid)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the process run, and warms it up after its halt."""
        process_tree.resume(self.pid)
        try:
            self._ask(streams_of(1, prompt_tokens=4, seed=0), 4)
            yield
        finally:
            process_tree.pause(self.pid)

    def run(self, streams: Sequence[Stream], *, max_tokens: int) -> Round:
        """Runs streams at once, while the process is awake.

        Raises:
            LinkerError: The process ended, or gave another number of tokens.
        """
        answer = self._ask(streams, max_tokens)
        memory = process_tree.memory_of(self.pid)
        self.peak = max(self.peak, memory, key=lambda each: each.anonymous_bytes)
        found = Round(
            seconds=answer["seconds"],
            streams=answer["streams"],
            num_tokens=sum(map(len, answer["streams"])),
        )
        if found.num_tokens != max_tokens * len(streams):
            raise LinkerError(
                f"{self.name} gave {found.num_tokens} tokens instead of "
                f"{max_tokens * len(streams)}: it cannot be compared."
            )
        return found

    def _ask(self, streams: Sequence[Stream], max_tokens: int) -> dict[str, Any]:
        asked = {"streams": [stream._asdict() for stream in streams], "max_tokens": max_tokens}
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write((json.dumps(asked) + "\n").encode())
            stdin.flush()
        except BrokenPipeError:
            pass  # its last words are read below
        return self._read()

    def _read(self) -> dict[str, Any]:
        stdout: IO[bytes] | None = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise LinkerError(f"{self.name} ended. {_last_words(self._log)} Command: {self.launch}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def running(launches: Sequence[Launch]) -> Iterator[list[Contender]]:
    """Starts engines one after another and ends them afterwards; each is halted when it is ready.

    Raises:
        LinkerError: One ended before it was ready.
    """
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = []
        for number, launch in enumerate(launches):
            print(f"starting {launch.name}: {launch}", file=sys.stderr)
            log = logs / f"{number}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    launch.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    env=launch.full_environment(),
                )
            stack.enter_context(process)
            stack.enter_context(process_tree.ended(process))
            contender = Contender(launch, process, log)
            contender.wait_until_ready()
            contenders.append(contender)
        yield contenders


def streams_of(
    count: int, *, prompt_tokens: int, seed: int, models: Sequence[int] = (0,)
) -> list[Stream]:
    """Returns streams with prompts of their own, over the models in turn.

    Args:
        count: How many.
        prompt_tokens: Of each; random words of the synthetic vocabulary.
        seed: Another one gives other prompts: no engine can have seen them.
        models: Indices of the engine's models.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(*_PROMPT_IDS, (count, prompt_tokens), generator=generator).tolist()
    return [Stream(model, prompt) for model, prompt in zip(itertools.cycle(models), prompts)]


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-_COMPLAINT_CHARACTERS:].strip()
