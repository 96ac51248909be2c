"""A whole server on a loopback port, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn

from server.bridge.supervisor import SupervisionLimits
from server.cli.serve import listen
from server.cli.serve_options import startup_requests
from server.gateway.app import create_app
from server.gateway.connection import server_config
from server.gateway.peers import Peers
from server.gateway.services import Services, build_services
from server.onboarding.encoder import ENCODE_COMMAND
from server.residency.catalog import ServedModel
from server.settings import Settings
from server.studies.worker import STUDY_COMMAND
from tests.server.cached_scan import CACHED_SCAN
from tests.server.fake_engine import FAKE_ENGINE
from tests.server.fake_tuner import FAKE_TUNER

DEADLINE_S = 60.0
_Result = TypeVar("_Result")


class LiveServer:
    """A running server; `client` talks to it."""

    def __init__(
        self, services: Services, loop: asyncio.AbstractEventLoop, port: int, peers: Peers
    ) -> None:
        self.services = services
        self.peers = peers
        self.loop = loop
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)

    def call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)

    def served(self, name: str) -> ServedModel:
        """Returns a resident model."""
        found = self.services.catalog.get(name)
        assert found is not None
        return found

    def chat(self, model: str, text: str = "hi", **more: Any) -> httpx.Response:
        """Asks for a chat answer."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, model: str, prompt: object, **more: Any) -> httpx.Response:
        """Asks for a completion."""
        return self.client.post("/v1/completions", json={"model": model, "prompt": prompt, **more})

    def onboard(self, name: str, source: Path, *, wait: bool = True, **more: Any) -> httpx.Response:
        """Onboards a model."""
        body = {"name": name, "source": str(source), **more}
        return self.client.post("/models", params={"wait": wait}, json=body)

    def metric(self, line: str) -> float:
        """Returns a sample's value; `line` is its name with labels as exposed."""
        for sample in self.client.get("/metrics").text.splitlines():
            if sample.startswith(line + " "):
                return float(sample.rsplit(" ", 1)[1])
        raise AssertionError(f"no sample {line}")

    def until(self, condition: Callable[[], bool]) -> None:
        """Polls until the condition holds; fails after the deadline."""
        give_up_at = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < give_up_at, "the condition did not come true"
            time.sleep(0.02)

    def until_ready(self) -> None:
        """Waits for /ready."""
        self.until(lambda: self.client.get("/ready").status_code == 200)


@contextmanager
def live_server(  # noqa: PLR0913 - the knobs of a fixture
    state: Path,
    *,
    port: int = 0,
    models: Mapping[str, Path] | None = None,
    root: Path | None = None,
    engine_command: Sequence[str] | None = FAKE_ENGINE,
    limits: SupervisionLimits | None = None,
    tune_command: Sequence[str] = FAKE_TUNER,
    encode_command: Sequence[str] = ENCODE_COMMAND,
    study_command: Sequence[str] = STUDY_COMMAND,
    settings: Mapping[str, Mapping[str, object]] | None = None,
) -> Iterator[LiveServer]:
    """Runs a server until the block ends. Without `engine_command` it is the real one in full.

    It listens on `port`, or on a free one. Plans are made with thresholds unless `settings` or a
    request say otherwise; studies are made only if `settings` enable them, and at once.
    """
    tree: dict[str, dict[str, object]] = {
        "storage": {"state": state},
        "models": {
            "root": root,
            "serve": [{"name": n, "path": p} for n, p in (models or {}).items()],
        },
        # Most tests are about something else: a tuner for every variant would take minutes.
        "sharing": {"policy": "thresholds"},
        "analysis": {"enabled": False, "settle_s": 0.0},
    }
    for section, values in (settings or {}).items():
        tree[section] = {**tree.get(section, {}), **values}
    config = Settings.model_validate(tree)
    commands: dict[str, Sequence[str]] = {"study_command": study_command}
    if engine_command is not None:
        commands |= {
            "engine_command": engine_command,
            "scan_command": CACHED_SCAN,
            "tune_command": tune_command,
            "encode_command": encode_command,
        }
    host = _Host(config, port=port, commands=commands, limits=limits)
    host.start()
    live = host.started()
    try:
        yield live
    finally:
        live.client.close()
        host.stop()


class _Host(threading.Thread):
    """The thread, and in it the event loop, of one server."""

    def __init__(
        self,
        settings: Settings,
        *,
        port: int,
        commands: Mapping[str, Sequence[str]],
        limits: SupervisionLimits | None,
    ) -> None:
        super().__init__(name="live-server")
        self._settings = settings
        self._limits = limits
        self._commands = commands
        self._listener = listen("127.0.0.1", port)
        self._begun = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._live: LiveServer | None = None
        self._failure: BaseException | None = None

    def started(self) -> LiveServer:
        assert self._begun.wait(DEADLINE_S)
        if self._failure is not None:
            raise self._failure
        assert self._live is not None
        return self._live

    def stop(self) -> None:
        assert self._live is not None
        assert self._stopping is not None
        self._live.loop.call_soon_threadsafe(self._stopping.set)
        self.join(DEADLINE_S)
        if self._failure is not None:
            raise self._failure

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self._failure = error
        finally:
            self._begun.set()

    async def _serve(self) -> None:
        services = build_services(self._settings, limits=self._limits, **self._commands)
        app, http = create_app(services), self._settings.http
        serving = server_config(app, http, on_refused=services.metrics.rejected)
        server = uvicorn.Server(serving)
        self._stopping = asyncio.Event()
        await services.start(startup_requests(self._settings))
        port = self._listener.getsockname()[1]
        self._live = LiveServer(services, asyncio.get_running_loop(), port, serving.peers)
        listening = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        self._begun.set()
        await self._stopping.wait()
        server.should_exit = True
        await services.stop()
        await listening
