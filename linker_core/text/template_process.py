"""One template worker for whoever may wait: renders blocking, in a process that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Final, Self

from linker_core.errors import InvalidRequestError
from linker_core.lifeline import stop_signals_blocked
from linker_core.text.template_frames import (
    LENGTH_BYTES,
    MAX_TEXT_BYTES,
    TEMPLATE_COMMAND,
    Outcome,
    Reply,
    Task,
    encode_variables,
    frame_length,
    parse_reply,
    task_frame,
    worker_environment,
)
from linker_core.text.template_source import TemplateSource

_CPU_S: Final = 1.0
_WALL_S: Final = 10.0  # on a machine that is busy with other things


class TemplateProcess:
    """Renders one template; a context manager. Not for threads at once, nor for an event loop.

    Args:
        source: The template.
        cpu_s: Processor time that one rendering may take.
        wall_s: Time that it may take in all.
    """

    def __init__(
        self, source: TemplateSource, *, cpu_s: float = _CPU_S, wall_s: float = _WALL_S
    ) -> None:
        self._source = source
        self._cpu_s = cpu_s
        self._wall_s = wall_s
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what it was not sent nobody needs
        child.wait()

    def render(self, variables: Mapping[str, object]) -> str:
        """Returns the prompt's text; see `Renders`."""
        source, payload = self._source, encode_variables(variables)
        reply = self._ask(Task(source.digest, None, self._cpu_s, payload))
        if reply is not None and reply.outcome is Outcome.UNKNOWN:
            reply = self._ask(Task(source.digest, source.text, self._cpu_s, payload))
        if reply is not None and reply.outcome is Outcome.RENDERED:
            return reply.text
        if reply is not None and reply.outcome is Outcome.REFUSED:
            raise InvalidRequestError(reply.text[:500], param="messages")
        self.close()
        raise InvalidRequestError(
            "The model's chat template takes too long over these messages, or too much memory.",
            param="messages",
        )

    def _ask(self, task: Task) -> Reply | None:
        """Returns the reply; None if the worker ends without one, as it does in the end."""
        if self._child is None:
            with stop_signals_blocked():
                self._child = subprocess.Popen(
                    TEMPLATE_COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=worker_environment(os.environ),
                )
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        too_late = threading.Timer(self._wall_s, child.send_signal, (signal.SIGKILL,))
        too_late.start()
        try:
            child.stdin.write(task_frame(task))
            child.stdin.flush()
            return _read_reply(child.stdout)
        except BrokenPipeError:
            return None
        finally:
            too_late.cancel()
            too_late.join()  # it kills no process that has the same number later


@contextmanager
def template_process(source: TemplateSource | None) -> Iterator[TemplateProcess | None]:
    """Holds a worker for a template; None for none."""
    if source is None:
        yield None
        return
    with TemplateProcess(source) as process:
        yield process


def _read_reply(stream: IO[bytes]) -> Reply | None:
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES or frame_length(head) > MAX_TEXT_BYTES + 1:
        return None
    content = stream.read(frame_length(head))
    if len(content) < frame_length(head):
        return None
    try:
        return parse_reply(content)
    except ValueError:
        return None
