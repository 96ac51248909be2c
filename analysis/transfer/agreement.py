"""Whether two families' deltas have anything to do with each other, before anything is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.selection import component_of
from analysis.transfer.alignment import Alignment, alignment
from analysis.transfer.side import Side

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The alignments of a component's tensors, summed up."""

    num_tensors: int
    num_flipped: int  # about half of unrelated directions are
    cos_mean: float
    cos_rms: float
    chance_rms: float  # of unrelated directions, uniform over the sphere: sqrt(mean 1/D)
    norm_ratio: float  # median of ‖target mean‖ / ‖source kernel‖; 0 with a kernel of zeros


def agreements(own: Side, other: Side, names: Sequence[str]) -> dict[str, Agreement]:
    """Returns how the other family's kernel agrees with a family's mean delta, by component.

    Deltas of training have fewer effective dimensions than elements, so unrelated ones may have
    larger cosines than `chance_rms`; a cosine far above it is not proof of a common direction, one
    near it means that there is hardly any.
    """
    found: dict[str, Alignment] = {}
    elements: dict[str, int] = {}
    for name in names:
        mean = own.mean_of(name)
        found[name] = alignment(other.kernel_of(name), mean)
        elements[name] = mean.size
    groups: dict[str, list[str]] = {}
    for name in names:
        component = component_of(name)
        groups.setdefault("other" if component is None else component, []).append(name)
    groups[ALL] = list(names)
    return {group: _agreement(found, elements, members) for group, members in groups.items()}


def _agreement(
    found: Mapping[str, Alignment], elements: Mapping[str, int], members: Sequence[str]
) -> Agreement:
    cosines = np.array([found[name].cos for name in members])
    sizes = np.array([elements[name] for name in members], float)
    return Agreement(
        num_tensors=len(members),
        num_flipped=sum(found[name].flipped for name in members),
        cos_mean=float(cosines.mean()),
        cos_rms=float(np.sqrt(np.square(cosines).mean())),
        chance_rms=float(np.sqrt((1 / sizes).mean())),
        norm_ratio=float(np.median([abs(found[name].factor) for name in members])),
    )
