from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from linker_core.errors import BadCheckpointError, UnsupportedFormatError
from server.onboarding.scanner import Scanner, ScanResult

PRELUDE = "import json, os, sys, time\ndef say(x): print(json.dumps(x), flush=True)\n"


def scanner(script: str) -> Scanner:
    return Scanner((sys.executable, "-c", PRELUDE + script))


def run(script: str, progress: list[tuple[str, int, int]] | None = None) -> ScanResult:
    heard = [] if progress is None else progress
    work = scanner(script).run(Path("m"), on_progress=lambda *step: heard.append(step))
    return asyncio.run(work)


def test_result_and_progress_are_handed_on() -> None:
    heard: list[tuple[str, int, int]] = []
    result = run(
        "say({'stage': 'hashing', 'done_bytes': 1, 'total_bytes': 2})\n"
        "say({'result': {'fingerprint': 'f', 'donor_fingerprint': None, 'report': {'a': 1}}})",
        heard,
    )
    assert heard == [("hashing", 1, 2)]
    assert result == ScanResult(fingerprint="f", report={"a": 1})


def test_error_of_the_worker_is_raised_as_it_was() -> None:
    with pytest.raises(UnsupportedFormatError, match="pickle"):
        run("say({'error': {'code': 'unsupported_format', 'message': 'pickle', 'param': None}})")


@pytest.mark.parametrize(
    "script", ["os.kill(os.getpid(), 7)", "sys.stdout.write('{\"resu')", "pass"]
)
def test_death_without_a_result_is_a_bad_checkpoint(script: str) -> None:
    with pytest.raises(BadCheckpointError):
        run(script)


def test_cancelling_kills_the_worker(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    async def cancel_when_started() -> None:
        started = asyncio.Event()
        script = (
            f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
            "say({'stage': 'hashing', 'done_bytes': 0, 'total_bytes': 1})\ntime.sleep(600)"
        )
        work = scanner(script).run(Path("m"), on_progress=lambda *_: started.set())
        task = asyncio.ensure_future(work)
        await started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(cancel_when_started())
    assert not Path("/proc", pid_file.read_text()).exists()
