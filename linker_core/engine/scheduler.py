"""Continuous batching of one family: which tokens of which sequences the next step computes.

Every decoding sequence gets its token; what is left of the step goes to prompts, running ones and
waiting ones alike, by priority and then to the lane that was served least. When pages run out a
sequence gives its own back and is recomputed later. Knows no tensor.
"""

from __future__ import annotations

from linker_core.engine.fair_share import FairShare, Lane
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.occupancy import Occupancy
from linker_core.engine.schedule import Budget, Failed, Schedule, Scheduled
from linker_core.engine.sequence import SequenceState
from linker_core.errors import InsufficientCapacityError, LinkerError

_MAX_LAG_STEPS = 8  # what a lane may be behind others, in steps of its own

_Prompts = dict[Lane, list[SequenceState]]  # running, to be computed further; most urgent last


class Scheduler:
    """Plans the steps of one family.

    Args:
        cache: The family's pages; grown, shared and released here and nowhere else.
        max_batch_tokens: Rows of a step, at least 1.
        max_num_seqs: Sequences running at once and rows of logits of a step, at least 1.
    """

    def __init__(self, cache: KVCache, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.cache = cache
        # Every running sequence decodes in every step, so more than the rows of one cannot run.
        self._max_num_seqs = min(max_num_seqs, max_batch_tokens)
        self._max_batch_tokens = max_batch_tokens
        self._lanes = FairShare(_MAX_LAG_STEPS * max_batch_tokens)
        self._occupancy = Occupancy(self._lanes, cache, max_num_seqs=self._max_num_seqs)

    @property
    def running(self) -> list[SequenceState]:
        """The sequences that hold pages, those of one slot together."""
        return self._lanes.running()

    @property
    def waiting(self) -> list[SequenceState]:
        """The sequences that hold none, in no order."""
        return [sequence for lane in self._lanes for sequence in lane.waiting()]

    @property
    def num_preemptions(self) -> int:
        """Sequences put back to make room."""
        return self._occupancy.num_preemptions

    @property
    def prefix_queries(self) -> int:
        """Prompt tokens looked up in the cache, each sequence's once."""
        return self._occupancy.prefix_queries

    @property
    def prefix_hits(self) -> int:
        """Prompt tokens found there."""
        return self._occupancy.prefix_hits

    def add(self, sequence: SequenceState) -> None:
        """Queues a new sequence."""
        # Hashed one by one as they come, so that no step has to hash for thousands.
        self._occupancy.keys(sequence)
        self._lanes.add(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forgets a finished, failed or aborted sequence and frees its pages."""
        lane = self._lanes[sequence.lane]
        if sequence in lane.running:
            self._occupancy.stop(lane, sequence)
        elif sequence in lane.queue:
            lane.queue.discard(sequence)
        else:
            lane.turns.discard(sequence)
        self._lanes.drop_if_empty(lane)

    def schedule(self) -> Schedule:
        """Plans one step; every chunk has pages for all its positions."""
        plan = Schedule()
        budget = Budget(num_rows=self._max_batch_tokens, num_logits=self._max_num_seqs)
        self._lanes.forgive()
        self._grow_decodes()
        prompts = self._plan_decodes(budget)
        self._plan_prompts(plan, budget, prompts)
        plan.chunks = budget.chunks(self._lanes.running())
        return plan

    def advance(self, chunk: Scheduled) -> None:
        """Records that a chunk was computed."""
        chunk.sequence.num_computed += chunk.num_tokens

    def commit(self, sequence: SequenceState) -> None:
        """Lets others use the full pages of a running sequence; all its rows so far are finite."""
        self._occupancy.commit(self._lanes[sequence.lane], sequence)

    def check_integrity(self) -> None:
        """Asserts that sequences, pages and limits agree."""
        self.cache.check_integrity()
        self._lanes.check_integrity()
        assert len(self.running) <= self._max_num_seqs
        assert all(len(s.table) == s.num_computed == s.num_committed == 0 for s in self.waiting)
        for sequence in self.running:
            assert sequence.num_missing >= 1
            assert len(sequence.table) >= self.cache.pages_for(sequence.num_computed)
            self.cache.check_writable(sequence.table, sequence.num_computed)
        held = {page for sequence in self.running for page in sequence.table.pages.tolist()}
        assert len(held) == self.cache.num_used_pages

    def _grow_decodes(self) -> None:
        """Gives every decoding sequence room for its token, or takes the pages of some."""
        page_tokens = self.cache.shape.page_tokens
        # Whoever computes its prompt has had its pages since it was admitted.
        growing = [s for s in self.running if len(s.tokens) > len(s.table) * page_tokens]
        preempted: list[SequenceState] = []
        for sequence in growing:
            if sequence not in preempted:
                preempted += self._occupancy.grow(sequence)

    def _plan_decodes(self, budget: Budget) -> _Prompts:
        """Plans the decodes; returns who still computes its prompt."""
        prompts: _Prompts = {}
        for lane in self._lanes:
            decodes = [sequence for sequence in lane.running if sequence.num_missing == 1]
            budget.take_one_each(decodes)
            lane.service += len(decodes)
            if len(decodes) < len(lane.running):
                unfinished = [s for s in lane.running if s.num_missing > 1]
                prompts[lane] = sorted(unfinished, key=_urgency, reverse=True)
        return prompts

    def _plan_prompts(self, plan: Schedule, budget: Budget, prompts: _Prompts) -> None:
        may_admit = True
        while budget.num_rows > 0:
            sequence = self._next(prompts, may_admit)
            if sequence is None:
                return
            lane = self._lanes[sequence.lane]
            self._lanes.take_turn(lane)
            if sequence in lane.running:
                prompts[lane].pop()
            elif self._set_aside(lane, sequence, plan):
                continue
            elif not self._admit(lane, sequence, budget, prompts):
                # Nobody goes past it, so that room comes together for it.
                may_admit = False
                continue
            lane.service += budget.take(sequence)

    def _next(self, prompts: _Prompts, may_admit: bool) -> SequenceState | None:
        """Returns whose prompt is to be computed next, running or waiting."""
        best: SequenceState | None = None
        best_rank: tuple[int, ...] = ()
        for lane in self._lanes:
            candidates = [prompts[lane][-1]] if prompts.get(lane) else []
            head = lane.queue.head() if may_admit else None
            if head is not None:
                candidates.append(head)
            for candidate in candidates:
                rank = (candidate.priority, lane.service, lane.last_turn, candidate.arrival)
                if best is None or rank < best_rank:
                    best, best_rank = candidate, rank
        return best

    def _set_aside(self, lane: Lane, sequence: SequenceState, plan: Schedule) -> bool:
        """Takes the first of a queue out of it if it cannot run at all, or had better wait."""
        if self._occupancy.can_ever_hold(sequence):
            return self._occupancy.hold_back(lane, sequence)
        self.remove(sequence)
        plan.failed.append(Failed(sequence, self._too_long(sequence)))
        return True

    def _admit(
        self, lane: Lane, sequence: SequenceState, budget: Budget, prompts: _Prompts
    ) -> bool:
        for victim in self._occupancy.make_room(sequence):
            victims_lane = self._lanes[victim.lane]
            victims_lane.service -= budget.withdraw(victim)
            if victim in prompts.get(victims_lane, ()):
                prompts[victims_lane].remove(victim)
        return self._occupancy.admit(lane, sequence)

    def _too_long(self, sequence: SequenceState) -> LinkerError:
        return InsufficientCapacityError(
            f"The sequence needs {len(sequence.tokens)} token slots of the KV cache, which has "
            f"{self.cache.shape.num_tokens} in all. Shorten the prompt or raise kv_cache_tokens."
        )


def _urgency(sequence: SequenceState) -> tuple[int, int]:
    return sequence.urgency
