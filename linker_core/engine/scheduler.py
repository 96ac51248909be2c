"""Continuous batching of one family: which tokens of which sequences the next step computes.

Decodes come first, then prefill chunks, then waiting sequences in their order. When pages run out
the newest sequence gives its pages back and is recomputed later. Knows no tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from linker_core.engine.kv_cache import KVCache
from linker_core.engine.sequence import SequenceState
from linker_core.errors import InsufficientCapacityError, LinkerError


class Scheduled(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: SequenceState
    num_tokens: int

    @property
    def wants_token(self) -> bool:
        """Whether the step completes what is needed to choose the next token."""
        return self.num_tokens == self.sequence.num_missing


class Failed(NamedTuple):
    """A sequence that can never run; it is no longer scheduled."""

    sequence: SequenceState
    error: LinkerError


@dataclass(slots=True)
class Schedule:
    """What one step does; `chunks` keep the rows of one slot together."""

    chunks: list[Scheduled] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)


class Scheduler:
    """Plans the steps of one family.

    Args:
        cache: The family's pages; grown and released here and nowhere else.
        max_batch_tokens: Rows of a step, at least 1.
        max_num_seqs: Sequences running at once, at least 1.
    """

    def __init__(self, cache: KVCache, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.cache = cache
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []  # by arrival
        self.num_preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        # Every running sequence decodes in every step, so more than the rows of one cannot run.
        self._max_num_seqs = min(max_num_seqs, max_batch_tokens)

    def add(self, sequence: SequenceState) -> None:
        """Queues a sequence behind those that are waiting."""
        self.waiting.append(sequence)

    def sequences(self) -> Iterator[SequenceState]:
        """Yields every sequence, running or waiting."""
        yield from self.running
        yield from self.waiting

    def remove(self, sequence: SequenceState) -> None:
        """Forgets a finished, failed or aborted sequence and frees its pages."""
        self.cache.release(sequence.table)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> Schedule:
        """Plans one step; every chunk has pages for all its positions."""
        plan = Schedule()
        preempted = self._plan_decodes(plan)
        self._plan_prefills(plan)
        # What was just given back belongs to the older sequences, not to who gave it.
        if not preempted:
            self._admit(plan)
        plan.chunks.sort(key=lambda chunk: chunk.sequence.slot)
        return plan

    def advance(self, chunk: Scheduled) -> None:
        """Records that a chunk was computed."""
        chunk.sequence.num_computed += chunk.num_tokens

    def check_integrity(self) -> None:
        """Asserts that sequences, pages and limits agree."""
        self.cache.check_integrity()
        assert len(self.running) <= self._max_num_seqs
        assert [s.arrival for s in self.running] == sorted(s.arrival for s in self.running)
        assert not set(self.running) & set(self.waiting)
        assert all(not s.table.pages and s.num_computed == 0 for s in self.waiting)
        for sequence in self.running:
            assert sequence.num_missing >= 1
            pages = self.cache.pages_for(sequence.num_computed)
            assert len(sequence.table.pages) >= pages
        held = sum(len(sequence.table.pages) for sequence in self.running)
        assert held == self.cache.num_used_pages

    def _plan_decodes(self, plan: Schedule) -> bool:
        """Plans one token for every decoding sequence; returns whether any had to be preempted."""
        preempted = False
        for sequence in list(self.running):
            if sequence.num_missing != 1:
                continue
            # The newest goes first: the one that asks or one that is yet to be planned, never one
            # that is planned, since those are older.
            while sequence in self.running and not self._grow(sequence):
                self._preempt(self.running[-1])
                preempted = True
            if sequence in self.running:
                plan.chunks.append(Scheduled(sequence, 1))
        return preempted

    def _plan_prefills(self, plan: Schedule) -> None:
        for sequence in self.running:
            budget = self._budget(plan)
            if budget == 0:
                return
            if sequence.num_missing > 1:
                # Its pages were claimed whole when it was admitted.
                plan.chunks.append(Scheduled(sequence, min(budget, sequence.num_missing)))

    def _admit(self, plan: Schedule) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            budget = self._budget(plan)
            if budget == 0:
                return
            sequence = self.waiting[0]
            needed = self.cache.pages_for(len(sequence.tokens))
            if needed > self.cache.shape.num_pages:
                self.waiting.popleft()
                plan.failed.append(Failed(sequence, self._too_long(sequence)))
                continue
            # A page for each that runs, so that admission does not preempt at once.
            if needed + len(self.running) > self.cache.num_free_pages and self.running:
                return
            grown = self._grow(sequence)
            assert grown
            self.waiting.popleft()
            self._insert_running(sequence)
            plan.chunks.append(Scheduled(sequence, min(budget, sequence.num_missing)))

    def _insert_running(self, sequence: SequenceState) -> None:
        self.running.append(sequence)
        # A preempted sequence is older than those that were submitted behind it.
        self.running.sort(key=lambda other: other.arrival)

    def _budget(self, plan: Schedule) -> int:
        return self._max_batch_tokens - sum(chunk.num_tokens for chunk in plan.chunks)

    def _grow(self, sequence: SequenceState) -> bool:
        return self.cache.grow(sequence.table, len(sequence.tokens))

    def _preempt(self, sequence: SequenceState) -> None:
        """Takes the pages of a running sequence; it will be recomputed, its tokens so far kept."""
        self.running.remove(sequence)
        self.cache.release(sequence.table)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _too_long(self, sequence: SequenceState) -> LinkerError:
        return InsufficientCapacityError(
            f"The sequence needs {len(sequence.tokens)} token slots of the KV cache, which has "
            f"{self.cache.shape.num_tokens} in all. Shorten the prompt or raise kv_cache_tokens."
        )
