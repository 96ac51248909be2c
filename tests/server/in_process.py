"""A whole server in one process and one event loop, real in all but its process boundaries.

The engine is the real one, in a thread behind the real protocol, and checks itself after every
step; workers run in threads; requests go to the application without a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import httpx
import pytest

import linker_core.residency.worker
import linker_core.sharing.worker
import tests.server.fake_tuner
from linker_core.config import EngineConfig
from linker_core.engine.engine import Engine
from linker_core.engine.messages import Event, LoadModel
from linker_core.engine.resident_model import ResidentModel
from linker_core.engine.worker import serve
from linker_core.errors import EngineFailureError, from_record
from server.bridge.supervisor import SupervisionLimits
from server.gateway.app import create_app
from server.gateway.services import Services, build_services
from server.onboarding.processes import OnStageProgress
from server.settings import Settings

KILLED = -9
_LIMITS = SupervisionLimits(poll_s=0.02, stall_s=60.0, backoff_s=0.0, max_crashes=1000)
_WORKERS: Mapping[str, Callable[..., Any]] = {
    "scan": linker_core.sharing.worker.main,
    "encode": linker_core.residency.worker.main,
    "tune": tests.server.fake_tuner.main,
}
_streams = threading.Lock()  # guards sys.stdin and sys.stdout while a worker speaks through them


class Faults:
    """What is to go wrong next, once each."""

    def __init__(self) -> None:
        self.load_after: int | None = None  # moves of the next load until memory runs out
        self.worker: str | None = None  # the kind of worker that dies next

    def take_worker(self, kind: str) -> bool:
        """Whether a worker is to die."""
        dies = self.worker == kind
        if dies:
            self.worker = None
        return dies


class CheckedEngine(Engine):
    """The engine, which asserts after every step that its bookkeeping is right.

    Args:
        config: The engine's.
        faults: Asked during loads.
    """

    def __init__(self, config: EngineConfig, faults: Faults) -> None:
        super().__init__(config)
        self._faults = faults
        self._load = self.residents.load
        self.residents.load = self._faulty_load  # type: ignore[method-assign]

    def step(self) -> list[Event]:
        events = super().step()
        self.residents.check_integrity()
        pool = self.residents.pool
        assert self.storage_bytes() == pool.ledger.resident_bytes()
        assert pool.budget.free_bytes() >= 0
        return events

    def storage_bytes(self) -> int:
        """Returns the bytes of all storages that resident models reach, each counted once."""
        storages: dict[int, int] = {}
        for variant in self.residents.pool.models():
            for stored in variant.tensors.values():
                for tensor in (*stored.tensors, *stored.base.tensors):
                    storage = tensor.untyped_storage()
                    if tensor.nbytes:
                        assert storage.nbytes() > 0, "an alias to a freed storage"
                        storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _faulty_load(self, message: LoadModel) -> Generator[int | None, None, ResidentModel]:
        loading = self._load(message)
        try:
            while True:
                try:
                    moved = next(loading)
                except StopIteration as end:
                    served: ResidentModel = end.value
                    return served
                if self._faults.load_after == 0:
                    self._faults.load_after = None
                    loading.throw(MemoryError("injected"))
                if self._faults.load_after is not None:
                    self._faults.load_after -= 1
                yield moved
        finally:
            loading.close()


class EngineThread:
    """An engine as the supervisor meets its process."""

    def __init__(self, config: EngineConfig, faults: Faults) -> None:
        self._ours, theirs = socket.socketpair()
        self.connection: Connection = Connection(self._ours.detach())
        self._theirs = Connection(theirs.detach())
        self.engine = CheckedEngine(config, faults)
        self.failure: BaseException | None = None
        self._beats = 0
        self._killed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return 0

    def heartbeat(self) -> int:
        return self._beats

    def beat(self) -> None:
        self._beats += 1
        if self._killed:
            raise EOFError

    async def wait(self) -> int:
        await asyncio.to_thread(self._thread.join)
        return KILLED if self._killed else 0

    def kill(self) -> None:
        self._killed = True

    async def close(self, *, grace_s: float = 0.0) -> None:
        del grace_s
        self.kill()
        await self.wait()

    def _run(self) -> None:
        try:
            serve(self.engine, self._theirs, self)  # type: ignore[arg-type]
        except (EOFError, ConnectionError):
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.failure = error
        finally:
            self.engine.close()
            self._theirs.close()


class Server:
    """One life of a server over a state directory.

    Args:
        services: Its parts, started.
        engines: Every engine it has had.
    """

    def __init__(self, services: Services, engines: list[EngineThread], faults: Faults) -> None:
        self.services = services
        self.faults = faults
        self._engines = engines
        transport = httpx.ASGITransport(app=create_app(services))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    @classmethod
    async def start(cls, settings: Settings) -> Self:
        """Starts a server; its workers and engines are threads of this process."""
        engines: list[EngineThread] = []
        faults = Faults()

        async def spawn(_command: Sequence[str], config: EngineConfig) -> EngineThread:
            engines.append(EngineThread(config, faults))
            return engines[-1]

        async def run_worker(
            command: Sequence[str],
            *,
            request: Mapping[str, Any] | None = None,
            busy: Callable[[], bool] | None = None,
            on_progress: OnStageProgress,
        ) -> Mapping[str, Any]:
            del busy, on_progress
            if faults.take_worker(command[0]):
                raise EngineFailureError("injected")
            return await _run_worker(command, request)

        for name in ("scanner", "encoder", "tuner"):
            vars(sys.modules[f"server.onboarding.{name}"])["run_worker"] = run_worker
        vars(sys.modules["server.bridge.supervisor"])["EngineProcess"] = SimpleNamespace(
            spawn=spawn
        )
        services = build_services(
            settings,
            scan_command=("scan",),
            encode_command=("encode",),
            tune_command=("tune",),
            limits=_LIMITS,
        )
        await services.start([])
        return cls(services, engines, faults)

    @property
    def engine(self) -> CheckedEngine:
        """The engine of the moment."""
        return self._engines[-1].engine

    async def stop(self) -> None:
        """Ends the server as its operator would."""
        await self.client.aclose()
        await self.services.stop()
        for engine in self._engines:
            assert engine.failure is None, engine.failure

    def check_engines(self) -> None:
        """Raises what an engine's own checks have found."""
        for engine in self._engines:
            if engine.failure is not None:
                raise engine.failure
        for task in self.services.tasks:
            if task.done():
                task.result()

    async def crash(self, copy: Path) -> None:
        """Leaves in `copy` what a killed server would leave of its state, and is gone."""
        shutil.copytree(self.services.settings.state_directory(), copy)
        await self.stop()

    async def post(self, path: str, body: Mapping[str, Any], **params: Any) -> httpx.Response:
        """Posts a JSON body."""
        return await self.client.post(path, json=body, params=params, timeout=60.0)


@contextlib.contextmanager
def real_processes_after() -> Iterator[None]:
    """Gives the modules that `Server.start` changed their own back at the end."""
    names = [("scanner", "run_worker"), ("encoder", "run_worker"), ("tuner", "run_worker")]
    places = [(f"server.onboarding.{module}", name) for module, name in names]
    places.append(("server.bridge.supervisor", "EngineProcess"))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in places:
            patch.setattr(f"{module}.{name}", vars(sys.modules[module])[name])
        yield


async def _run_worker(
    command: Sequence[str], request: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Returns a worker's result. A cancelled wait ends when the worker has ended."""
    work = asyncio.ensure_future(asyncio.to_thread(_speak, command, request))
    try:
        said = await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
    last = json.loads(said.splitlines()[-1])
    if "error" in last:
        raise from_record(last["error"])
    result: Mapping[str, Any] = last["result"]
    return result


def _speak(command: Sequence[str], request: Mapping[str, Any] | None) -> str:
    kind, *arguments = command
    said = io.StringIO()
    with _streams, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "stdin", io.StringIO("" if request is None else f"{json.dumps(request)}\n")
        )
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main = _WORKERS[kind]
            _ = main(arguments) if kind == "scan" else main()
    return said.getvalue()
