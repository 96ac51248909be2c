"""What a study says about one tensor, as one flat record: it crosses a pipe and rests in rows.

Legend: N fine-tunes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from analysis.pca import cosines

# A symmetric matrix up to its diagonal: of many fine-tunes, records are little else than these.
Triangle: TypeAlias = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStudy:
    """What a tensor's deltas have in common. Lists are in the order of the study's names.

    A number that these fine-tunes do not have is None: PC1 and all about it with fewer than three
    fine-tunes or where no delta varies, the shared fraction but with two, cosines with one.
    Unnamed, deltas are raw and uncentred.
    """

    name: str
    component: str | None  # of FM's seven projections; None: another tensor
    layer: int | None
    num_elements: int
    num_runs: int
    dtypes: tuple[str, ...]  # as stored, the base's first
    base_square: float  # |W_B|²
    gram: Triangle  # <Δi, Δj> for j up to i
    norms: tuple[float, ...]  # |Δi|
    epsilons: tuple[float, ...]  # |Δi| / |W_B| (BS Eq. 2's summand)
    base_cosines: tuple[float, ...]  # cos(W_B, W_i) (BS Eq. 1's summand)
    cosines_null95: Triangle  # what unrelated deltas stay below 95 times in 100
    cos_mean: float | None
    snr: float | None
    pc1: float | None
    pc1_centred: float | None
    pc1_normalised: float | None
    pc1_normalised_centred: float | None
    null95: float | None
    null95_centred: float | None
    null95_normalised: float | None
    null95_normalised_centred: float | None
    p_value: float | None
    p_value_centred: float | None
    p_value_normalised: float | None
    p_value_normalised_centred: float | None
    interval: tuple[float, float] | None  # of pc1, bootstrap over runs, 95 %
    interval_centred: tuple[float, float] | None
    interval_normalised: tuple[float, float] | None
    interval_normalised_centred: tuple[float, float] | None
    spectrum: tuple[float, ...]
    spectrum_centred: tuple[float, ...]
    effective_rank: float | None
    effective_rank_centred: float | None
    loadings: tuple[float, ...]  # squared, of the centred PC1; at most 1 - 1/N
    loadings_uncentred: tuple[float, ...]
    single_source: str | None  # the fine-tune whose squared loading exceeds 0.8
    loo_cosines: tuple[float | None, ...]  # centred; empty with fewer than four
    loo_pc1_shifts: tuple[float | None, ...]
    loo_cosines_uncentred: tuple[float | None, ...]  # empty with fewer than three
    loo_pc1_shifts_uncentred: tuple[float | None, ...]
    shared_fraction: float | None  # cos² of two deltas
    shared_null95: float | None
    shared_p_value: float | None
    shared_interval: tuple[float, float] | None

    @property
    def whole_gram(self) -> NDArray[np.float64]:
        """The inner products of the deltas."""
        return _whole(self.gram)

    @property
    def cosines(self) -> NDArray[np.float64]:
        """The cosines between the deltas."""
        return cosines(self.whole_gram)

    @property
    def whole_null95(self) -> NDArray[np.float64]:
        """What the cosines of unrelated deltas stay below 95 times in 100; 0 on the diagonal."""
        return _whole(self.cosines_null95)

    def to_json(self) -> dict[str, Any]:
        """Returns the record as plain JSON values; `from_json` restores it."""
        return {key: _lists(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuilds a study from `to_json`."""
        return cls(**{field.name: _tuples(record[field.name]) for field in fields(cls)})


def triangle(values_NN: NDArray[np.float64]) -> Triangle:
    """Returns what a record keeps of a symmetric matrix."""
    return tuple(tuple(row[: i + 1]) for i, row in enumerate(values_NN.tolist()))


def _whole(rows: Triangle) -> NDArray[np.float64]:
    values_NN = np.empty((len(rows), len(rows)))
    for i, row in enumerate(rows):
        values_NN[i, : i + 1] = values_NN[: i + 1, i] = row
    return values_NN


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
