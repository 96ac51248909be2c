"""Kernels of specialists, and their sum: whether one's direction is in the other's way (FM §6).

A specialist's kernel is that of some fine-tunes of a family. All are written as coefficients on all
the family's deltas, so cosines between kernels, and the sum itself, follow from the same Gram
matrices: <K_a, K_b> = w_a w_b c_aᵀ G c_b.
Legend: N fine-tunes, T tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from analysis.gram import TensorGram
from analysis.kernel.combination import Combination, CombinedTensor, combined_norm
from analysis.kernel.consensus import Strategy, equal
from analysis.kernel.kernel import Kernel, build_kernel
from analysis.kernel.metropolis import TEMPERATURE
from linker_core.errors import InvalidRequestError

_FEWEST: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """Specialists' kernels and their sum."""

    specialists: Mapping[str, Kernel]  # label -> kernel, over all the family's fine-tunes
    together: Combination  # their sum; its coefficients hold the weights, and sum to any number
    cosines: Mapping[tuple[str, str], float]  # of each pair, over all tensors together
    tensor_cosines: Mapping[tuple[str, str], Mapping[str, float]]  # by tensor


def compose(
    grams: Iterable[TensorGram],
    specialists: Mapping[str, Sequence[str]],
    *,
    names: tuple[str, ...],
    seed: int,
    temperature: float = TEMPERATURE,
    strategy: Strategy | None = None,
) -> Composition:
    """Builds a kernel for each specialist, and adds them up.

    Args:
        grams: Of all tensors, over all the family's fine-tunes.
        specialists: Label -> the fine-tunes it is made of. One alone has nothing to agree with:
            its kernel is its whole delta, as in task arithmetic.
        names: The family's fine-tunes, in the order of the Gram matrices.
        seed: Of each specialist's chains.
        temperature: T of exp(score / T).
        strategy: Finds the consensus of specialists that are several; the mean by default.

    Raises:
        InvalidRequestError: Fewer than two specialists, a fine-tune that is none of the family's,
            or one that is in two of them.
    """
    check_specialists(specialists, names)
    grams = list(grams)
    kernels = {
        label: _specialist(
            grams,
            [names.index(member) for member in members],
            names=names,
            seed=seed,
            temperature=temperature,
            strategy=strategy,
        )
        for label, members in specialists.items()
    }
    pairs = list(combinations(kernels, 2))
    dots = {pair: _dots(grams, kernels[pair[0]], kernels[pair[1]]) for pair in pairs}
    return Composition(
        specialists=MappingProxyType(kernels),
        together=_sum(grams, list(kernels.values())),
        cosines={
            (a, b): _ratio(sum(dots[a, b].values()), kernels[a].norm * kernels[b].norm)
            for a, b in pairs
        },
        tensor_cosines={
            (a, b): {
                name: _ratio(dot, kernels[a].tensors[name].norm * kernels[b].tensors[name].norm)
                for name, dot in dots[a, b].items()
            }
            for a, b in pairs
        },
    )


def check_specialists(specialists: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    """Refuses specialists that cannot be composed; costs nothing.

    Args:
        specialists: Label -> the fine-tunes it is made of.
        names: The family's fine-tunes.

    Raises:
        InvalidRequestError: Fewer than two, one without a fine-tune, an unknown fine-tune, or one
            that is named twice.
    """
    members = [member for group in specialists.values() for member in group]
    if len(specialists) < _FEWEST or not all(specialists.values()):
        raise InvalidRequestError(
            "A composition is of at least two specialists of one fine-tune or more each."
        )
    if unknown := [member for member in members if member not in names]:
        raise InvalidRequestError(
            f"{unknown[0]!r:.60} is no fine-tune of this family; they are {', '.join(names)}."
        )
    if len(set(members)) < len(members):
        raise InvalidRequestError(
            "A fine-tune is named twice. One that two specialists share would be added twice; give "
            "each to one of them."
        )


def _specialist(
    grams: Sequence[TensorGram],
    places: Sequence[int],
    *,
    names: tuple[str, ...],
    seed: int,
    temperature: float,
    strategy: Strategy | None,
) -> Kernel:
    """Returns the kernel of some fine-tunes, as coefficients on all.

    One alone is taken twice: it agrees with itself entirely, which weighs every tensor by nearly 1.
    """
    taken = list(places) * (_FEWEST if len(places) < _FEWEST else 1)
    kernel = build_kernel(
        [_part(gram, taken) for gram in grams],
        names=tuple(names[place] for place in taken),
        seed=seed,
        strategy=strategy,
        temperature=temperature,
    )
    spread_NM = np.zeros((len(names), len(taken)))
    spread_NM[taken, np.arange(len(taken))] = 1
    tensors = {
        gram.name: replace(
            kernel.tensors[gram.name],
            coefficients=tuple((spread_NM @ kernel.tensors[gram.name].coefficients).tolist()),
            mean_norm=combined_norm(gram.gram_NN, equal(len(names))),  # the whole family's
        )
        for gram in grams
    }
    return replace(kernel, names=names, tensors=MappingProxyType(tensors))


def _part(gram: TensorGram, places: Sequence[int]) -> TensorGram:
    """Returns the Gram matrices of some of the fine-tunes."""
    return replace(
        gram,
        base_dots_N=gram.base_dots_N[list(places)],
        groups_CNN=gram.groups_CNN[:, places][:, :, places],
    )


def _dots(grams: Iterable[TensorGram], a: Kernel, b: Kernel) -> dict[str, float]:
    """Returns <K_a, K_b> by tensor."""
    return {
        gram.name: float(
            _weighted(a.tensors[gram.name]) @ gram.gram_NN @ _weighted(b.tensors[gram.name])
        )
        for gram in grams
    }


def _sum(grams: Iterable[TensorGram], kernels: Sequence[Kernel]) -> Combination:
    """Returns the sum of kernels, with the weights inside the coefficients."""
    tensors = {}
    for gram in grams:
        c_N = np.sum([_weighted(kernel.tensors[gram.name]) for kernel in kernels], axis=0)
        tensors[gram.name] = CombinedTensor(
            weight=1.0,
            coefficients=tuple(c_N.tolist()),
            consensus_norm=combined_norm(gram.gram_NN, c_N),
        )
    return Combination(names=kernels[0].names, tensors=MappingProxyType(tensors))


def _weighted(tensor: CombinedTensor) -> NDArray[np.float64]:
    return tensor.weight * np.array(tensor.coefficients)


def _ratio(dot: float, norms: float) -> float:
    return dot / norms if norms > 0 else 0.0
