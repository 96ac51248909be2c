"""Deltas of fine-tunes without one direction of the residual stream each, by their Gram matrices.

Removing what a matrix writes along r (Arditi et al. 2024) makes W' = W - r rᵀ W. Either the variant
alone loses it, so Δ' = Δ - r rᵀ W ("weights"), or variant and base do, so Δ' = Δ - r rᵀ Δ
("deltas"). Both are Δ'_i = Δ_i - r_i v_iᵀ, and no such delta is ever built:
<Δ'_i, Δ'_j> = <Δ_i, Δ_j> - (r_jᵀ Δ_i)·v_j - (r_iᵀ Δ_j)·v_i + (r_i·r_j) (v_i·v_j).
Legend: N variants, R directions, H hidden width, I input width of a matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.pca import cosines
from analysis.selection import Component, component_of, select
from analysis.tensors import read_tensor

Floats = NDArray[np.float64]
_WRITING = (Component.O, Component.DOWN)  # of FM's seven, what writes to the residual stream


class Ablation(NamedTuple):
    """Pairwise cosines of deltas, means over FM's tensors, and where the deltas lie."""

    cos_NN: Floats  # as they are
    deltas_NN: Floats
    deltas_random_NN: Floats
    weights_NN: Floats
    weights_random_NN: Floats
    along_N: Floats  # share of |Δ|² of o and down along the direction, times H


def ablate(family: StudiedFamily, own_NH: Floats, random_NH: Floats) -> Ablation:
    """Returns the cosines of deltas with and without directions.

    Args:
        family: N variants.
        own_NH: A unit vector for each.
        random_NH: Another for each, to compare with.

    Raises:
        BadCheckpointError: A file changed, or holds values that are not finite.
    """
    num, width = own_NH.shape
    sums = np.zeros((5, num, num))
    squares_N, along_N = np.zeros(num), np.zeros(num)
    names = select(family.base)
    for gram in gram_pass(family, names):
        forms = [gram.gram_NN] * 5
        if component_of(gram.name) in _WRITING:
            base_RI, variants_NRI = _written(family, gram.name, np.concatenate([own_NH, random_NH]))
            deltas_NRI = variants_NRI - base_RI
            own, other = slice(0, num), slice(num, None)
            forms[1:] = [
                ablated_gram(gram.gram_NN, units_NH, deltas_NRI[:, part], _own(removed[:, part]))
                for removed in (deltas_NRI, variants_NRI)
                for units_NH, part in ((own_NH, own), (random_NH, other))
            ]
            squares_N += np.diag(gram.gram_NN)
            along_N += np.square(_own(deltas_NRI[:, own])).sum(axis=1)
        sums += [cosines(form_NN) for form_NN in forms]
    cos_NN, deltas_NN, deltas_random_NN, weights_NN, weights_random_NN = sums / len(names)
    shares_N = np.divide(along_N, squares_N, out=np.zeros(num), where=squares_N > 0)
    return Ablation(
        cos_NN, deltas_NN, deltas_random_NN, weights_NN, weights_random_NN, shares_N * width
    )


def ablated_gram(gram_NN: Floats, units_NH: Floats, deltas_NNI: Floats, v_NI: Floats) -> Floats:
    """Returns <Δ'_i, Δ'_j> of one matrix; see the module's equation.

    Args:
        gram_NN: <Δ_i, Δ_j>.
        units_NH: r_i.
        deltas_NNI: [i, j] is r_jᵀ Δ_i.
        v_NI: v_i.
    """
    cross_NN = np.einsum("nri,ri->nr", deltas_NNI, v_NI)
    ablated: Floats = gram_NN - cross_NN - cross_NN.T + (units_NH @ units_NH.T) * (v_NI @ v_NI.T)
    return ablated


def _written(family: StudiedFamily, name: str, units_RH: Floats) -> tuple[Floats, Floats]:
    """Returns r_kᵀ W of the base [R, I] and of the variants [N, R, I], a matrix in memory."""
    base_RI, *variants = (
        units_RH @ read_tensor(checkpoint, name).astype(np.float64)
        for checkpoint in family.checkpoints
    )
    return base_RI, np.stack(variants)


def _own(along_NNI: Floats) -> Floats:
    """Returns what each variant has along its own direction, [N, I]."""
    num = np.arange(len(along_NNI))
    rows_NI: Floats = along_NNI[num, num]
    return rows_NI
