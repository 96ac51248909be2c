"""The forward pass of one step, with what cannot be computed set apart from what can.

Computing a chunk again writes the same keys and values to the same pages, so a batch that fails is
simply halved until the chunks are found that fail alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from linker_core.engine.page_table import PageTable
from linker_core.engine.runner import Chunk, Runner
from linker_core.engine.schedule import Scheduled

_log = logging.getLogger(__name__)


class Computed(NamedTuple):
    """Chunks that were computed together."""

    chunks: Sequence[Scheduled]
    logits: torch.Tensor  # `num_logits` rows of each chunk, in their order
    finite: Sequence[bool]  # whether every row of a chunk came out finite


@dataclass(slots=True)
class StepRun:
    """What became of a step's chunks."""

    computed: list[Computed] = field(default_factory=list)
    failed: list[Scheduled] = field(default_factory=list)


def compute(runner: Runner, chunks: Sequence[Scheduled]) -> StepRun:
    """Computes the chunks, together if possible.

    Args:
        runner: Of the family.
        chunks: Not empty, not advanced over yet.

    Returns:
        Every chunk, once: computed, or failed although it was tried alone.
    """
    run = StepRun()
    _compute(runner, chunks, run)
    return run


def still_works(runner: Runner) -> bool:
    """Says whether a single token of any model can be computed.

    That tells requests that cannot be computed from a device that no longer computes anything.

    Args:
        runner: Of the family; at least one page of its cache is free.
    """
    table = PageTable()
    has_room = runner.cache.grow(table, 1)
    assert has_room, "what failed has given its pages back"
    try:
        return any(_computes(runner, slot, table) for slot in runner.model.slots)
    finally:
        runner.cache.release(table)


def _computes(runner: Runner, slot: int, table: PageTable) -> bool:
    try:
        runner.forward([Chunk(slot=slot, token_ids=[0], start=0, table=table, num_logits=1)])
    except Exception:  # noqa: BLE001 - to know whether it fails is the purpose
        _log.exception("not even a single token of slot %d can be computed", slot)
        return False
    return True


def _compute(runner: Runner, chunks: Sequence[Scheduled], run: StepRun) -> None:
    try:
        run.computed.append(_forward(runner, chunks))
        return
    except Exception as error:  # noqa: BLE001 - whatever failed, it must end its own chunks alone
        if len(chunks) == 1:
            _log.exception("a forward pass failed for request %s", chunks[0].sequence.request_id)
            run.failed.append(chunks[0])
            return
        _log.warning("a forward pass of %d chunks failed: %s", len(chunks), type(error).__name__)
    # Out of the clause, where the exception would hold on to the tensors of the failed pass.
    middle = len(chunks) // 2
    _compute(runner, chunks[:middle], run)
    _compute(runner, chunks[middle:], run)


def _forward(runner: Runner, chunks: Sequence[Scheduled]) -> Computed:
    result = runner.forward([_as_chunk(chunk) for chunk in chunks])
    return Computed(chunks, result.logits_RV, result.finite)


def _as_chunk(scheduled: Scheduled) -> Chunk:
    sequence, num_tokens = scheduled
    start = sequence.num_computed
    return Chunk(
        slot=sequence.slot,
        token_ids=sequence.tokens[start : start + num_tokens],
        start=start,
        table=sequence.table,
        num_logits=scheduled.num_logits,
    )
