"""Renders chat templates in a few worker processes, such that one template never stops another."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from linker_core.errors import InvalidRequestError, NotReadyError, QueueFullError
from linker_core.text.template_frames import (
    TEMPLATE_COMMAND,
    Outcome,
    Reply,
    Task,
    encode_variables,
)
from linker_core.text.template_source import TemplateSource
from server.rendering.patience import Patience
from server.rendering.process import RenderProcess
from server.rendering.turns import Rendering, Turns

logger = logging.getLogger(__name__)

_RETRY_SPAWN_S: Final = 1.0
_MAX_INLINE_CHARS: Final = 64 * 1024  # more is encoded in a thread
_KILLED: Final = (
    "The process that renders this model's chat template was killed, most likely because the "
    "machine has no memory left; try again later."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What rendering may cost.

    Attributes:
        cpu_s: Processor time of one rendering.
        least_cpu_s: The same of a template that often came to no end.
        forgive_s: After so long without, it is trusted a step more.
        wall_s: Of one rendering, on a machine that is busy with other things.
        wait_s: Of a request, for its turn and its text.
        max_waiting: Requests of one template.
    """

    cpu_s: float = 1.0
    least_cpu_s: float = 0.1
    forgive_s: float = 30.0
    wall_s: float = 3.0
    wait_s: float = 10.0
    max_waiting: int = 256


