"""How many cores a container lets its processes have, which OpenMP does not ask."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def limited_threads(*, root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Returns how many threads the CPU quota lets run at once, at least 1.

    More of them would be stopped together, in the middle of a step, until the next period.

    Args:
        root: Where cgroups (v2) are mounted.
        membership: The process's own, as in /proc/PID/cgroup.

    Returns:
        None where there are no more cores than that: OpenMP counts those itself.
    """
    quotas = [quota for group in _groups(root, membership) if (quota := _quota(group)) is not None]
    num_threads = max(1, int(min(quotas, default=float(os.cpu_count() or 1))))
    return num_threads if num_threads < len(os.sched_getaffinity(0)) else None


def _groups(root: Path, membership: Path) -> list[Path]:
    """Returns the process's cgroup and all that hold it; each limits what is in it."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    named = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    own = [root / name for name in named]
    return [group for path in own for group in (path, *path.parents) if group.is_relative_to(root)]


def _quota(group: Path) -> float | None:
    try:
        allowed_us, period_us = (group / "cpu.max").read_text().split()
    except OSError:
        return None  # the root has none, nor has a group without the CPU controller
    return None if allowed_us == "max" else int(allowed_us) / int(period_us)
