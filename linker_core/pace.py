"""How fast background work may go while sequences run: a duty share, a byte rate, one thread.

`nice` does not govern memory bandwidth, so work that reads models slows decoding however low its
priority. It therefore rests between its steps for as long as sequences run. Knows nothing of what
the work is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

logger = logging.getLogger(__name__)

BUSY_LINE, IDLE_LINE = "busy", "idle"
_NAP_S = 0.05  # a rest is cut short at most this long after the sequences have ended
_TASKS = Path("/proc/self/task")


class Spent(NamedTuple):
    """Where a process's time went: by the clock and on all its cores, in seconds."""

    busy_s: float = 0.0  # while sequences ran
    busy_cpu_s: float = 0.0
    idle_s: float = 0.0
    idle_cpu_s: float = 0.0


class Pace:
    """Slows the calling threads down while `busy`. Every method may be called from any thread.

    The share of time that work may take grows with the time it has been held back, up to all of
    it, and the lowest scheduling class is left then: on a server that never rests, the work ends
    all the same. Where the class cannot be left again (Linux asks for a right to do so), it is not
    entered.

    Args:
        bytes_per_s: Rate of reading while sequences run.
        work_share: Share of the time that work may take while sequences run, at first.
        ageing_s: Busy seconds after which the share is 1.
        clock: Monotonic seconds.
        sleep: Waits so many seconds.
        cpu_clock: CPU seconds of this process.
    """

    def __init__(
        self,
        *,
        bytes_per_s: float = 1e9,
        work_share: float = 0.25,
        ageing_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        assert bytes_per_s > 0
        assert 0 < work_share <= 1
        self._bytes_per_s = bytes_per_s
        self._work_share = work_share
        self._ageing_s = ageing_s
        self._clock = clock
        self._sleep = sleep
        self._turn = threading.Lock()  # held by the one thread that works while busy
        self._state = threading.Lock()  # guards what follows
        self._busy_since: float | None = None
        self._busy_before_s = 0.0  # in earlier spells
        self._read_until = 0.0  # when the bytes read so far have had their time
        self._cpu_clock = cpu_clock
        self._spent = Spent()  # up to the last change of `busy`
        self._spent_at = clock(), cpu_clock()
        self._lowered = False
        self._may_lower = True

    @property
    def busy(self) -> bool:
        """Whether sequences run now; once it says so, every thread has given way."""
        with self._state:
            return self._busy_since is not None

    @busy.setter
    def busy(self, busy: bool) -> None:
        with self._state:
            if busy == (self._busy_since is not None):
                return
            now = self._clock()
            self._spent = self._spent_now()
            self._spent_at = now, self._cpu_clock()
            if self._busy_since is None:
                self._busy_since = now
            else:
                self._busy_before_s += now - self._busy_since
                self._busy_since = None
            self._schedule()

    @property
    def share(self) -> float:
        """The share of time that work may take now, within (0, 1]."""
        with self._state:
            if self._busy_since is None:
                return 1.0
            aged = min(1.0, self._held_back_s() / self._ageing_s)
            return self._work_share + (1.0 - self._work_share) * aged

    @property
    def spent(self) -> Spent:
        """What this process has taken since this was made, resting included."""
        with self._state:
            return self._spent_now()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Holds all other threads back from their turns while sequences run; not re-entrant."""
        if not self.busy:
            yield
            return
        with self._turn:
            yield

    def after_read(self, nbytes: int) -> None:
        """Rests until the bytes just read have had their time; at once if no sequence runs."""
        with self._state:
            if self._busy_since is None:
                return
            start = max(self._read_until, self._clock())
            self._read_until = start + nbytes / self._bytes_per_s
            until = self._read_until
        self._rest(until)

    def after_work(self, seconds: float) -> None:
        """Rests after so many seconds of work; at once if no sequence runs."""
        share = self.share
        if share < 1.0:
            self._rest(self._clock() + seconds * (1.0 - share) / share)
        elif self.busy:
            with self._state:
                self._schedule()  # old enough for the usual scheduling class

    def follow(self, stream: TextIO) -> None:
        """Sets `busy` from lines "busy" and "idle" until the stream ends, in a daemon thread."""
        threading.Thread(target=self._follow, args=(stream,), name="pace", daemon=True).start()

    def _follow(self, stream: TextIO) -> None:
        for line in stream:
            word = line.strip()
            assert word in (BUSY_LINE, IDLE_LINE), word
            self.busy = word == BUSY_LINE
        self.busy = False  # whoever asked for restraint is gone

    def _spent_now(self) -> Spent:
        since, cpu_since = self._spent_at
        passed, cpu = self._clock() - since, self._cpu_clock() - cpu_since
        spent = self._spent
        if self._busy_since is None:
            return spent._replace(idle_s=spent.idle_s + passed, idle_cpu_s=spent.idle_cpu_s + cpu)
        return spent._replace(busy_s=spent.busy_s + passed, busy_cpu_s=spent.busy_cpu_s + cpu)

    def _rest(self, until: float) -> None:
        while self.busy and (left := until - self._clock()) > 0.0:
            self._sleep(min(left, _NAP_S))

    def _held_back_s(self) -> float:
        assert self._busy_since is not None
        return self._busy_before_s + self._clock() - self._busy_since

    def _schedule(self) -> None:
        """Puts every thread of this process into the class that fits; new ones inherit it."""
        lowered = self._busy_since is not None and self._held_back_s() < self._ageing_s
        if lowered == self._lowered or not self._may_lower:
            return
        if lowered and not _may_raise_again():
            self._may_lower = False
            logger.info("the lowest scheduling class could not be left again; only resting helps")
            return
        self._lowered = lowered
        policy = os.SCHED_IDLE if lowered else os.SCHED_OTHER
        seen: set[str] = set()
        # Again until no thread is new: one may have been started by another not yet changed.
        while new := {task.name for task in _TASKS.iterdir()} - seen:
            seen |= new
            for task in new:
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.sched_setscheduler(int(task), policy, os.sched_param(0))


def _may_raise_again() -> bool:
    """Whether a thread of this process that enters the lowest class may leave it; tries it out."""
    outcome: list[bool] = []

    def attempt() -> None:
        try:
            for policy in (os.SCHED_IDLE, os.SCHED_OTHER):
                os.sched_setscheduler(0, policy, os.sched_param(0))
        except PermissionError:
            outcome.append(False)
        else:
            outcome.append(True)

    thread = threading.Thread(target=attempt, name="pace-probe")
    thread.start()
    thread.join()
    return outcome == [True]
