"""Log lines that quote no request.

The message of an exception may hold whatever was being worked on: a prompt, an answer, a key. Of
faults met while requests are answered the log gets the kinds and the places, which say no less of
what is to be mended.
"""

from __future__ import annotations

import logging
import traceback

_ANSWERING = ("uvicorn", "asyncio", "server.gateway")


class DiscreetFormatter(logging.Formatter):
    """Formats as its parent does, but for what exceptions say while requests are answered."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name.startswith(_ANSWERING):
            if record.exc_info and record.exc_info[1] is not None:
                record.exc_text = "\n".join(_places(record.exc_info[1]))
            if record.name == "asyncio":
                # What follows are a task and its exception in full.
                record.msg, record.args = record.getMessage().partition("\n")[0], ()
        return super().format(record)


def _places(error: BaseException) -> list[str]:
    """Returns an exception's kind and the lines of code it came through, its causes' first."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [] if before is None else [*_places(before), "which led to:"]
    frames = traceback.extract_tb(error.__traceback__)
    lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
    lines.append(f"{type(error).__module__}.{type(error).__qualname__}")
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            lines += ["of which one is:", *_places(part)]
    return lines
