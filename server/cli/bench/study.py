"""What streams feel of the study worker beside them, and what it keeps in memory.

The worker is the one that a server starts, told that sequences run as a server would tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from linker_core.errors import EngineFailureError
from linker_core.pace import Spent
from linker_core.weights.checkpoint import Checkpoint
from server.cli.bench import process_tree
from server.cli.bench.memory import private_bytes
from server.cli.bench.residency import Gaps, client_of, serving_models, streaming
from server.cli.bench.scenario import Settings
from server.cli.bench.synthetic import Kinship
from server.studies.files import Place, Places
from server.studies.worker import STUDY_COMMAND, Listener, Order, StudyWorker

_NUM_VARIANTS: Final = 3  # the fewest that PC1 needs
_SAMPLE_S: Final = 0.01
_BEGINNING_S: Final = 600


def measure_decode(settings: Settings) -> dict[str, Any]:
    """Streams of the base alone and beside a study of it and three variants, in turn."""
    base, *variants = settings.family(Kinship.NEAR, _NUM_VARIANTS + 1)
    worker = _Worker(_order(base, variants))
    alone_ms: list[float] = []
    beside_ms: list[float] = []
    with serving_models([base]) as server, client_of(server):
        server.warm_up()
        for _ in range(settings.rounds):
            alone, beside = Gaps(), Gaps()
            with streaming(server, settings, alone):
                alone.until(4 * settings.tokens)
            with worker.at_work(), streaming(server, settings, beside):
                beside.until(4 * settings.tokens)
            alone_ms.append(median(alone.values) * 1e3)
            beside_ms.append(median(beside.values) * 1e3)
            print(
                f"median gap alone {alone_ms[-1]:.1f} ms, beside the study {beside_ms[-1]:.1f} ms",
                file=sys.stderr,
            )
        command = str(server.kind.launch)
    spent = worker.spent
    return {
        "command": command,
        "alone_ms": alone_ms,
        "beside_ms": beside_ms,
        # Of the tokens a second of each stream; at most 1 but for noise.
        "rate_ratio": median(a / b for a, b in zip(alone_ms, beside_ms, strict=True)),
        "rate_ratios": [a / b for a, b in zip(alone_ms, beside_ms, strict=True)],
        "cpu_per_busy_s": spent.busy_cpu_s / spent.busy_s,
        "num_records": worker.num_records,
        "peak_private_mib": worker.peak_bytes / 2**20,
    }


def _order(base: Path, variants: Sequence[Path]) -> Order:
    places = Places(base=_place(base), variants={path.name: _place(path) for path in variants})
    return Order(base_name=base.name, places=places, done=deque())


def _place(path: Path) -> Place:
    with Checkpoint.open(path) as checkpoint:
        return Place(path=path, identity=checkpoint.identity)


@dataclass
class _Worker:
    """Workers of one study, one after the other for as long as they are wanted.

    Attributes:
        order: What each of them studies, from the beginning.
        spent: By all of them so far.
        num_records: That all of them have said.
        peak_bytes: The most private memory that one of them held.
    """

    order: Order
    spent: Spent = field(default_factory=Spent)
    num_records: int = 0
    peak_bytes: int = 0
    _begun: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keeps a worker at work, from its first record on until the block ends.

        Raises:
            LinkerError: Why the worker has failed, before its first record or in the block.
        """
        self._begun.clear()
        loop = asyncio.new_event_loop()
        work = loop.create_task(self._work())
        thread = threading.Thread(target=self._run, args=(loop, work))
        thread.start()
        try:
            if not self._begun.wait(_BEGINNING_S):
                raise EngineFailureError("The study worker has found nothing in ten minutes.")
            if work.done():
                work.result()
            yield
        finally:
            loop.call_soon_threadsafe(work.cancel)
            thread.join()
            loop.close()
            if not work.cancelled():
                work.result()  # it works until it is told to end, unless it cannot

    def _run(self, loop: asyncio.AbstractEventLoop, work: asyncio.Task[None]) -> None:
        loop.run_until_complete(asyncio.wait([work]))
        self._begun.set()  # nobody need wait for what will not come

    async def _work(self) -> None:
        watching = asyncio.ensure_future(self._watch())
        worker = StudyWorker(busy=lambda: True)
        try:
            while True:
                before = self.spent
                await worker.run(self.order, self._listener(before))
        finally:
            watching.cancel()

    def _listener(self, before: Spent) -> Listener:
        def on_spent(spent: Spent) -> None:
            self.spent = Spent(*(a + b for a, b in zip(before, spent, strict=True)))

        def on_record(_name: str, _record: object) -> None:
            self.num_records += 1
            self._begun.set()

        return Listener(on_opened=_ignore, on_record=on_record, on_spent=on_spent)

    async def _watch(self) -> None:
        while True:
            for pid in process_tree.members(os.getpid()):
                if _is_worker(pid):
                    self.peak_bytes = max(self.peak_bytes, private_bytes(pid))
            await asyncio.sleep(_SAMPLE_S)


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return STUDY_COMMAND[-1].encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def _ignore(_num_tensors: int) -> None:
    """How many tensors there are is known."""


SCENARIOS: Final = {"decode": measure_decode}
