from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InsufficientCapacityError,
    LinkerError,
    NotReadyError,
    UnsupportedFormatError,
)
from server.onboarding.processes import OnSaid, never_busy, run_worker

PRELUDE = "import json, os, sys, time\ndef say(x): print(json.dumps(x), flush=True)\n"


def run(
    script: str,
    *,
    request: Mapping[str, Any] | None = None,
    busy: Callable[[], bool] = never_busy,
    heard: list[tuple[str, int, int]] | None = None,
    on_said: OnSaid | None = None,
) -> Mapping[str, Any]:
    heard = [] if heard is None else heard
    command = (sys.executable, "-c", PRELUDE + script)
    more: dict[str, Any] = {} if on_said is None else {"on_said": on_said}
    return asyncio.run(
        run_worker(
            command,
            request=request,
            busy=busy,
            on_progress=lambda *s: heard.append(s),
            **more,
        )
    )


def test_result_and_progress_are_handed_on() -> None:
    heard: list[tuple[str, int, int]] = []
    result = run(
        "say({'stage': 'hashing', 'done_bytes': 1, 'total_bytes': 2})\nsay({'result': {'a': 1}})",
        heard=heard,
    )
    assert heard == [("hashing", 1, 2)]
    assert result == {"a": 1}


def test_error_of_the_worker_is_raised_as_it_was() -> None:
    with pytest.raises(UnsupportedFormatError, match="pickle"):
        run("say({'error': {'code': 'unsupported_format', 'message': 'pickle', 'param': None}})")


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("os.kill(os.getpid(), 7)", BadCheckpointError),  # SIGBUS: a mapped file was cut short
        ("os.kill(os.getpid(), 9)", InsufficientCapacityError),  # as the system kills
        ("os.abort()", EngineFailureError),
        ("raise RuntimeError", EngineFailureError),
        ("sys.stdout.write('{\"resu')", EngineFailureError),
        ("pass", EngineFailureError),
    ],
)
def test_death_without_a_result_says_whose_fault_it_was(
    script: str, kind: type[LinkerError]
) -> None:
    with pytest.raises(LinkerError) as caught:
        run(script)
    assert type(caught.value) is kind


def test_system_that_starts_no_process_is_asked_again_later(tmp_path: Path) -> None:
    missing = tmp_path / "worker"  # as a system without processes or descriptors, an OSError
    with pytest.raises(NotReadyError, match="try again") as caught:
        asyncio.run(run_worker((str(missing),), on_progress=lambda *_: None))
    assert str(missing) not in caught.value.message


LINGER = "\ntime.sleep(600)"  # it would not end by itself


@pytest.mark.parametrize(
    "script",
    [
        "print('no json', flush=True)",
        "say(3)",
        "say(['result'])",
        "say({'stage': 'hashing'})",
        "say({'error': {'code': 'bad_checkpoint'}})",
        "say({'error': 'bad'})",
        "say({'news': 1})",
    ],
)
def test_worker_that_is_not_understood_is_ended(script: str) -> None:
    with pytest.raises(EngineFailureError, match="a fault of the server"):
        run(script + LINGER)


def test_what_else_a_worker_says_is_handed_on_before_its_result() -> None:
    said: list[Mapping[str, Any]] = []
    result = run(
        "say({'record': 1})\nsay({'record': 2})\nsay({'result': {'done': True}})",
        on_said=said.append,
    )
    assert said == [{"record": 1}, {"record": 2}]
    assert result == {"done": True}


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(KeyError("name"), EngineFailureError), (BadCheckpointError("moved"), BadCheckpointError)],
)
def test_listener_that_refuses_a_line_ends_the_worker(
    raised: Exception, kind: type[LinkerError]
) -> None:
    def refuse(_message: Mapping[str, Any]) -> None:
        raise raised

    with pytest.raises(kind):
        run("say({'record': 1})" + LINGER, on_said=refuse)


def test_request_of_megabytes_and_result_of_megabytes_cross() -> None:
    request = {"text": "x" * 5_000_000}
    assert run("say({'result': json.loads(sys.stdin.readline())})", request=request) == request


def test_worker_that_dies_on_a_long_request_is_noticed() -> None:
    with pytest.raises(EngineFailureError):
        run("os._exit(3)", request={"text": "x" * 5_000_000})


def test_changes_of_busy_go_in_as_lines_after_the_request() -> None:
    answers = [False, True, True, False, False, True]
    lines = run(
        "say({'result': {'lines': [sys.stdin.readline() for _ in range(4)]}})",
        request={"a": 1},
        busy=lambda: answers.pop(0) if len(answers) > 1 else answers[0],
    )["lines"]
    assert lines == ['{"a": 1}\n', "busy\n", "idle\n", "busy\n"]


def test_worker_that_lingers_after_its_result_is_ended() -> None:
    pid = run("say({'result': {'pid': os.getpid()}})\ntime.sleep(600)")["pid"]
    assert not Path("/proc", str(pid)).exists()


@pytest.mark.parametrize("times", [1, 2])
def test_cancelling_kills_the_worker(times: int) -> None:
    """Also when the second cancellation comes while the first one's end is waited for."""
    pids: list[int] = []

    async def cancel_when_started() -> None:
        started = asyncio.Event()

        def on_progress(_stage: str, done: int, _total: int) -> None:
            pids.append(done)
            started.set()

        script = (
            "say({'stage': 'hashing', 'done_bytes': os.getpid(), 'total_bytes': 1})\n"
            "time.sleep(600)"
        )
        command = (sys.executable, "-c", PRELUDE + script)
        task = asyncio.ensure_future(run_worker(command, on_progress=on_progress))
        await started.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)  # up to its next wait
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        async with asyncio.timeout(30):
            while is_running(pids[0]):  # killed, so it ends
                await asyncio.sleep(0.01)

    asyncio.run(cancel_when_started())


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
