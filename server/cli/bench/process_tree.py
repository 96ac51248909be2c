"""A process and all that it started: what they hold in memory, how they are halted and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_GONE = (FileNotFoundError, ProcessLookupError)
_HEAD_START_S = 0.3  # of the children on their parent, which may watch whether they move
_GRACE_S = 20.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeMemory:
    """Bytes of a whole tree, pages that several processes hold counted once."""

    pss_bytes: int
    anonymous_bytes: int  # of these, what no file backs


def members(pid: int) -> list[int]:
    """Returns the process and its descendants, parents first."""
    found = [pid]
    for parent in found:  # grows meanwhile
        with contextlib.suppress(*_GONE):
            for task in Path(f"/proc/{parent}/task").iterdir():
                with contextlib.suppress(*_GONE):
                    found += map(int, (task / "children").read_text("ascii").split())
    return found


def memory_of(*pids: int) -> TreeMemory:
    """Returns what the trees hold; what has ended holds nothing."""
    pss = anonymous = 0
    for pid in (member for root in pids for member in members(root)):
        with contextlib.suppress(*_GONE):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
                if line.startswith("Pss:"):
                    pss += int(line.split()[1]) * 1024
                elif line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    anonymous += int(line.split()[1]) * 1024
    return TreeMemory(pss_bytes=pss, anonymous_bytes=anonymous)


def available_share() -> float:
    """Returns how much of the machine's memory is to be had without ending anything."""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kib["MemAvailable"] / kib["MemTotal"]


def pause(pid: int) -> None:
    """Halts a tree, whose idle threads may spin otherwise; returns once all of it stands."""
    tree = members(pid)
    for member in tree:
        _send(member, signal.SIGSTOP)
    _wait(tree, until=("T", "Z", None))


def resume(pid: int) -> None:
    """Lets a tree go on, its root last."""
    root, *others = members(pid)
    for member in others:
        _send(member, signal.SIGCONT)
    if others:
        time.sleep(_HEAD_START_S)
    _send(root, signal.SIGCONT)


def kill(pid: int) -> None:
    """Ends a tree at once."""
    _kill(members(pid))


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process and whatever it started, whatever state they are in."""
    try:
        yield
    finally:
        tree = members(process.pid) if process.poll() is None else []
        if tree:
            resume(process.pid)
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        _kill(tree)
        process.wait()


def state_of(pid: int) -> str | None:
    """Returns the kernel's letter for what a process does: T halted, Z ended; None once gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()[0]
    except _GONE:
        return None


def _kill(tree: Sequence[int]) -> None:
    for member in tree:
        _send(member, signal.SIGKILL)
    _wait(tree, until=("Z", None))


def _wait(tree: Sequence[int], *, until: Collection[str | None]) -> None:
    """Waits for states that signals bring about, which they do soon but not at once."""
    give_up_at = time.monotonic() + _GRACE_S
    while any(state_of(member) not in until for member in tree):
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"processes {tree} do not obey signals")
        time.sleep(_POLL_S)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