class Templates:
    """Renders in turn, template by template. Event loop only.

    A template never has more than half of the workers at once, so that one that comes to no end
    keeps nobody waiting but those who use the same one.

    Args:
        num_workers: Processes, two or more.
        command: Of a worker.
        limits: Of a rendering.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        num_workers: int = 2,
        command: Sequence[str] = TEMPLATE_COMMAND,
        limits: RenderLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert num_workers >= 2
        self._num_workers = num_workers
        self._command = command
        self._limits = limits or RenderLimits()
        self._patience = Patience(
            self._limits.cpu_s,
            least_s=self._limits.least_cpu_s,
            forgive_s=self._limits.forgive_s,
            clock=clock,
        )
        self._idle: list[RenderProcess] = []
        self._busy: dict[RenderProcess, Rendering] = {}
        self._leaving: set[RenderProcess] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._turns = Turns(num_workers // 2)
        self._retry: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Begins to start the workers."""
        missing = self._num_workers - len(self._idle) - len(self._busy) - len(self._starting)
        if self._closed or self._retry is not None:
            return
        for _ in range(missing):
            task = asyncio.ensure_future(self._spawn())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def render(self, template: TemplateSource, variables: Mapping[str, object]) -> str:
        """Returns the prompt's text; it holds its special tokens, so encode it without adding any.

        Args:
            template: The model's.
            variables: JSON values; see `template_variables`.

        Raises:
            InvalidRequestError: The template refuses these messages, takes too long or too much
                memory over them, or makes too much of them.
            QueueFullError: Too many wait for the same template.
            NotReadyError: No worker came to it in time, or somebody else kills them, or the server
                is shutting down.
        """
        if self._turns.num_waiting(template.digest) >= self._limits.max_waiting:
            raise QueueFullError("Too many requests wait for this model's chat template.")
        if _exceeds(variables, _MAX_INLINE_CHARS):
            encoded = await asyncio.to_thread(encode_variables, variables)
        else:
            encoded = encode_variables(variables)
        if self._closed:
            raise NotReadyError("The server is shutting down.")
        text: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        rendering = Rendering(template=template, variables=encoded, text=text)
        self._turns.add(rendering)
        self.start()
        self._dispatch()
        try:
            async with asyncio.timeout(self._limits.wait_s):
                return await text
        except TimeoutError as error:
            raise NotReadyError(
                "The server is too busy to render this model's chat template; try again later."
            ) from error
        finally:
            self._turns.forget(rendering)

    async def close(self) -> None:
        """Ends the workers; who still waits is refused."""
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        for rendering in self._turns.take_all():
            rendering.fail(NotReadyError("The server is shutting down."))
        await asyncio.gather(*self._starting, return_exceptions=True)
        workers = [*self._idle, *self._busy, *self._leaving]
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.gone for worker in workers))

    # --- turns --------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Gives idle workers to those whose turn it is."""
        while self._idle and (rendering := self._turns.next()) is not None:
            worker = self._idle.pop()
            self._busy[worker] = rendering
            self._ask(worker, rendering)

    def _ask(self, worker: RenderProcess, rendering: Rendering) -> None:
        if rendering.timer is not None:
            rendering.timer.cancel()
        template = rendering.template
        loop = asyncio.get_running_loop()
        rendering.timer = loop.call_later(self._limits.wall_s, self._give_up, worker, rendering)
        worker.ask(
            Task(
                template.digest,
                template.text if rendering.with_source else None,
                self._patience.limit_s(template.digest),
                rendering.variables,
            )
        )

    # --- workers ------------------------------------------------------------------------------

    async def _spawn(self) -> None:
        try:
            worker = await RenderProcess.spawn(
                self._command, on_reply=self._replied, on_gone=self._gone
            )
        except (OSError, RuntimeError) as error:
            logger.warning("no template worker can be started: %s", error)
            self._retry_later()
            return
        if worker.ended:  # `_gone` knows
            return
        self._idle.append(worker)
        self._dispatch()

    def _retry_later(self) -> None:
        if self._retry is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(_RETRY_SPAWN_S, self._start_again)

    def _start_again(self) -> None:
        self._retry = None
        self.start()

    def _replied(self, worker: RenderProcess, reply: Reply) -> None:
        rendering = self._busy.get(worker)
        if rendering is None:  # it has ended, and what it said last comes late
            return
        if reply.outcome is Outcome.UNKNOWN and not rendering.with_source:
            rendering.with_source = True
            self._ask(worker, rendering)
            return
        if reply.outcome is Outcome.RENDERED or reply.outcome is Outcome.REFUSED:
            self._release(worker)
            self._idle.append(worker)
            self._answer(rendering, reply)
            self._dispatch()
        else:
            worker.kill()  # it is of no more use; see `_gone`

    def _answer(self, rendering: Rendering, reply: Reply) -> None:
        if reply.outcome is Outcome.REFUSED:
            rendering.fail(InvalidRequestError(reply.text[:500], param="messages"))
        elif not rendering.text.done():
            rendering.text.set_result(reply.text)

    def _release(self, worker: RenderProcess) -> Rendering:
        """Returns what a worker was at, which it is no longer."""
        rendering = self._busy.pop(worker)
        if rendering.timer is not None:
            rendering.timer.cancel()
        self._turns.end(rendering)
        return rendering

    def _give_up(self, worker: RenderProcess, rendering: Rendering) -> None:
        rendering.late = True
        worker.kill()

    def _gone(self, worker: RenderProcess, status: int) -> None:
        self._leaving.add(worker)
        worker.gone.add_done_callback(lambda _: self._leaving.discard(worker))
        if worker in self._idle:
            self._idle.remove(worker)
        if worker in self._busy:
            # What bounds a template's memory makes its allocations fail; it sends no such signal.
            by_others = status == -signal.SIGKILL and not worker.is_killed
            self._lost(self._release(worker), status, by_others=by_others)
        if not worker.num_replies and status != -signal.SIGPROF:
            self._retry_later()  # it may be the same with the next
        self.start()
        self._dispatch()

    def _lost(self, rendering: Rendering, status: int, *, by_others: bool) -> None:
        """Decides about a request whose worker has ended."""
        if self._closed:
            rendering.fail(NotReadyError("The server is shutting down."))
        elif rendering.late or status == -signal.SIGPROF:
            self._refuse(rendering, "takes too long over")
        elif by_others and rendering.tried:
            logger.warning("a template worker was killed, and not by the server: out of memory?")
            rendering.fail(NotReadyError(_KILLED))
        elif not by_others and self._is_to_blame(rendering):
            self._refuse(rendering, "needs too much memory for")
        else:  # others may have filled the worker's memory, or the machine's: a new one tells
            rendering.tried, rendering.with_source = True, True
            self._turns.add_first(rendering)

    def _is_to_blame(self, rendering: Rendering) -> bool:
        return rendering.tried or self._patience.is_struck(rendering.template.digest)

    def _refuse(self, rendering: Rendering, what: str) -> None:
        """Ends a request whose template cost a worker, and trusts the template less."""
        digest = rendering.template.digest
        if self._patience.strike(digest):
            logger.warning(
                "chat template %s was stopped: it %s its messages; more of this is not told for "
                "some time",
                digest[:12],
                what,
            )
        rendering.fail(_refusal(what))


def _refusal(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The model's chat template {what} these messages. Send shorter or fewer ones.",
        param="messages",
    )


def _exceeds(value: object, num_chars: int) -> bool:
    """Says whether the texts in a JSON value are longer than so many characters together."""
    left, todo = num_chars, [value]
    while todo and left >= 0:
        one = todo.pop()
        if isinstance(one, str):
            left -= len(one)
        elif isinstance(one, dict | Mapping):  # asking about a mapping takes long, unless it is one
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
            left -= len(one)
    return left < 0
