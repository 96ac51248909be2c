"""The engine process: commands in and events out over one socket, a heartbeat in shared memory.

Started as `python -m linker_core.engine.worker --socket-fd N --heartbeat-fd M --config JSON`. Both
descriptors are inherited. It leaves when the socket closes, and it dies with its parent.
"""

from __future__ import annotations

import argparse
import gc
import logging
import mmap
import signal
import struct
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from linker_core.config import UNUSABLE_DEVICE_STATUS, EngineConfig
from linker_core.engine.engine import Engine, EngineBrokenError
from linker_core.engine.messages import Command, EngineReady, Event, Shutdown
from linker_core.lifeline import die_with_parent

_log = logging.getLogger(__name__)

IDLE_POLL_S = 0.1  # how long an idle loop sleeps before it beats again


class Heartbeat:
    """A counter that the parent watches: one little-endian uint64 in shared memory."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 8)
        self._count = 0

    def beat(self) -> None:
        """Counts one iteration."""
        self._count += 1
        struct.pack_into("<Q", self._memory, 0, self._count)


def serve(engine: Engine, connection: Connection[Event, Command], heartbeat: Heartbeat) -> None:
    """Runs the loop until Shutdown.

    Raises:
        EOFError, OSError: The other end is gone.
        EngineBrokenError: Steps keep failing.
    """
    connection.send(EngineReady(device=str(engine.device)))
    connection.send(engine.snapshot())  # what is free is known before the first command
    while True:
        heartbeat.beat()
        timeout_s = 0.0 if engine.has_work else IDLE_POLL_S
        while connection.poll(timeout_s):
            command = connection.recv()
            if isinstance(command, Shutdown):
                return
            engine.handle(command)
            timeout_s = 0.0
        for event in engine.step():
            connection.send(event)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until the parent closes the socket; returns the exit status."""
    parser = argparse.ArgumentParser(prog="linker_core.engine.worker")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--heartbeat-fd", type=int, required=True)
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s engine: %(message)s",
    )
    _follow_parent()
    config = EngineConfig.from_json(arguments.config)
    if not _can_use(config.device):
        return UNUSABLE_DEVICE_STATUS
    engine = Engine(config)
    connection: Connection[Event, Command] = Connection(arguments.socket_fd)
    try:
        serve(engine, connection, Heartbeat(arguments.heartbeat_fd))
    except (EOFError, ConnectionError):
        _log.info("the server has closed the socket")
    except EngineBrokenError:
        _log.exception("the engine gives up")
        return 1
    finally:
        engine.close()
    return 0


def _can_use(device: str) -> bool:
    """Tries the device; says why in one line if it does not work."""
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # the first: torch built without the device
        reason = str(error).partition("\n")[0]
        _log.error("the device %s cannot be used: %s; choose another --device", device, reason)
        return False
    return True


def _follow_parent() -> None:
    """Leaves signals sent to the whole group to the parent, and dies when the parent dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


if __name__ == "__main__":
    status = main()
    # The interpreter would walk the three thousand modules of torch and transformers as it ends:
    # 1.1 s of a core, and on a busy machine longer than the server waits for the engine to leave.
    gc.freeze()
    sys.exit(status)
