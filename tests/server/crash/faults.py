"""Faults at points of the server's processes, put there from outside: no code of ours asks.

A control file arms them. While it is there, every call of a point adds a line "role point" to it,
and the n-th such call, over all processes of the role, goes wrong as its first line says.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

CONTROL = "LINKER_TEST_CONTROL"  # environment: the control file
WATCHED = "LINKER_TEST_WATCHED"  # environment: the folder whose files count
SERVER = "server"
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
# What decides who owns which memory; tokens and reports would be counted differently every time.
_MESSAGES = (
    "LoadModel", "UnloadModel", "CancelLoad", "Reserve", "Release",
    "ModelLoaded", "ModelUnloaded", "LoadFailed", "UnloadFailed", "Reserved", "ReserveFailed",
)  # fmt: skip
_OPEN, _READLINK = os.open, os.readlink


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong: at the n-th call of a point, counted from 1."""

    role: str
    point: str
    number: int = 1
    action: str = "kill"  # or a key of `_ERRORS`

    def __str__(self) -> str:
        return f"{self.role} {self.point} {self.number} {self.action}"

    @classmethod
    def parse(cls, line: str) -> Self | None:
        role, _, rest = line.partition(" ")
        point, number, action = rest.rsplit(" ", 2)
        return (
            None if role == "-" else cls(role=role, point=point, number=int(number), action=action)
        )


class Control:
    """The test's side: arms faults and reads which points were called."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def arm(self, fault: Fault | None) -> None:
        """Has calls counted from now on, and one of them go wrong."""
        aside = self.path.with_suffix(".new")
        aside.write_text(f"{fault or '- - 0 -'}\n")
        aside.rename(self.path)

    def disarm(self) -> Counter[tuple[str, str]]:
        """Returns how often each point of each role was called; they are not counted any more."""
        lines = self.path.read_text().splitlines()[1:]
        self.path.unlink()
        return Counter((role, point) for role, _, point in (line.partition(" ") for line in lines))


def install(role: str) -> None:
    """Wraps this process's points, if its environment names a control file."""
    if CONTROL not in os.environ:
        return
    faults = _Faults(role, os.environ[CONTROL], os.path.realpath(os.environ[WATCHED]))
    _wrap_files(faults)
    _wrap_messages(faults)
    _wrap_registry(faults)
    if role != SERVER:
        _wrap_result(faults)
    faults.hit("start")


class _Faults:
    """One process's points.

    Args:
        role: Of the process.
        control: The control file.
        watched: The folder whose files count.
    """

    def __init__(self, role: str, control: str, watched: str) -> None:
        self._role = role
        self._control = control
        self.watched = watched

    def hit(self, point: str) -> None:
        """Counts a call, and goes wrong if it is the one.

        Raises:
            OSError: If that is what is to go wrong.
        """
        try:
            descriptor = _OPEN(self._control, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            first, *lines = os.pread(descriptor, 1 << 20, 0).decode().splitlines()
            line = f"{self._role} {point}"
            os.write(descriptor, f"{line}\n".encode())
            number = lines.count(line) + 1
        finally:
            os.close(descriptor)
        fault = Fault.parse(first)
        if fault is not None and f"{fault} " == f"{line} {number} {fault.action} ":
            self._fail(fault.action)

    def _fail(self, action: str) -> None:
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = _ERRORS[action]
        raise OSError(number, os.strerror(number))


def _wrap_files(faults: _Faults) -> None:
    """Changes of the watched folder: each is a point before it is made."""
    for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink"):
        setattr(os, name, _on_path(faults, name, getattr(os, name)))
    for name in ("fsync", "fdatasync", "pwrite", "write", "posix_fallocate", "ftruncate"):
        setattr(os, name, _on_descriptor(faults, name, getattr(os, name)))
    real_open = os.open

    @wraps(real_open)
    def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT and _lies_in(faults, path, more.get("dir_fd")):
            faults.hit("create")
        return real_open(path, flags, *args, **more)

    os.open = opened
    real_write = Path.write_bytes

    @wraps(real_write)
    def write_bytes(self: Path, data: Any) -> int:
        if _lies_in(faults, self, None):
            faults.hit("create")
        return real_write(self, data)

    Path.write_bytes = write_bytes  # type: ignore[method-assign]


def _on_path(faults: _Faults, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def wrapped(path: Any, *args: Any, **more: Any) -> Any:
        if _lies_in(faults, path, more.get("dir_fd")):
            faults.hit(name)
        return real(path, *args, **more)

    return wrapped


def _on_descriptor(faults: _Faults, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def wrapped(descriptor: int, *args: Any) -> Any:
        if descriptor > sys.stderr.fileno() and _lies_in(faults, f"/proc/self/fd/{descriptor}"):
            faults.hit(name)
        return real(descriptor, *args)

    return wrapped


def _lies_in(faults: _Faults, path: Any, dir_fd: int | None = None) -> bool:
    if isinstance(path, int):
        path = f"/proc/self/fd/{path}"
    text = os.fsdecode(path)
    if text.startswith("/proc/self/fd/"):
        text = _READLINK(text)
    elif dir_fd is not None:
        text = os.path.join(_READLINK(f"/proc/self/fd/{dir_fd}"), text)  # noqa: PTH118
    return text.startswith(faults.watched + os.sep)


def _wrap_messages(faults: _Faults) -> None:
    """What server and engine say to each other: a point before it goes out, one after it came."""
    send, receive = Connection.send, Connection.recv

    def counted_send(self: Any, message: Any) -> None:
        if (kind := type(message).__name__) in _MESSAGES:
            faults.hit(f"send {kind}")
        send(self, message)

    def counted_receive(self: Any) -> Any:
        message = receive(self)
        if (kind := type(message).__name__) in _MESSAGES:
            faults.hit(f"receive {kind}")
        return message

    for name, counted in ("send", counted_send), ("recv", counted_receive):
        setattr(Connection, name, counted)


def _wrap_registry(faults: _Faults) -> None:
    """Transactions that write: a point before each is committed, one after."""
    writing = "linker-test-writing"

    def note(session: Session, *_: Any) -> None:
        session.info[writing] = True

    def note_statement(state: Any) -> None:
        if state.is_insert or state.is_update or state.is_delete:
            state.session.info[writing] = True

    def before(session: Session) -> None:
        if session.info.get(writing):
            try:
                faults.hit("before commit")
            except OSError as error:
                reason = sqlite3.OperationalError("database or disk is full")
                raise OperationalError("COMMIT", {}, reason) from error

    def after(session: Session) -> None:
        if session.info.pop(writing, False):
            faults.hit("after commit")

    event.listen(Session, "after_flush", note)
    event.listen(Session, "do_orm_execute", note_statement)
    event.listen(Session, "before_commit", before)
    event.listen(Session, "after_commit", after)


def _wrap_result(faults: _Faults) -> None:
    """A worker's last word."""
    write = sys.stdout.write

    def counted(text: str) -> int:
        if text.startswith('{"result"'):
            faults.hit("say result")
        return write(text)

    sys.stdout.write = counted  # type: ignore[method-assign]
