"""Which sequences run: what they find in the cache, who gets in, and who is put back for whom.

Knows pages and prefixes; whose turn it is to ask is the scheduler's to say.
"""

from __future__ import annotations

from collections.abc import Iterable

from linker_core.engine.fair_share import FairShare, Lane
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.preemption import victims_to_admit, victims_to_go_on, worst
from linker_core.engine.sequence import SequenceState


class Occupancy:
    """Moves sequences of all lanes between waiting and running.

    Args:
        lanes: Everybody's sequences.
        cache: The pages; grown, shared and released here and nowhere else.
        max_num_seqs: Sequences running at once.
    """

    def __init__(self, lanes: FairShare, cache: KVCache, *, max_num_seqs: int) -> None:
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._lanes = lanes
        self._cache = cache
        self._page_tokens = cache.shape.page_tokens
        self._max_num_seqs = max_num_seqs

    def can_ever_hold(self, sequence: SequenceState) -> bool:
        """Whether a waiting sequence would fit if nothing else ran."""
        return self._cache.pages_for(len(sequence.tokens)) <= self._cache.shape.num_pages

    def hold_back(self, lane: Lane, sequence: SequenceState) -> bool:
        """Lets the first of a queue wait for a page that is being computed, if there is one."""
        keys = self._readable_keys(sequence)
        if not lane.turns.hold_back(sequence, keys[len(self._cache.find(keys)) :]):
            return False
        taken = lane.queue.pop()
        assert taken is sequence
        return True

    def make_room(self, sequence: SequenceState) -> list[SequenceState]:
        """Preempts for a waiting sequence where that is fair and enough; returns whom."""
        preempted: list[SequenceState] = []
        while not self._has_room(sequence):
            candidates = victims_to_admit(self._lanes, sequence)
            if not self._would_suffice(candidates, sequence):
                break
            preempted.append(self._preempt_worst(candidates))
        return preempted

    def admit(self, lane: Lane, sequence: SequenceState) -> bool:
        """Lets the first of a queue run, with pages for all it has; False if there is no room."""
        if not self._has_room(sequence):
            return False
        taken = lane.queue.pop()
        assert taken is sequence
        found = self._cache.find(self._readable_keys(sequence))
        self._cache.share(sequence.table, found)
        grown = self._cache.grow(sequence.table, len(sequence.tokens))
        assert grown
        sequence.num_committed = len(found)
        sequence.num_computed = len(found) * self._page_tokens
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            if sequence.key_root is not None and not sequence.wants_prompt_rows:
                self.prefix_queries += sequence.num_prompt
                self.prefix_hits += sequence.num_cached
        lane.running[sequence] = None
        lane.turns.claim(sequence, self.keys(sequence)[len(found) :])
        return True

    def grow(self, sequence: SequenceState) -> list[SequenceState]:
        """Gives a running sequence room for its last token; returns who was preempted for it.

        It may be among them.
        """
        preempted: list[SequenceState] = []
        while sequence not in preempted:
            if self._cache.grow(sequence.table, len(sequence.tokens)):
                break
            preempted.append(self._preempt_worst(victims_to_go_on(self._lanes)))
        return preempted

    def commit(self, lane: Lane, sequence: SequenceState) -> None:
        """Lets others find the full pages of a running sequence."""
        num_full = sequence.num_computed // self._page_tokens
        if num_full == sequence.num_committed:
            return
        keys = sequence.page_keys.first(num_full, sequence.tokens, self._page_tokens)
        for index in range(sequence.num_committed, len(keys)):
            self._cache.commit(sequence.table, index, keys[index])
            _requeue(lane, lane.turns.settle(keys[index]))
        sequence.num_committed = num_full

    def stop(self, lane: Lane, sequence: SequenceState) -> None:
        """Takes the pages of a running sequence; what was committed can still be found."""
        del lane.running[sequence]
        _requeue(lane, lane.turns.leave(sequence, self.keys(sequence)[sequence.num_committed :]))
        self._cache.release(sequence.table)
        sequence.num_computed = sequence.num_committed = 0

    def keys(self, sequence: SequenceState) -> list[bytes]:
        """Returns the keys of all pages that a sequence's tokens fill."""
        num_pages = len(sequence.tokens) // self._page_tokens
        return sequence.page_keys.first(num_pages, sequence.tokens, self._page_tokens)

    def _readable_keys(self, sequence: SequenceState) -> list[bytes]:
        """Returns the keys of the pages that it need not compute, if they are there."""
        if sequence.wants_prompt_rows:
            return []
        # The logits of its last token are needed, so that one is always computed.
        num_pages = (len(sequence.tokens) - 1) // self._page_tokens
        return sequence.page_keys.first(num_pages, sequence.tokens, self._page_tokens)

    def _has_room(self, sequence: SequenceState) -> bool:
        num_running = self._lanes.num_running
        if num_running == 0:
            return True
        # A page for each that runs, so that admission does not preempt at once.
        num_pages = self._num_claimed(sequence) + num_running
        return num_running < self._max_num_seqs and num_pages <= self._cache.num_free_pages

    def _num_claimed(self, sequence: SequenceState) -> int:
        found = self._cache.find(self._readable_keys(sequence))
        return self._cache.num_claimed(len(sequence.tokens), found)

    def _would_suffice(self, candidates: list[SequenceState], sequence: SequenceState) -> bool:
        """Whether there is room for a sequence once all candidates are gone."""
        num_left = self._lanes.num_running - len(candidates)
        freed = self._cache.freed_without([candidate.table for candidate in candidates])
        found = self._cache.find(self._readable_keys(sequence))
        num_pages = self._num_claimed(sequence) + num_left + len(freed.intersection(found))
        return bool(candidates) and num_pages <= self._cache.num_free_pages + len(freed)

    def _preempt_worst(self, candidates: list[SequenceState]) -> SequenceState:
        """Puts one of the candidates back; it will be recomputed, its tokens so far kept."""
        lacks_pages = self._lanes.num_running < self._max_num_seqs
        share = _pages_held if lacks_pages else _places_held
        victim = worst(candidates, self._lanes, share)
        lane = self._lanes[victim.lane]
        self.stop(lane, victim)
        lane.queue.push(victim)
        self.num_preemptions += 1
        return victim


def _requeue(lane: Lane, resumed: Iterable[SequenceState]) -> None:
    for sequence in resumed:
        lane.queue.push(sequence)


def _pages_held(lane: Lane) -> int:
    return lane.num_pages


def _places_held(lane: Lane) -> int:
    return len(lane.running)
