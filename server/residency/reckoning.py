"""Who has to leave so that something fits. Knows models, bytes and who leans on whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linker_core.residency.eviction import Candidate, Policy, by_bytes_and_idle_time, choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A model that holds memory of the device."""

    name: str
    donor: str | None
    nbytes: int  # that its leaving gives back, once nobody leans on it
    idle_s: float
    idle: bool  # nothing but those that lean on it keep it from being evicted
    passing: bool  # not idle, but only for as long as what runs now


def who_leaves(
    holders: Sequence[Holder],
    needed_bytes: int,
    free_bytes: int,
    policy: Policy = by_bytes_and_idle_time,
) -> list[str] | None:
    """Returns the fewest who must leave, in an order in which they can; None if all would not do.

    A donor leaves after those that lean on it, and only where they alone would not do.
    """
    leaves, donors = _leavers(holders)
    chosen = choose(_candidates(leaves), needed_bytes, free_bytes, policy)
    if chosen is not None:
        return [candidate.model for candidate in chosen]
    order = policy(_candidates(leaves)) + policy(_candidates(donors))
    missing = needed_bytes - free_bytes - sum(candidate.unique_bytes for candidate in order)
    if missing > 0:
        return None
    donor_of = {holder.name: holder.donor for holder in leaves}
    leaving = {candidate.model: candidate for candidate in order}
    for candidate in reversed(order):  # donors first: while they leave, all that lean on them do
        superfluous = missing + candidate.unique_bytes <= 0
        if superfluous and donor_of.get(candidate.model) not in leaving:
            del leaving[candidate.model]
            missing += candidate.unique_bytes
    return list(leaving)


def evictable_bytes(holders: Sequence[Holder]) -> int:
    """Returns what evicting everybody who may leave would give."""
    leaves, donors = _leavers(holders)
    return sum(holder.nbytes for holder in (*leaves, *donors))


def passing_bytes(holders: Sequence[Holder]) -> int:
    """Returns what comes free, or may be evicted, once what runs now has ended.

    What `evictable_bytes` counts is not among it.
    """
    later = [
        Holder(
            name=holder.name,
            donor=holder.donor,
            nbytes=holder.nbytes,
            idle_s=0.0,
            idle=holder.idle or holder.passing,
            passing=False,
        )
        for holder in holders
    ]
    return evictable_bytes(later) - evictable_bytes(holders)


def _leavers(holders: Sequence[Holder]) -> tuple[list[Holder], list[Holder]]:
    """Returns who may leave at once, and donors who may after all that lean on them."""
    staying = {holder.donor for holder in holders if not holder.idle}
    leaned_on = {holder.donor for holder in holders}
    idle = [holder for holder in holders if holder.idle]
    leaves = [holder for holder in idle if holder.name not in leaned_on]
    donors = [h for h in idle if h.name in leaned_on and h.name not in staying]
    return leaves, donors


def _candidates(holders: Sequence[Holder]) -> list[Candidate]:
    return [
        Candidate(model=holder.name, unique_bytes=holder.nbytes, idle_s=holder.idle_s)
        for holder in holders
    ]
