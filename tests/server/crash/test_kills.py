"""Processes killed at moments that nobody chose."""

from __future__ import annotations

import random
import time

import pytest

from tests.server.crash.sources import WAYS
from tests.server.crash.trials import Trial

SEED = 20


def test_jobs_whose_worker_is_killed_at_random_leave_nothing_behind(trial: Trial) -> None:
    kill_workers(trial, random.Random(SEED), number=6)


def test_servers_killed_at_random_come_back_whole(trial: Trial) -> None:
    kill_servers(trial, random.Random(SEED), number=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_killed_workers_leave_nothing_behind(trial: Trial) -> None:
    kill_workers(trial, random.Random(SEED + 1), number=200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_killed_servers_come_back_whole(trial: Trial) -> None:
    kill_servers(trial, random.Random(SEED + 1), number=20)


def kill_workers(trial: Trial, chance: random.Random, *, number: int) -> None:
    """Kills workers, or now and then the engine, until so many have died."""
    longest_s = undisturbed_s(trial)
    killed = 0
    while killed < number:
        way, delay_s = chance.choice(WAYS), chance.uniform(0.0, longest_s)
        roles = ("engine",) if chance.random() < 1 / 8 else ("scanner", "tuner", "encoder", "hub")
        killed += trial.lose_worker(way, roles, after_s=delay_s)


def kill_servers(trial: Trial, chance: random.Random, *, number: int) -> None:
    """Kills servers, every third one while it recovers from the last kill."""
    longest_s = undisturbed_s(trial)
    for count in range(number):
        delays = [chance.uniform(0.0, longest_s)]
        if count % 3 == 2:
            delays.append(chance.uniform(0.0, longest_s))
        trial.lose_servers(chance.choice(WAYS), after_s=delays)


def undisturbed_s(trial: Trial) -> float:
    """Returns how long an onboarding with every kind of worker takes here."""
    started = time.monotonic()
    trial.points("budget")
    return time.monotonic() - started
