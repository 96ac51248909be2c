"""The engine's state as the server's gauges show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from linker_core.engine.messages import ModelLoad, Snapshot
from linker_core.engine.residents import Residents
from linker_core.engine.sequence import SequenceState


def take_snapshot(
    residents: Residents, sequences: Iterable[SequenceState], device: torch.device
) -> Snapshot:
    """Returns bytes and loads of every served model, and what is left.

    Args:
        residents: The models.
        sequences: All that were submitted and have not ended; what does not run waits, be it for
            room or for its grammar.
        device: Where everything lies.
    """
    families = list(residents.families.values())
    running = Counter(s.model for family in families for s in family.scheduler.running)
    present = Counter(sequence.model for sequence in sequences)
    num_pages = sum(family.cache.shape.num_pages for family in families)
    num_used = sum(family.cache.num_used_pages for family in families)
    batch_variants = sum(
        (family.batch_variants for family in families), Counter(residents.past_batch_variants)
    )
    return Snapshot(
        models={name: residents.bytes_of(name) for name in residents.served},
        load={
            name: ModelLoad(running=running[name], waiting=present[name] - running[name])
            for name in residents.served
        },
        device=str(device),
        device_weight_bytes=residents.pool.ledger.resident_bytes(),
        device_kv_bytes=residents.pool.budget.kv_bytes(),
        device_free_bytes=residents.pool.budget.free_bytes(),
        leaving_bytes=residents.leaving_bytes(),
        arriving_bytes=residents.pool.budget.arriving_bytes(),
        reserved_bytes=residents.pool.budget.reserved_bytes(),
        kv_usage_ratio=num_used / num_pages if num_pages else 0.0,
        num_preemptions=residents.past_preemptions
        + sum(family.scheduler.num_preemptions for family in families),
        prefix_queries=residents.past_prefix_queries
        + sum(family.scheduler.prefix_queries for family in families),
        prefix_hits=residents.past_prefix_hits
        + sum(family.scheduler.prefix_hits for family in families),
        batch_variants=dict(batch_variants),
    )
