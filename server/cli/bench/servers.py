"""Servers that compete over HTTP: how each is started, and one of them while it runs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import httpx

from linker_core.errors import LinkerError
from server.cli.bench import peers, process_tree
from server.cli.bench.contenders import Launch
from server.cli.bench.http_streams import Completion, complete
from server.cli.bench.process_tree import TreeMemory
from server.cli.bench.synthetic import words

_HOST: Final = "127.0.0.1"
_PORT: Final = "PORT"  # stands for the port until one is chosen
_READY_TIMEOUT_S: Final = 600
_POLL_S: Final = 0.2
_SAMPLE_S: Final = 0.2
_WARM_UP_TOKENS: Final = 4
_COMPLAINT_CHARACTERS: Final = 600
_SPARE_SHARE: Final = 0.15  # of the machine's memory; the system ends processes when it is out
_COUNTED: Final = {"ignore_eos": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLaunch:
    """How a server is started, and what it expects.

    Attributes:
        launch: Its command, with `PORT` where its port belongs.
        models: Their names over HTTP.
        ready: A path that is answered with success once models are served.
        extra: Fields of a request that only this server takes.
        spins: Whether it keeps a core busy without requests, so that it is halted meanwhile.
    """

    launch: Launch
    models: Sequence[str]
    ready: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    spins: bool = True


def linker(models: Sequence[Path], state: Path) -> ServerLaunch:
    """Returns `linker serve` with what is byte-equal to the first model aliased.

    Its studies of families, which it makes when nobody asks for anything, are off: they would begin
    in the midst of what is measured.
    """
    named = [f"{path.name}={path}" for path in models]
    config = state / "bench.yaml"
    config.write_text("analysis: {enabled: false}\n", encoding="utf-8")
    command = (
        *(sys.executable, "-P", "-m", "server.cli.main", "serve", "--strict"),
        *("--config", str(config), "--state", str(state)),
        *("--models-root", str(models[0].parent)),
        *("--port", _PORT, "--policy", "exact", "--model", *named),
    )
    return ServerLaunch(
        launch=Launch(name="linker", command=command, ours=True),
        models=[path.name for path in models],
        ready="/ready",
        extra=_COUNTED,
        spins=False,
    )


def transformers(
    environments: Path, models: Sequence[Path], *, dtype: str, flags: Sequence[str] = ()
) -> ServerLaunch:
    """Returns `transformers serve` with continuous batching; it loads models as they are asked."""
    program = peers.executable(environments, "transformers", "transformers")
    command = (
        *(program, "serve", "--continuous-batching", "--dtype", dtype, "--device", "cpu"),
        *("--host", _HOST, "--port", _PORT, *flags),
    )
    name = " ".join(("transformers serve", dtype, *flags))
    return ServerLaunch(
        launch=Launch(name=name, command=command, environment=peers.QUIET),
        models=[str(path) for path in models],
        ready="/health",
    )


def vllm(environments: Path, model: Path, *, dtype: str, cores: str | None = None) -> ServerLaunch:
    """Returns vLLM's server of one model."""
    # What `vllm serve` runs; that command itself looks for a package of another name.
    program = peers.executable(environments, "vllm", "python")
    command = (
        *(program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--dtype", dtype, "--max-model-len", str(peers.MAX_MODEL_LEN)),
        *("--host", _HOST, "--port", _PORT),
    )
    environment = peers.vllm_environment(environments, cores=cores)
    return ServerLaunch(
        launch=Launch(
            name=f"vllm serve {dtype}",
            command=command,
            environment=environment,
            programs=Path(program).parent,
        ),
        models=[str(model)],
        ready="/health",
        extra=_COUNTED,
    )


class Server:
    """A server that answers.

    Attributes:
        kind: How it was started.
        peak: The most its processes held.
        url: Where it listens.
    """

    def __init__(self, kind: ServerLaunch, url: str, pid: int) -> None:
        self.kind = kind
        self.peak = TreeMemory(pss_bytes=0, anonymous_bytes=0)
        self.url = url
        self._pid = pid

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the server run where it is halted otherwise."""
        if self.kind.spins:
            process_tree.resume(self._pid)
        try:
            yield
        finally:
            if self.kind.spins:
                process_tree.pause(self._pid)

    def requests(
        self, models: Sequence[int], *, prompt_tokens: int, max_tokens: int, seed: int
    ) -> list[Completion]:
        """Returns a request for each of the models, which may repeat, with prompts of their own."""
        return [
            Completion(
                url=self.url,
                model=self.kind.models[model],
                prompt=words(prompt_tokens, seed=1000 * seed + number),
                max_tokens=max_tokens,
                extra=self.kind.extra,
            )
            for number, model in enumerate(models)
        ]

    def warm_up(self) -> None:
        """Asks every model in turn, so that each is loaded."""
        models = range(len(self.kind.models))
        asked = self.requests(models, prompt_tokens=4, max_tokens=_WARM_UP_TOKENS, seed=0)
        with self.awake():
            for request in asked:
                complete([request])

    def watch(self, done: threading.Event) -> None:
        """Takes the peak until `done`; ends the server before the system would end others."""
        while not done.wait(_SAMPLE_S):
            memory = process_tree.memory_of(self._pid)
            self.peak = max(self.peak, memory, key=lambda each: each.anonymous_bytes)
            if process_tree.available_share() < _SPARE_SHARE:
                print(f"{self.kind.launch.name} takes all memory and is ended", file=sys.stderr)
                process_tree.kill(self._pid)
                return


@contextlib.contextmanager
def serving(kind: ServerLaunch, *, watched: bool = True) -> Iterator[Server]:
    """Starts a server and yields it, halted if it spins, once it is ready.

    Args:
        kind: How it is started.
        watched: Whether its memory is looked at all the time, which makes its page faults wait.

    Raises:
        LinkerError: It ended, or is never ready.
    """
    with socket.create_server((_HOST, 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(port) if part == _PORT else part for part in kind.launch.command]
    launch = replace(kind.launch, command=command)
    print(f"starting {launch.name}: {launch}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=launch.full_environment(),
            )
        stack.enter_context(process_tree.ended(process))
        server = Server(kind, f"http://{_HOST}:{port}", process.pid)
        if watched:
            stack.enter_context(_watching(server))
        _wait_until_ready(f"{server.url}{kind.ready}", launch, process, log)
        if kind.spins:
            process_tree.pause(process.pid)
        yield server


@contextlib.contextmanager
def _watching(server: Server) -> Iterator[None]:
    done = threading.Event()
    watcher = threading.Thread(target=server.watch, args=(done,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _wait_until_ready(
    url: str, launch: Launch, process: subprocess.Popen[bytes], log: Path
) -> None:
    give_up_at = time.monotonic() + _READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_at:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).is_success:
                return
        time.sleep(_POLL_S)
    complaint = log.read_text(errors="replace")[-_COMPLAINT_CHARACTERS:].strip()
    raise LinkerError(f"{launch.name} is not ready. {complaint} Command: {launch}")
