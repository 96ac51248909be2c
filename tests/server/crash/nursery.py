"""Has everything imported once and forks servers and workers from there, each in its own process.

Importing torch in every one of hundreds of processes would be most of these tests' time. What runs
is what `python -m MODULE` would run; see `stand_in` for how it hangs together with who asked.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

from tests.server.crash.faults import SERVER, install

PRELOADED = (
    "server.onboarding.hub.worker",
    "linker_core.engine.worker", "linker_core.residency.worker", "linker_core.sharing.worker",
    "linker_core.sharing.kernel", "tests.server.fake_tuner", "tests.server.crash.serve",
    "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip
_LENGTH = struct.Struct("<Q")
_STATUS = struct.Struct("<i")
_MAX_DESCRIPTORS = 64
_NAME = Path("/proc/self/comm")  # what process listings show


class Nursery:
    """The loop: requests come in over a socket, processes go out.

    Args:
        listener: Bound and listening.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, socket.socket] = {}
        self._wakes, self._wake = socket.socketpair()

    def run(self) -> None:
        """Serves until the listener's owner is gone."""
        self._wakes.setblocking(False)
        self._wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno())
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wakes, selectors.EVENT_READ, self._reap)
        self._selector.register(0, selectors.EVENT_READ, self._leave)
        while True:
            for key, _ in self._selector.select():
                key.data(key.fileobj)

    def _leave(self, _stdin: object) -> NoReturn:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def _accept(self, _listener: object) -> None:
        line, _ = self._listener.accept()
        try:
            request, descriptors = _receive(line)
        except (EOFError, ConnectionError):
            line.close()  # killed before it had said what it wanted
            return
        pid = os.fork()
        if pid == 0:
            _become(request, descriptors, keep_closed=[*self._children.values(), line])
        for descriptor in descriptors:
            os.close(descriptor)
        self._children[pid] = line
        self._selector.register(line, selectors.EVENT_READ, self._hung_up)
        with contextlib.suppress(OSError):
            line.sendall(_STATUS.pack(pid))

    def _hung_up(self, line: Any) -> None:
        """Whoever asked is gone, and the process goes, too."""
        self._selector.unregister(line)
        for pid, other in self._children.items():
            if other is line:
                os.kill(pid, signal.SIGKILL)

    def _reap(self, _wakes: object) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wakes.recv(4096):
                pass
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            line = self._children.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(line)
            with contextlib.suppress(OSError):
                line.sendall(_STATUS.pack(os.waitstatus_to_exitcode(status)))
            line.close()


def _receive(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, descriptors, _, _ = socket.recv_fds(line, _LENGTH.size, _MAX_DESCRIPTORS)
    if len(head) < _LENGTH.size:
        raise EOFError
    length = _LENGTH.unpack(head)[0]
    words = b""
    while len(words) < length:
        more = line.recv(length - len(words))
        if not more:
            raise EOFError
        words += more
    request: dict[str, Any] = json.loads(words)
    return request, descriptors


def _become(
    request: dict[str, Any], descriptors: list[int], *, keep_closed: list[socket.socket]
) -> NoReturn:
    """Turns the fork into the process that was asked for."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for line in keep_closed:
            line.close()
        _place(dict(zip(request["descriptors"], descriptors, strict=True)))
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = [request["module"], *request["arguments"]]
        role = role_of(request["module"])
        _NAME.write_text(role)
        install(role)
        status = _call_main(request["module"])
    except BaseException:  # noqa: BLE001 - what an interpreter would print at its end
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def role_of(module: str) -> str:
    """Returns what a process is to the server."""
    return {
        "linker_core.engine.worker": "engine",
        "linker_core.residency.worker": "encoder",
        "linker_core.sharing.worker": "scanner",
        "tests.server.fake_tuner": "tuner",
        "server.onboarding.hub.worker": "hub",
    }.get(module, SERVER)


def _call_main(module: str) -> int:
    try:
        return int(importlib.import_module(module).main() or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def _place(wanted: dict[int, int]) -> None:
    """Gives descriptors the numbers they are to have, and closes all others."""
    above = max([*wanted, *wanted.values()]) + 1
    moved = {}
    for number, descriptor in wanted.items():
        copy = above + number
        os.dup2(descriptor, copy, inheritable=False)
        moved[number] = copy
    for number in range(above):
        with contextlib.suppress(OSError):
            os.close(number)
    for number, copy in moved.items():
        os.dup2(copy, number)
        os.close(copy)
    os.closerange(above, 1 << 16)
    sys.stdin = _stream(0, "r", wanted)
    sys.stdout = _stream(1, "w", wanted)
    sys.stderr = _stream(2, "w", wanted)


def _stream(number: int, mode: Literal["r", "w"], wanted: dict[int, int]) -> io.TextIOWrapper:
    if number not in wanted:
        os.open(os.devnull, os.O_RDWR)
    return open(number, mode, encoding="utf-8", closefd=False, buffering=1)


@contextlib.contextmanager
def listening(address: Path) -> Iterator[socket.socket]:
    """Binds the socket that requests come in over."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen(64)
        yield listener


def main() -> None:
    """Imports, binds, and says on stdout that it is ready; leaves when stdin closes."""
    for name in PRELOADED:
        importlib.import_module(name)
    with listening(Path(sys.argv[1])) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        Nursery(listener).run()


if __name__ == "__main__":
    main()
