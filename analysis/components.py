"""FM tables 2 and 6: a study's numbers by projection, by layer, and against another family's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.null import discoveries
from analysis.record import TensorStudy
from analysis.selection import Component

ATTENTION = "attention"
MLP = "mlp"
ALL = "all"
KINDS = ("", "_centred", "_normalised", "_normalised_centred")  # suffixes of a study's PC1 fields
MAJORITY = 0.5  # FM table 2: tensors whose PC1 holds more than half
Z_95 = 1.959963984540054  # a normal variable lies within it of its mean 95 times in 100
_FEWEST_FOR_INTERVAL = 4  # Fisher's transform has the variance 1/(n - 3)
_ROUND_OFF = 1e-12  # of shares: a curve that varies by less is constant


def groups_of(study: TensorStudy) -> tuple[str, ...]:
    """Returns the rows of FM table 6 that a tensor counts in; other tensors count in `all` only."""
    if study.component is None:
        return (ALL,)
    component = Component(study.component)
    return (component.value, ATTENTION if component.is_attention else MLP, ALL)


def by_component(studies: Sequence[TensorStudy]) -> dict[str, dict[str, Any]]:
    """Returns one row for each projection, `attention`, `mlp` and `all`: means over tensors.

    `interval*` is the mean of the tensors' own intervals, end by end, and `null95*` of their own
    limits: a single tensor of unrelated deltas would exceed its own in one case of twenty, their
    mean far more rarely. `majority_share*` is the share of tensors whose PC1 exceeds 50 %;
    `significant_share*` of those that stand against the null at a false discovery rate of 5 % over
    all tensors of the study (Benjamini and Hochberg).
    Suffixes as in `TensorStudy`. None: no tensor has that number.
    """
    significant = {kind: _significant(studies, kind) for kind in KINDS}
    rows: dict[str, dict[str, Any]] = {}
    for group in (*(component.value for component in Component), ATTENTION, MLP, ALL):
        members = [study for study in studies if group in groups_of(study)]
        if not members:
            continue
        row: dict[str, Any] = {
            "num_tensors": len(members),
            "cos_mean": mean(study.cos_mean for study in members),
            "snr": mean(study.snr for study in members),
        }
        for kind in KINDS:
            shares = [getattr(study, f"pc1{kind}") for study in members]
            row[f"pc1{kind}"] = mean(shares)
            row[f"null95{kind}"] = mean(getattr(study, f"null95{kind}") for study in members)
            row[f"majority_share{kind}"] = mean(
                None if share is None else float(share > MAJORITY) for share in shares
            )
            intervals = [getattr(study, f"interval{kind}") for study in members]
            row[f"interval{kind}"] = _mean_interval(intervals)
            row[f"significant_share{kind}"] = mean(
                significant[kind].get(study.name) for study in members
            )
        rows[group] = row
    return rows


def gap_per_layer(studies: Sequence[TensorStudy], *, field: str) -> list[float | None]:
    """Returns attention's mean minus the MLP's, by the number of the layer (FM §4.3).

    None where one lacks, as in layers that were not looked at.

    Args:
        studies: Of a family.
        field: Of `TensorStudy`, such as `pc1_centred`.
    """
    attention, mlp = (layer_curve(studies, group, field=field) for group in (ATTENTION, MLP))
    return [
        attention[layer] - mlp[layer] if layer in attention and layer in mlp else None
        for layer in range(1 + max((*attention, *mlp), default=-1))
    ]


def layer_curve(studies: Sequence[TensorStudy], group: str, *, field: str) -> dict[int, float]:
    """Returns the mean of a number over a group's tensors, by layer."""
    values: dict[int, list[float]] = {}
    for study in studies:
        value = getattr(study, field)
        if study.layer is not None and value is not None and group in groups_of(study):
            values.setdefault(study.layer, []).append(value)
    return {layer: fmean(values[layer]) for layer in sorted(values)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Pearson's r of two curves over layers."""

    r: float
    low: float | None  # 95 % by Fisher's transform, as if layers were independent; None: too few
    high: float | None
    num_points: int


def correlate_families(
    ours: Sequence[TensorStudy], theirs: Sequence[TensorStudy], *, field: str
) -> dict[str, Correlation | None]:
    """Returns FM table 6's last column: how a number's curve over layers agrees in two families.

    Rows are the projections, `attention`, `mlp` and `gap` (attention minus MLP). With unequal
    depths the deeper curve is read at the shallower one's relative depths, linearly. None where a
    curve is constant or shorter than three layers.

    Args:
        ours: One family's studies.
        theirs: The other's.
        field: Of `TensorStudy`, such as `pc1_centred`.
    """
    rows: dict[str, Correlation | None] = {}
    for group in (*(component.value for component in Component), ATTENTION, MLP):
        curves = [
            list(layer_curve(studies, group, field=field).values()) for studies in (ours, theirs)
        ]
        rows[group] = correlate(*curves)
    gaps = [
        [gap for gap in gap_per_layer(studies, field=field) if gap is not None]
        for studies in (ours, theirs)
    ]
    rows["gap"] = correlate(*gaps)
    return rows


def correlate(ours: Sequence[float], theirs: Sequence[float]) -> Correlation | None:
    """Returns Pearson's r of two curves of shares over relative depth, or None (see above)."""
    num_points = min(len(ours), len(theirs))
    if num_points < 3:
        return None
    x, y = _resampled(ours, num_points), _resampled(theirs, num_points)
    if min(np.ptp(x), np.ptp(y)) <= _ROUND_OFF:
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    r = max(-1.0, min(1.0, float(x @ y) / scale))
    if num_points < _FEWEST_FOR_INTERVAL or abs(r) == 1.0:
        return Correlation(r=r, low=None, high=None, num_points=num_points)
    reach = Z_95 / math.sqrt(num_points - 3)
    low, high = (math.tanh(math.atanh(r) + side * reach) for side in (-1, 1))
    return Correlation(r=r, low=low, high=high, num_points=num_points)


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of what is there; None where nothing is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _mean_interval(intervals: Sequence[tuple[float, float] | None]) -> list[float] | None:
    there = [interval for interval in intervals if interval is not None]
    return [fmean(ends) for ends in zip(*there, strict=True)] if there else None


def _significant(studies: Sequence[TensorStudy], kind: str) -> Mapping[str, float]:
    p_values = {study.name: getattr(study, f"p_value{kind}") for study in studies}
    tested = {name: p_value for name, p_value in p_values.items() if p_value is not None}
    stands = discoveries(np.array(list(tested.values())))
    return {name: float(stand) for name, stand in zip(tested, stands, strict=True)}


def _resampled(curve: Sequence[float], num_points: int) -> NDArray[np.float64]:
    depths = np.linspace(0.0, 1.0, len(curve))
    values: NDArray[np.float64] = np.interp(
        np.linspace(0.0, 1.0, num_points), depths, np.array(curve)
    )
    return values
