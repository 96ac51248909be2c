"""Which running sequence gives its pages back when there is no room for all.

The most urgent one, by priority and then by age, never does so for its equals: it always moves on,
so that in the end all do.
"""

from __future__ import annotations

from collections.abc import Callable

from linker_core.engine.fair_share import FairShare, Lane
from linker_core.engine.sequence import SequenceState

Share = Callable[[Lane], int]  # how much a lane holds of what is short


def victims_to_go_on(lanes: FairShare) -> list[SequenceState]:
    """Returns who may have to make room so that the others can decode; at least one runs."""
    running = lanes.running()
    first = min(running, key=_urgency)
    return [sequence for sequence in running if sequence is not first] or running


def victims_to_admit(lanes: FairShare, waiting: SequenceState) -> list[SequenceState]:
    """Returns who may have to make room for a waiting sequence.

    That is whoever is less urgent by priority; and, if nothing of the waiting one's lane runs,
    its equals but for the most urgent sequence of every lane. So all of them may go together.
    """
    starving = not lanes[waiting.lane].running
    first = {min(lane.running, key=_urgency) for lane in lanes if lane.running}
    return [
        sequence
        for sequence in lanes.running()
        if sequence.priority > waiting.priority
        or (starving and sequence.priority == waiting.priority and sequence not in first)
    ]


def worst(candidates: list[SequenceState], lanes: FairShare, share: Share) -> SequenceState:
    """Returns the last by priority; of those the lane with the largest share, its newest."""
    shares = {lane.key: share(lane) for lane in lanes}
    return max(candidates, key=lambda s: (s.priority, shares[s.lane], s.arrival))


def _urgency(sequence: SequenceState) -> tuple[int, int]:
    return sequence.urgency
