"""A template worker that does as its messages say, in the place of the real one."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from linker_core.text.template_frames import (
    LENGTH_BYTES,
    Outcome,
    Reply,
    frame_length,
    parse_task,
    reply_frame,
)

WORKER = Path(__file__)
SIGNALS = {"out of time": signal.SIGPROF, "killed": signal.SIGKILL}


def command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(WORKER), *arguments)


def main(arguments: list[str]) -> None:
    if "mute" in arguments:
        return
    if "talkative" in arguments:
        os.write(1, b"hello")
    logs = [Path(name.removeprefix("log=")) for name in arguments if name.startswith("log=")]
    while head := sys.stdin.buffer.read(LENGTH_BYTES):
        task = parse_task(sys.stdin.buffer.read(frame_length(head)))
        for log in logs:
            with log.open("a") as file:
                file.write(f"{task.limit_s}\n")
        answer(json.loads(task.variables)["do"], task.limit_s)


def answer(wish: str, limit_s: float) -> None:
    if wish == "hang":
        time.sleep(1000)
    elif wish == "limit":
        os.write(1, reply_frame(Reply(Outcome.RENDERED, str(limit_s))))
    elif wish in SIGNALS:
        os.kill(os.getpid(), SIGNALS[wish])
    elif wish == "crash":
        os._exit(3)
    elif wish == "spent":
        os.write(1, reply_frame(Reply(Outcome.SPENT, "")))
    elif wish == "flood":
        os.write(1, (1 << 30).to_bytes(4, "little") + b"x" * 1000)
    elif wish == "gibberish":
        os.write(1, b"\x02\x00\x00\x00\xff\xff")
    elif wish == "environment":
        os.write(1, reply_frame(Reply(Outcome.RENDERED, " ".join(os.environ))))
    elif wish == "pid":
        os.write(1, reply_frame(Reply(Outcome.RENDERED, str(os.getpid()))))
    else:
        os.write(1, reply_frame(Reply(Outcome.RENDERED, wish)))


if __name__ == "__main__":
    main(sys.argv[1:])
