"""Every step of onboarding gone wrong once: processes killed, disks full or broken.

The points are enumerated, not listed: an undisturbed onboarding says which there are, and how often
each is called.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.crash.faults import SERVER, Fault
from tests.server.crash.sources import WAYS
from tests.server.crash.trials import Points, Trial

WORKERS = ("engine", "scanner", "tuner", "encoder", "hub")
FALLIBLE = (
    "mkdir", "create", "posix_fallocate", "pwrite", "write", "fsync", "rename", "before commit",
)  # fmt: skip
ALL = 1 << 30


def test_server_killed_at_any_step_finishes_or_gives_up_what_it_had_begun(trial: Trial) -> None:
    points = trial.points("budget")
    assert points[SERVER, "before commit"] > 3
    assert points[SERVER, "rename"] == 1
    for fault in faults(points, SERVER, most=2):
        trial.suffer("budget", fault)


def test_worker_killed_at_any_step_leaves_nothing_behind(trial: Trial) -> None:
    points = trial.points("budget")
    assert {role for role, _ in points} == {SERVER, *WORKERS} - {"hub"}
    assert points["encoder", "fsync"] > 3
    for fault in faults(points, *WORKERS, most=1):
        trial.suffer("budget", fault)


@pytest.mark.parametrize("way", ["import", "adapter", "hub"])
def test_whatever_is_fetched_or_converted_survives_kills_meanwhile(trial: Trial, way: str) -> None:
    points = trial.points(way)
    own = {place: called for place, called in points.items() if place[1] != "start"}
    changes = Points({place: called for place, called in own.items() if "commit" not in place[1]})
    for fault in faults(changes, SERVER, "encoder", "hub", most=1):
        trial.suffer(way, fault)


def test_full_disk_at_any_step_is_survived_without_a_restart(trial: Trial) -> None:
    points = trial.points("budget")
    for fault in faults(points, SERVER, "encoder", most=1, action="enospc", only=FALLIBLE):
        trial.suffer("budget", fault)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS)
def test_every_call_of_every_point_may_be_the_last_of_its_process(trial: Trial, way: str) -> None:
    for fault in faults(trial.points(way), SERVER, *WORKERS, most=ALL):
        trial.suffer(way, fault)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("action", ["enospc", "eio"])
@pytest.mark.parametrize("way", WAYS)
def test_every_call_of_every_point_may_fail(trial: Trial, way: str, action: str) -> None:
    roles = (SERVER, *WORKERS)
    for fault in faults(trial.points(way), *roles, most=ALL, action=action, only=FALLIBLE):
        trial.suffer(way, fault)


def faults(
    points: Points, *roles: str, most: int, action: str = "kill", only: tuple[str, ...] = ()
) -> Iterator[Fault]:
    """Yields faults at the points of some roles, at no more than so many calls of each."""
    for (role, point), counted in sorted(points.items()):
        called = counted
        if role in roles and (not only or point in only):
            if (role, point) == ("hub", "pwrite"):  # a chunk of whatever size has arrived
                called = max(1, called // 2)
            for number in chosen(called, most):
                yield Fault(role=role, point=point, number=number, action=action)


def chosen(called: int, most: int) -> list[int]:
    """Returns which of so many calls go wrong: spread evenly, the last one among them."""
    if called <= most:
        return list(range(1, called + 1))
    return sorted({round((i + 1) * called / most) for i in range(most)})
