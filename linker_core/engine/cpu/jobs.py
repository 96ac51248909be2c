"""Emits the search for the job of a piece of work: several jobs are one region's."""

from __future__ import annotations

from llvmlite import ir

from linker_core.engine.cpu.emitter import I64, Emitter, Variable

NEVER = 1 << 62  # the first piece of a last record, which ends the jobs and is none


def seek(e: Emitter, job: Variable, number: ir.Value, *, num_words: int, first_piece: int) -> None:
    """Moves on to the job of a piece. A thread's numbers only grow.

    Args:
        e: Where it goes.
        job: Address of a record; another whose first piece is `NEVER` ends them.
        number: Of the piece.
        num_words: Of a record.
        first_piece: Which word of a record says where its pieces begin.
    """
    b = e.builder
    head, move, end = (b.append_basic_block(name) for name in ("seek", "move", "found"))
    b.branch(head)
    b.position_at_end(head)
    following = e.at(job.get(), num_words, I64)
    passed = b.icmp_signed(">=", number, e.field(following, first_piece))
    b.cbranch(passed, move, end)
    b.position_at_end(move)
    job.set(following)
    b.branch(head)
    b.position_at_end(end)
