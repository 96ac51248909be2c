"""One server after the other over one state directory, and one fault after the other."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx

from tests.server.crash.faults import SERVER, Fault
from tests.server.crash.servers import Nursery, ServerProcess
from tests.server.crash.soundness import check_sound
from tests.server.crash.sources import Request, Sources

BUDGET_BYTES = 1 << 30
_SETTINGS = """
engine: {{kv_cache_tokens: 2048, memory_budget: 1G}}
hub: {{endpoint: "{endpoint}", keep_free_bytes: 0}}
"""

Points = Counter[tuple[str, str]]


class _Seen(NamedTuple):
    """What must be the same whatever went wrong before."""

    answer: str
    unique_bytes: int
    files: dict[str, str]  # of the delta folders: path -> digest


class Trial:
    """A state directory with a ready donor `base`, and the server of the moment.

    Args:
        nursery: Where servers come from.
        folder: Empty; holds the state directory and what is onboarded.
        sources: What to onboard.
    """

    def __init__(self, nursery: Nursery, folder: Path, sources: Sources) -> None:
        self._nursery = nursery
        self.state = folder / "state"
        self._settings = folder / "settings.yaml"
        self._settings.write_text(_SETTINGS.format(endpoint=sources.hub.endpoint))
        self.sources = sources
        self.server = self._start()
        if not self.server.get("/models")["data"]:
            response = self.server.onboard("base", sources.root / "base")
            assert response.status_code == 201, response.text
        self.server.until_settled()
        self.base_answer = self.server.answer("base")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.server.stop()
            assert not self._nursery.children(), "a worker outlived its server"
        else:
            assert error is not None
            error.add_note(self.server.log()[-6000:])
            with contextlib.suppress(ProcessLookupError, EOFError, AssertionError):
                self.server.kill()

    def points(self, way: str) -> Points:
        """Returns which points every undisturbed onboarding calls, and how often.

        The first one in a state directory's life makes folders that later ones find.
        """
        return self._called(way) & self._called(way)

    def _called(self, way: str) -> Points:
        request = self.sources.next(way)
        self.server.control.arm(None)
        response = self._onboard(request)
        assert response.status_code == 201, response.text
        self._until_quiet()
        found = self.server.control.disarm()
        self._delete(request)
        return found

    def suffer(self, way: str, fault: Fault) -> None:
        """Onboards something new while a fault happens, and asserts that nothing is amiss then.

        A killed server is started again, and has to finish or to give up what it had begun.
        """
        request = self.sources.next(way)
        self.server.control.arm(fault)
        kills_server = fault.role == SERVER and fault.action == "kill"
        if kills_server:
            with contextlib.suppress(httpx.TransportError):
                self._onboard(request)
            assert self.server.wait() == -signal.SIGKILL
        else:
            self._onboard(request)
            self._until_quiet()
        called = self.server.control.disarm()
        assert called[fault.role, fault.point] >= fault.number, f"{fault} was not reached"
        if kills_server:
            self.restart()
        self.check(request)

    def lose_worker(self, way: str, roles: Sequence[str], *, after_s: float) -> bool:
        """Onboards something new and kills the first process of these roles after some time.

        Returns:
            Whether there was one; the job may have ended before.
        """
        request = self.sources.next(way)
        job = self._begin(request)
        time.sleep(after_s)
        found: list[int] = []
        while not found and self.server.is_live(job):
            found = [pid for pid, role in self._nursery.children().items() if role in roles]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.check(request)
        return bool(found)

    def lose_servers(self, way: str, *, after_s: Sequence[float]) -> None:
        """Onboards something new and kills the server, and then maybe the next ones."""
        request = self.sources.next(way)
        self._begin(request)
        for delay_s in after_s:
            time.sleep(delay_s)
            self.server.kill()
            self.restart()
        self.check(request)

    def check(self, request: Request) -> None:
        """Asserts that all is sound, and that the model is, or can be, what it would have been."""
        rows = check_sound(self.server, self.state, budget_bytes=BUDGET_BYTES)
        self.server.until(self._is_alone, what="the end of all workers but the engine")
        assert rows["base"].state == "ready"
        assert self.server.answer("base") == self.base_answer
        row = rows.get(request.name)
        seen = None if row is None or row.state == "failed" else self._look(request)
        if seen is not None:
            self._delete(request)
        response = self._onboard(request)
        assert response.status_code == 201, response.text
        anew = self._look(request)
        assert seen in (None, anew)
        self._delete(request)
        rows = check_sound(self.server, self.state, budget_bytes=BUDGET_BYTES)
        assert set(rows) == {"base"}

    def restart(self) -> None:
        """Starts the next server where the last one was killed; nothing is left of that one's."""
        self.server.until(lambda: not self._nursery.children(), what="the end of all workers")
        self.server = self._start()

    def _is_alone(self) -> bool:
        return sorted(self._nursery.children().values()) == ["engine", SERVER]

    def _start(self) -> ServerProcess:
        options = ("--config", str(self._settings), "--models-root", str(self.sources.root))
        return ServerProcess.start(self._nursery, self.state, *options)

    def _onboard(self, request: Request) -> httpx.Response:
        return self.server.onboard(request.name, request.source, donor="base", **request.options)

    def _begin(self, request: Request) -> str:
        """Onboards without waiting for the end; returns the job's id."""
        response = self.server.onboard(
            request.name, request.source, wait=False, donor="base", **request.options
        )
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def _delete(self, request: Request) -> None:
        response = self.server.client.delete(f"/models/{request.name}")
        assert response.status_code == 200, response.text

    def _look(self, request: Request) -> _Seen:
        deltas = self.state / "deltas"
        return _Seen(
            answer=self.server.answer(request.name),
            unique_bytes=self.server.get(f"/models/{request.name}")["bytes"]["unique"],
            files={
                str(path.relative_to(deltas)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in deltas.rglob("*")
                if path.is_file()
            },
        )

    def _until_quiet(self) -> None:
        """Waits until what the job still did after its end is done, and the engine is there."""
        self.server.until_settled()
