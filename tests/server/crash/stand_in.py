"""Stands for a worker that the nursery runs: same descriptors, same end. Imports nothing of ours.

Run as `python -I -S stand_in.py MODULE ARGUMENT…`. Whoever kills it kills the worker; it ends as
the worker ends, and with the process that started it.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import sys

ADDRESS = "LINKER_TEST_NURSERY"
_LENGTH = struct.Struct("<Q")
_STATUS = struct.Struct("<i")
_PR_SET_PDEATHSIG = 1


def ask(address: str, module: str, arguments: list[str], environment: dict[str, str],
        descriptors: dict[int, int]) -> socket.socket:  # fmt: skip
    """Has a module run in a new process; returns the line whose closing kills it.

    Args:
        address: The nursery's socket.
        module: Whose `main` is called.
        arguments: Its command line.
        environment: All of it.
        descriptors: Numbers there -> what is meant here.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(address)
    request = json.dumps(
        {"module": module, "arguments": arguments, "environment": environment,
         "descriptors": list(descriptors)}
    ).encode()  # fmt: skip
    socket.send_fds(line, [_LENGTH.pack(len(request))], list(descriptors.values()))
    line.sendall(request)
    return line


def read_number(line: socket.socket) -> int:
    """Returns the next number the nursery says: first the process's id, last its exit status."""
    words = b""
    while len(words) < _STATUS.size:
        more = line.recv(_STATUS.size - len(words))
        if not more:
            raise EOFError
        words += more
    number: int = _STATUS.unpack(words)[0]
    return number


def _inherited() -> list[int]:
    with os.scandir("/proc/self/fd") as entries:
        listed = [int(entry.name) for entry in entries]
    found = []
    for number in listed:
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            os.fstat(number)
            found.append(number)
    return found


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptors = {number: number for number in _inherited()}
    line = ask(os.environ[ADDRESS], sys.argv[1], sys.argv[2:], dict(os.environ), descriptors)
    read_number(line)
    for number in descriptors:
        os.close(number)  # the other end sees the worker's end, not ours
    status = read_number(line)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
