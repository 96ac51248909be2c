"""A scheduler whose model is arithmetic: what a page holds says of which tokens it was computed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np
import torch

from linker_core.engine.kv_cache import KVCache, KVShape
from linker_core.engine.messages import SamplingParams
from linker_core.engine.prefix import key_root
from linker_core.engine.schedule import Schedule, Scheduled
from linker_core.engine.scheduler import Scheduler
from linker_core.engine.sequence import SequenceState

PAGE_TOKENS = 4
NUM_CHOICES = 3  # tokens that the model chooses among: few, so that answers agree now and then

_ARRIVALS = itertools.count()


def make_cache(num_pages: int, page_tokens: int = PAGE_TOKENS) -> KVCache:
    shape = KVShape(
        num_pages=num_pages,
        page_tokens=page_tokens,
        num_layers=2,
        num_kv_heads=3,
        head_dim=5,
        dtype=torch.float32,
    )
    return KVCache(shape, device=torch.device("cpu"))


def make_sequence(
    prompt: Sequence[int] = (1,),
    *,
    slot: int = 0,
    salt: str = "",
    priority: int = 0,
    tenant: str = "",
    sampling: SamplingParams | None = None,
) -> SequenceState:
    arrival = next(_ARRIVALS)
    return SequenceState(
        request_id=f"r{arrival}",
        model=f"m{slot}",
        slot=slot,
        vocab_size=100,
        tokens=list(prompt),
        num_prompt=len(prompt),
        sampling=sampling or SamplingParams(max_tokens=9),
        arrival=arrival,
        priority=priority,
        tenant=tenant,
        key_root=key_root(plan_fingerprint=f"plan {slot}", slot=slot, salt=salt),
    )


def contents(sequence: SequenceState, num_tokens: int) -> list[int]:
    """What lies at each position: all tokens up to it, and whose they are."""
    assert sequence.key_root is not None
    value = int.from_bytes(sequence.key_root[:7], "little")
    values = []
    for token in sequence.tokens[:num_tokens]:
        value = hash((value, token))
        values.append(value)
    return values


def answer(sequence: SequenceState) -> list[int]:
    """The tokens that the model chooses when it computes a sequence alone."""
    alone = make_sequence(sequence.tokens[: sequence.num_prompt])
    alone.key_root = sequence.key_root
    for _ in range(sequence.sampling.max_tokens):
        alone.tokens.append(contents(alone, len(alone.tokens))[-1] % NUM_CHOICES)
    return alone.tokens[alone.num_prompt :]


class Simulation:
    """Steps a scheduler as a family does, and looks after every step whether all is well."""

    def __init__(
        self, *, num_pages: int = 64, rows: int = 8, num_seqs: int = 4, page_tokens: int = 4
    ) -> None:
        self.cache = make_cache(num_pages, page_tokens)
        self.scheduler = Scheduler(self.cache, max_batch_tokens=rows, max_num_seqs=num_seqs)
        self.rows, self.num_logits = rows, min(num_seqs, rows)
        self.memory = np.zeros((num_pages, page_tokens), dtype=np.int64)
        self.num_computed_tokens = 0
        self.finished: list[SequenceState] = []
        self.failed: list[SequenceState] = []

    def submit(
        self,
        prompt: Sequence[int] | int,
        *,
        slot: int = 0,
        salt: str = "",
        priority: int = 0,
        tenant: str = "",
        max_tokens: int = 9,
        prompt_logprobs: int | None = None,
    ) -> SequenceState:
        """Queues a prompt; a number means one of that length that shares nothing."""
        sequence = make_sequence(
            [10 + next(_ARRIVALS), *([1] * (prompt - 1))] if isinstance(prompt, int) else prompt,
            slot=slot,
            salt=salt,
            priority=priority,
            tenant=tenant,
            sampling=SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self, *, faulty: Collection[SequenceState] = ()) -> dict[SequenceState, int]:
        """Computes one step; returns how many tokens of whom.

        Args:
            faulty: What is computed of these is not finite.
        """
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self._check_budget(plan)
        self.failed += [sequence for sequence, _ in plan.failed]
        tokens = {chunk: self._compute(chunk, chunk.sequence in faulty) for chunk in plan.chunks}
        for chunk, token in tokens.items():
            if chunk.sequence in faulty:
                self.scheduler.remove(chunk.sequence)
                self.failed.append(chunk.sequence)
                continue
            asked = chunk.wants_token
            self.scheduler.advance(chunk)
            self.scheduler.commit(chunk.sequence)
            if asked and chunk.sequence.append(token) is not None:
                self.scheduler.remove(chunk.sequence)
                self.finished.append(chunk.sequence)
        self.scheduler.check_integrity()
        return {chunk.sequence: chunk.num_tokens for chunk in plan.chunks}

    def run(self, max_steps: int = 10_000) -> int:
        """Steps until nothing is left; returns how many steps that took."""
        for step in range(max_steps):
            if not self.scheduler.running and not self.scheduler.waiting:
                return step
            self.step()
        raise AssertionError("the sequences do not end")

    def _check_budget(self, plan: Schedule) -> None:
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= self.rows
        assert sum(chunk.num_logits for chunk in plan.chunks) <= self.num_logits
        slots = [chunk.sequence.slot for chunk in plan.chunks]
        assert slots == sorted(slots)
        assert all(chunk.num_tokens >= 1 for chunk in plan.chunks)

    def _compute(self, chunk: Scheduled, faulty: bool) -> int:
        """Reads what lies before a chunk, writes the chunk, and chooses a token."""
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        end = start + chunk.num_tokens
        want = contents(sequence, end)
        assert self._lines(sequence, start) == want[:start], "another's keys and values are read"
        for position in range(start, end):
            page, offset = divmod(position, self.cache.shape.page_tokens)
            value = -1 if faulty else want[position]
            self.memory[sequence.table.pages[page], offset] = value
        self.num_computed_tokens += chunk.num_tokens
        return int(self._lines(sequence, end)[-1]) % NUM_CHOICES

    def _lines(self, sequence: SequenceState, num_tokens: int) -> list[int]:
        lines: list[int] = self.memory[sequence.table.pages].reshape(-1)[:num_tokens].tolist()
        return lines
