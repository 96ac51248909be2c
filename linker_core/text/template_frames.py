"""What a template worker and whoever asks it say to each other: frames over two pipes.

A frame is its length and its content. Neither side trusts a length, and the asking side trusts
nothing that the worker says, since templates are programs of strangers.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from enum import IntEnum
from typing import Final, NamedTuple

from linker_core.text.template_source import TemplateSource

MAX_REQUEST_BYTES: Final = 64 << 20
MAX_TEXT_BYTES: Final = 4 << 20  # of a prompt, in UTF-8
TEMPLATE_COMMAND: Final = (sys.executable, "-P", "-m", "linker_core.text.template_worker")
_LENGTH: Final = struct.Struct("<I")
LENGTH_BYTES: Final = _LENGTH.size


class Outcome(IntEnum):
    """How a request ended; the first byte of a reply, before a text."""

    RENDERED = 0  # the text is the prompt
    REFUSED = 1  # the template refuses the dialogue, and says why
    UNKNOWN = 2  # the worker does not have the template: ask again, with it
    SPENT = 3  # memory ran out; the worker ends


class Task(NamedTuple):
    """What a worker is asked to render."""

    digest: str  # of the template
    source: str | None  # the template itself, where the worker may not have it
    limit_s: float  # of processor time
    variables: bytes  # a JSON object


class Reply(NamedTuple):
    """What a worker says."""

    outcome: Outcome
    text: str


def encode_variables(variables: Mapping[str, object]) -> bytes:
    """Returns what a template sees as JSON, keys in their order."""
    return json.dumps(variables, separators=(",", ":")).encode()


def task_frame(task: Task) -> bytes:
    """Returns a request."""
    head = {"digest": task.digest, "source": task.source, "limit_s": task.limit_s}
    content = json.dumps(head).encode() + b"\n" + task.variables
    return _LENGTH.pack(len(content)) + content


def parse_task(content: bytes) -> Task:
    """Returns the request that a frame holds."""
    line, _, variables = content.partition(b"\n")
    head = json.loads(line)
    return Task(head["digest"], head["source"], head["limit_s"], variables)


def reply_frame(reply: Reply) -> bytes:
    """Returns a reply."""
    content = bytes((reply.outcome,)) + reply.text.encode("utf-8", "surrogatepass")
    return _LENGTH.pack(len(content)) + content


def parse_reply(content: bytes) -> Reply:
    """Returns the reply that a frame holds.

    Raises:
        ValueError: It is none.
    """
    if not content:
        raise ValueError("an empty reply")
    return Reply(Outcome(content[0]), content[1:].decode("utf-8", "surrogatepass"))


def frame_length(head: bytes) -> int:
    """Returns how many bytes follow the `LENGTH_BYTES` that a frame begins with."""
    (length,) = _LENGTH.unpack(head)
    return int(length)


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the little of an environment that a worker needs: no secret is among it."""
    names = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "TZ")
    kept = {name: environment[name] for name in names if name in environment}
    return {**kept, "MALLOC_ARENA_MAX": "1", "PYTHONSAFEPATH": "1"}


def source_of(task: Task) -> TemplateSource | None:
    """Returns the template that comes with a request, if one does."""
    if task.source is None:
        return None
    return TemplateSource(text=task.source, digest=task.digest, origin="chat template")
