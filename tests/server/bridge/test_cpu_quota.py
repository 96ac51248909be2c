"""How many threads the engine gets where a container limits its CPU time."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from linker_core.config import EngineConfig
from server.bridge import process
from server.bridge.cpu_quota import limited_threads
from server.bridge.process import EngineProcess


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


def threads(tmp_path: Path, quotas: dict[str, str], *, own: str = "/pod/box") -> int | None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    for group, quota in quotas.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / "cpu.max").write_text(f"{quota}\n")
    membership.write_text(f"4:memory:/other\n0::{own}\n")
    return limited_threads(root=root, membership=membership)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("30000 10000", 3),
        ("1600000 100000", None),
        ("6400000 100000", None),
        ("max 100000", None),
    ],
)
def test_quota_limits_the_threads(tmp_path: Path, quota: str, expected: int | None) -> None:
    assert threads(tmp_path, {"pod/box": quota}) == expected


def test_smallest_quota_of_all_groups_around_counts(tmp_path: Path) -> None:
    quotas = {"pod/box": "max 100000", "pod": "300000 100000", "other": "100000 100000"}
    assert threads(tmp_path, quotas) == 3
    quotas |= {"pod/box": "200000 100000"}
    assert threads(tmp_path, quotas) == 2
    assert threads(tmp_path, {".": "500000 100000"}, own="/") == 5


def test_without_cgroups_nothing_is_limited(tmp_path: Path) -> None:
    assert threads(tmp_path, {}) is None
    assert limited_threads(root=tmp_path, membership=tmp_path / "none") is None


def test_affinity_below_the_quota_is_left_to_openmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    assert threads(tmp_path, {"pod/box": "400000 100000"}) is None
    assert threads(tmp_path, {"pod/box": "100000 100000"}) == 1


async def _told() -> str:
    script = (
        "import os, sys; from multiprocessing.connection import Connection;"
        "Connection(int(sys.argv[2])).send(os.environ.get('OMP_NUM_THREADS'))"
    )
    engine = await EngineProcess.spawn((sys.executable, "-c", script), EngineConfig())
    try:
        return str(await asyncio.to_thread(engine.connection.recv))
    finally:
        await engine.close()


@pytest.mark.parametrize(("set_by_user", "expected"), [(None, "3"), ("7", "7")])
def test_engine_gets_as_many_threads_as_the_quota_unless_told(
    monkeypatch: pytest.MonkeyPatch, set_by_user: str | None, expected: str
) -> None:
    monkeypatch.setattr(process, "limited_threads", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    assert asyncio.run(_told()) == expected
