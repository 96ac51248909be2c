"""FM §4.4: what the deltas' geometry says about how each fine-tune was made, with its reason.

FM calls a near-zero delta degenerate where BS calls the same pair healthily aligned, so smallness
alone is no fault here: a fine-tune is degenerate only if its deltas are what rounding would leave,
or if it answers like its base. Every finding is a reading of numbers that stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from analysis.distance import distance
from analysis.record import TensorStudy
from analysis.study import SINGLE_SOURCE
from linker_core.sharing.report import Region

FLOORS_AWAY = 2.0  # base and fine-tune are each rounded: √2 floors, and room for other spreads
SAME_ANSWERS_NATS = 0.01  # KL per token; at 0.01 a perplexity differs by about 1 %
NEAR_UNITY = 0.999  # BS's 0.999+ of table 1
CLOSE = 0.5  # of a pair: a quarter of each delta's energy lies along the other
CLOSE_IN_FAMILY = 0.25  # between FM's diverse families (0.13, 0.18) and its monoculture (0.29)
ABOVE_OTHERS = 2.0  # times the median of the family's other pairs
OUTLIER_Z = 5.0
OUTLIER_FACTOR = 2.0  # times the norm that model and tensor lead to expect
SOURCE_SHARE = 0.5  # of tensors that one fine-tune must carry alone
_MAD_SCALE = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_FEWEST_FOR_MEDIAN = 3


class Kind(StrEnum):
    """What a finding is about."""

    DEGENERATE = "degenerate"
    CONTINUED_PRETRAINING = "continued_pretraining"
    MONOCULTURE = "monoculture"
    NEAR_UNITY = "near_unity"
    OUTLIER = "outlier"
    SINGLE_SOURCE = "single_source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One finding about one fine-tune."""

    kind: Kind
    model: str
    reason: str  # in words, with its numbers

    def to_json(self) -> dict[str, str]:
        """Returns the finding as plain JSON values."""
        return {"kind": self.kind.value, "model": self.model, "reason": self.reason}


def diagnose(
    studies: Sequence[TensorStudy],
    *,
    names: Sequence[str],
    kl_to_base: Mapping[str, float] | None = None,
) -> list[Diagnostic]:
    """Returns what stands out, by fine-tune in the order of `names`.

    Args:
        studies: Of all tensors looked at; BS's block numbers are means over these alone.
        names: Of the fine-tunes.
        kl_to_base: Fine-tune -> mean KL(fine-tune ‖ base) in nats per token, where measured.
    """
    assert studies
    found: list[Diagnostic] = []
    for number, name in enumerate(names):
        reasons = {
            Kind.DEGENERATE: _degenerate(studies, number, (kl_to_base or {}).get(name)),
            Kind.CONTINUED_PRETRAINING: _continued(studies, number),
            Kind.MONOCULTURE: _monoculture(studies, number, names),
            Kind.NEAR_UNITY: _near_unity(studies, number),
            Kind.OUTLIER: _outlier(studies, number),
            Kind.SINGLE_SOURCE: _single_source(studies, name, number),
        }
        found += [
            Diagnostic(kind=kind, model=name, reason=reason)
            for kind, reason in reasons.items()
            if reason is not None
        ]
    return found


def _degenerate(studies: Sequence[TensorStudy], number: int, kl: float | None) -> str | None:
    far = distance(studies, number)
    if max(study.norms[number] for study in studies) == 0.0:
        return f"all {len(studies)} tensors are the base's own"
    if far.floors <= FLOORS_AWAY:
        return (
            f"its mean ε is {far.epsilon:.2g}, and no tensor moved by more than {far.floors:.2g} "
            f"times what rounding to its type leaves (limit {FLOORS_AWAY:g})"
        )
    if kl is not None and kl <= SAME_ANSWERS_NATS:
        return (
            f"it answers like its base: KL {kl:.2g} nats per token on the given text (limit "
            f"{SAME_ANSWERS_NATS:g}), though its mean ε is {far.epsilon:.2g}"
        )
    return None


def _continued(studies: Sequence[TensorStudy], number: int) -> str | None:
    far = distance(studies, number)
    if far.region is not Region.OUTSIDE:
        return None
    return (
        f"outside its base's neighbourhood (BS table 2): cos {far.cos:.4f}, ε {far.epsilon:.3f}; "
        "post-training stays above 0.97 and below 0.25, continued pre-training does not"
    )


def _near_unity(studies: Sequence[TensorStudy], number: int) -> str | None:
    far = distance(studies, number)
    if far.cos < NEAR_UNITY:
        return None
    return (
        f"cosine {far.cos:.5f} to the base, ε {far.epsilon:.3g}: as FM reads it, little was "
        "modified; as BS reads it, a healthy post-training that kept its blocks aligned. No fault "
        "by itself"
    )


