"""The engine as an operating-system process: its start, its two channels, its end."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import struct
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Self

from linker_core.config import EngineConfig
from linker_core.lifeline import stop_signals_blocked
from server.bridge.cpu_quota import limited_threads

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
    # Freed weights go back to the system at once (glibc would keep a third of them).
    "MALLOC_MMAP_THRESHOLD_": "131072",
    # A thread that waits for the next region of a step spins for about 0.1 ms, then sleeps: waking
    # costs more than most regions take, but threads that spin on slow a step tenfold as soon as
    # anything else wants a core.
    "GOMP_SPINCOUNT": "10000",
}

ENGINE_COMMAND = (sys.executable, "-P", "-m", "linker_core.engine.worker")
_HEARTBEAT_BYTES = 8


def engine_environment() -> dict[str, str]:
    """Returns what the engine gets where its user has not set it otherwise."""
    num_threads = limited_threads()
    return _ENVIRONMENT | ({} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)})


class EngineProcess:
    """A running engine process.

    `connection` carries messages both ways and reads as closed once the process is gone;
    `heartbeat` is a counter that a living engine raises ten times a second or more.
    """

    def __init__(
        self,
        child: asyncio.subprocess.Process,
        channel: socket.socket,
        heartbeat: mmap.mmap,
    ) -> None:
        self._child = child
        self._channel = channel
        self._heartbeat = heartbeat
        self.connection: Connection = Connection(os.dup(channel.fileno()))

    @classmethod
    async def spawn(cls, command: Sequence[str], config: EngineConfig) -> Self:
        """Starts the engine; its first message says when it reads commands."""
        ours, theirs = socket.socketpair()
        memory_fd = os.memfd_create("linker-heartbeat")
        try:
            os.ftruncate(memory_fd, _HEARTBEAT_BYTES)
            heartbeat = mmap.mmap(memory_fd, _HEARTBEAT_BYTES, prot=mmap.PROT_READ)
            with stop_signals_blocked():
                child = await asyncio.create_subprocess_exec(
                    *command,
                    *("--socket-fd", str(theirs.fileno())),
                    *("--heartbeat-fd", str(memory_fd)),
                    *("--config", config.to_json()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # the server's stdout is its own
                    pass_fds=(theirs.fileno(), memory_fd),
                    env=engine_environment() | os.environ,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(memory_fd)
        return cls(child, ours, heartbeat)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def heartbeat(self) -> int:
        """Returns the engine's loop counter."""
        return int(struct.unpack("<Q", self._heartbeat[:_HEARTBEAT_BYTES])[0])

    async def wait(self) -> int:
        """Waits for the end and returns the exit status, negative for a signal."""
        return await self._child.wait()

    def kill(self) -> None:
        """Ends the process now."""
        if self._child.returncode is None:
            self._child.kill()

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Waits `grace_s` for the process to leave, kills it otherwise, and frees the channels."""
        try:
            async with asyncio.timeout(grace_s):
                await self._child.wait()
        except TimeoutError:
            self.kill()
            await self._child.wait()
        finally:
            self.kill()
            # Wakes a thread that is reading; closing the descriptor alone would not.
            try:
                self._channel.shutdown(socket.SHUT_RDWR)
            except OSError:
                logger.debug("the engine's channel was closed already")
            self._channel.close()
