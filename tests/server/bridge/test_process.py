from __future__ import annotations

import asyncio
import os
import signal
import sys

import psutil
import pytest

from linker_core.config import UNUSABLE_DEVICE_STATUS, EngineConfig
from server.bridge.process import EngineProcess
from server.bridge.supervisor import EngineState, EngineSupervisor, SupervisionLimits
from tests.server.fake_engine import MUTE_ENGINE

WORKER = (sys.executable, "-m", "linker_core.engine.worker")


async def _spawn_and_signal() -> int:
    engine = await EngineProcess.spawn(MUTE_ENGINE, EngineConfig())
    # It handles nothing itself, and it has just been started.
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, number)
    psutil.Process(engine.pid).suspend()  # sent after them, so seen after them
    try:
        async with asyncio.timeout(30):
            while psutil.Process(engine.pid).status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(0.01)
    finally:
        await engine.close()
    return await engine.wait()


def test_stop_signals_do_not_reach_an_engine_from_its_first_moment() -> None:
    assert asyncio.run(_spawn_and_signal()) == -signal.SIGKILL


async def _spawn_two() -> None:
    engines = await asyncio.gather(
        *(EngineProcess.spawn(MUTE_ENGINE, EngineConfig()) for _ in range(2))
    )
    for engine in engines:
        await engine.close()


def test_spawning_leaves_the_servers_own_signals_alone() -> None:
    asyncio.run(_spawn_two())
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not blocked & {signal.SIGINT, signal.SIGTERM}


async def _supervise(command: tuple[str, ...], config: EngineConfig) -> list[EngineState]:
    async def on_running(_client: object) -> None:
        pass

    downs: list[EngineState] = []
    supervisor = EngineSupervisor(
        config,
        on_running=on_running,
        on_down=lambda: downs.append(supervisor.state),
        command=command,
    )
    async with asyncio.timeout(120):
        await supervisor.run()
    assert supervisor.given_up.is_set()
    return downs


def test_engine_without_its_device_is_given_up_at_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    # A device that no machine has, so that the test holds on all of them.
    config = EngineConfig(device="cuda:4096")  # type: ignore[arg-type]
    assert len(asyncio.run(_supervise(WORKER, config))) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "cuda:4096 cannot be used" in lines[0]


def test_engine_that_stands_still_is_seen_within_five_seconds_whenever_it_is_looked_at() -> None:
    limits = SupervisionLimits()
    assert limits.stall_s + 2 * limits.poll_s <= 5.0


def test_only_the_status_of_a_missing_device_ends_the_first_try() -> None:
    command = (sys.executable, "-c", f"raise SystemExit({UNUSABLE_DEVICE_STATUS})")
    assert len(asyncio.run(_supervise(command, EngineConfig()))) == 1