def _monoculture(studies: Sequence[TensorStudy], number: int, names: Sequence[str]) -> str | None:
    if len(names) < 2:
        return None
    cosines_NN = np.mean([study.cosines for study in studies], axis=0)
    null_NN = np.mean([study.whole_null95 for study in studies], axis=0)
    close = []
    for other, name in enumerate(names):
        cosine = float(cosines_NN[number, other])
        if other == number or cosine <= float(null_NN[number, other]):
            continue
        others = _other_pairs(cosines_NN, number, other)
        limit = max(CLOSE_IN_FAMILY, ABOVE_OTHERS * median(others)) if others else CLOSE
        if cosine >= min(CLOSE, limit):
            beside = f", the family's other pairs {median(others):.2f}" if others else ""
            close.append(
                f"{cosine:.2f} with {name} (unrelated {null_NN[number, other]:.2f}{beside})"
            )
    return f"its deltas have the cosine {'; '.join(close)}" if close else None


def _outlier(studies: Sequence[TensorStudy], number: int) -> str | None:
    excesses_T = _excesses(studies)[:, number]
    moved_T = np.isfinite(excesses_T)
    if np.count_nonzero(moved_T) < _FEWEST_FOR_MEDIAN:
        return None
    spread = _MAD_SCALE * float(np.median(np.abs(excesses_T[moved_T])))
    out = [
        (float(excess), study)
        for excess, study in zip(excesses_T, studies, strict=True)
        if math.isfinite(excess)
        and excess > math.log(OUTLIER_FACTOR)
        and excess > OUTLIER_Z * spread
    ]
    if not out:
        return None
    excess, worst = max(out, key=lambda entry: entry[0])
    return (
        f"{len(out)} of {len(studies)} tensors moved more than {OUTLIER_FACTOR:g} times as far as "
        f"this model and that tensor lead to expect (robust z above {OUTLIER_Z:g}); most of all "
        f"{worst.name}, {math.exp(excess):.3g} times (norm {worst.norms[number]:.3g})"
    )


def _single_source(studies: Sequence[TensorStudy], name: str, number: int) -> str | None:
    with_pc1 = [study for study in studies if study.pc1 is not None]
    alone = [study for study in with_pc1 if study.single_source == name]
    if not alone or len(alone) < SOURCE_SHARE * len(with_pc1):
        return None
    # With six or more fine-tunes it may be the centred PC1 alone that one carries.
    ways = [
        "" if study.loadings_uncentred[number] > SINGLE_SOURCE else "_centred" for study in alone
    ]
    loading = fmean(
        (study.loadings if way else study.loadings_uncentred)[number]
        for study, way in zip(alone, ways, strict=True)
    )
    pc1, null95 = (
        fmean(getattr(study, field + way) or 0.0 for study, way in zip(alone, ways, strict=True))
        for field in ("pc1", "null95")
    )
    num_centred = sum(way != "" for way in ways)
    centred = f", in {num_centred} of them once the mean is taken off" if num_centred else ""
    return (
        f"carries PC1 alone in {len(alone)} of {len(with_pc1)} tensors{centred} (mean squared "
        f"loading {loading:.2f}): there PC1 is {pc1:.1%}, and {null95:.1%} from its size alone"
    )


def _other_pairs(cosines_NN: NDArray[np.float64], one: int, two: int) -> list[float]:
    return [
        float(cosines_NN[row, column])
        for row, column in zip(*np.triu_indices(len(cosines_NN), k=1), strict=True)
        if {int(row), int(column)} != {one, two}
    ]


def _excesses(studies: Sequence[TensorStudy]) -> NDArray[np.float64]:
    """Returns log norms less what model and tensor lead to expect [T, N]; NaN for a zero delta.

    A model's level is the median over its tensors. A tensor's is the median over the fine-tunes,
    or, with fewer than three, over the tensors of its projection.
    """
    norms_TN = np.array([study.norms for study in studies])
    logs_TN = np.full_like(norms_TN, np.nan)
    np.log(norms_TN, out=logs_TN, where=norms_TN > 0.0)
    logs_TN = logs_TN - _medians(logs_TN.T)[None, :]
    if logs_TN.shape[1] >= _FEWEST_FOR_MEDIAN:
        logs_TN = logs_TN - _medians(logs_TN)[:, None]
    else:
        components = np.array([study.component or study.name for study in studies])
        for component in np.unique(components):
            rows = components == component
            logs_TN[rows] = logs_TN[rows] - _medians(logs_TN[rows].T)[None, :]
    return logs_TN - _medians(logs_TN.T)[None, :]


def _medians(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns each row's median without its NaN; 0 for a row of nothing else."""
    return np.array(
        [float(np.median(row[np.isfinite(row)])) if np.isfinite(row).any() else 0.0 for row in rows]
    )
