"""A template worker as the event loop sees it: one request, one reply, until it is gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Final, cast

from linker_core.lifeline import stop_signals_blocked
from linker_core.text.template_frames import (
    LENGTH_BYTES,
    MAX_TEXT_BYTES,
    Reply,
    Task,
    frame_length,
    parse_reply,
    task_frame,
    worker_environment,
)

_MAX_REPLY_BYTES: Final = MAX_TEXT_BYTES + 1
_READ_BYTES: Final = 64 * 1024  # what asyncio asks for is mapped anew each time


class RenderProcess(asyncio.SubprocessProtocol):
    """Speaks with one worker.

    Args:
        on_reply: Called with every reply; never without a request that it may answer.
        on_gone: Called once, with the exit status, negative for a signal.

    Attributes:
        num_replies: So far.
        is_killed: Whether it was ended from here.
        ended: Whether it has.
        gone: Done when nothing of it is left.
    """

    def __init__(
        self,
        on_reply: Callable[[RenderProcess, Reply], None],
        on_gone: Callable[[RenderProcess, int], None],
    ) -> None:
        self._on_reply = on_reply
        self._on_gone = on_gone
        self._received = bytearray()
        self._asked = False
        self.num_replies = 0
        self.is_killed = False
        self.ended = False
        self._transport: asyncio.SubprocessTransport | None = None
        self.gone = asyncio.get_running_loop().create_future()

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        *,
        on_reply: Callable[[RenderProcess, Reply], None],
        on_gone: Callable[[RenderProcess, int], None],
    ) -> RenderProcess:
        """Starts a worker. What it is sent before it has come up, it finds.

        Raises:
            OSError: The system starts no process now.
            RuntimeError: Nor a thread that would wait for it.
        """
        with stop_signals_blocked():
            _, protocol = await asyncio.get_running_loop().subprocess_exec(
                lambda: cls(on_reply, on_gone),
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # what it would say there could hold prompts
                env=worker_environment(os.environ),
            )
        return protocol

    def ask(self, task: Task) -> None:
        """Sends a request; the reply to the one before must have come."""
        assert not self._asked
        assert self._transport is not None
        self._asked = True
        pipe = cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))
        pipe.write(task_frame(task))

    def kill(self) -> None:
        """Ends the worker now; it is gone a moment later."""
        if self._transport is not None and self._transport.get_returncode() is None:
            self.is_killed = True
            self._transport.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Is called by the event loop."""
        self._transport = cast(asyncio.SubprocessTransport, transport)
        replies = self._transport.get_pipe_transport(1)
        if replies is not None and hasattr(replies, "max_size"):
            replies.max_size = _READ_BYTES

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002 - only stdout is one
        """Is called by the event loop."""
        self._received += data
        if not self._asked:
            self.kill()  # it speaks unasked: something else than our code runs there
            return
        if len(self._received) < LENGTH_BYTES:
            return
        length = frame_length(bytes(self._received[:LENGTH_BYTES]))
        num_missing = LENGTH_BYTES + length - len(self._received)
        if length > _MAX_REPLY_BYTES or num_missing < 0:
            self.kill()
        elif num_missing == 0:
            content = bytes(self._received[LENGTH_BYTES:])
            self._received.clear()
            self._hear(content)

    def process_exited(self) -> None:
        """Is called by the event loop."""
        assert self._transport is not None
        status = self._transport.get_returncode()
        self._transport.close()
        self.ended = True
        self._on_gone(self, 0 if status is None else status)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - see `process_exited`
        """Is called by the event loop."""
        if not self.gone.done():
            self.gone.set_result(None)

    def _hear(self, content: bytes) -> None:
        try:
            reply = parse_reply(content)
        except ValueError:
            self.kill()
            return
        self._asked = False
        self.num_replies += 1
        self._on_reply(self, reply)
