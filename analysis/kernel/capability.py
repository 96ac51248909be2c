"""Weights by what they do: Metropolis-Hastings with a measured score (FM §5.7 and §6).

FM samples weights from a proxy because measuring a 7B model 5,000 times takes 250 GPU-hours. Here
the score is whatever the caller measures of the model with the kernel applied. A weight is shared
by a group of tensors and a proposal changes one group: a dozen groups take a few hundred steps.
Legend: G groups, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.kernel.kernel import Kernel
from analysis.kernel.put import put_kernel
from analysis.model import StudyModel
from analysis.selection import component_of, layer_of

_REACH = 0.5  # of a proposal


def layer_groups(kernel: Kernel) -> dict[str, tuple[str, ...]]:
    """Returns a kernel's tensors as one group per layer's attention and one per its MLP.

    Tensors outside the layers' projections form a group of their own.
    """
    groups: dict[str, list[str]] = {}
    for name in kernel.tensors:
        component, layer = component_of(name), layer_of(name)
        if component is None:
            label = "others"
        else:
            label = f"{layer}.{'attention' if component.is_attention else 'mlp'}"
        groups.setdefault(label, []).append(name)
    return {label: tuple(names) for label, names in groups.items()}


class WeighedModel:
    """A model with a kernel's consensus on it, whose weights by group can be changed one by one.

    Args:
        model: Of the family.
        family: Holds the kernel's base and fine-tunes, open.
        kernel: Its consensus is weighed, beginning with its own weights as means by group.
        groups: Label -> tensors that share a weight; `layer_groups` by default.
    """

    def __init__(
        self,
        model: StudyModel,
        family: StudiedFamily,
        kernel: Kernel,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model = model
        self.groups = layer_groups(kernel) if groups is None else groups
        self._family = family
        self._kernel = kernel

    @property
    def weights_G(self) -> NDArray[np.float64]:  # noqa: N802 - its shape
        """The kernel's own weights, by group."""
        tensors = self._kernel.tensors
        return np.array(
            [np.mean([tensors[name].weight for name in names]) for names in self.groups.values()]
        )

    def put(self, label: str, weight: float) -> None:
        """Gives the tensors of a group base + weight · consensus."""
        names = self.groups[label]
        weighed = self._weighed(dict.fromkeys(names, weight))
        put_kernel(self.model, self._family, weighed, scale=1.0, names=names)

    def restore(self) -> None:
        """Gives the model the base's weights back."""
        self.model.restore(self._kernel.tensors)

    def kernel(self, weights_G: NDArray[np.float64]) -> Kernel:
        """Returns the kernel with these weights."""
        by_name = {
            name: float(weight)
            for names, weight in zip(self.groups.values(), weights_G, strict=True)
            for name in names
        }
        return self._weighed(by_name)

    def _weighed(self, weights: Mapping[str, float]) -> Kernel:
        tensors = {
            name: replace(self._kernel.tensors[name], weight=weight)
            for name, weight in weights.items()
        }
        return replace(self._kernel, tensors=MappingProxyType(tensors))


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityChain:
    """What a chain with a measured score came to."""

    groups: tuple[str, ...]
    mean_G: NDArray[np.float64]  # posterior means of the weights
    best_G: NDArray[np.float64]  # the weights with the highest score seen
    best_score: float
    scores_S: NDArray[np.float64]  # of the state after each step, burn-in included
    acceptance_ratio: float  # after burn-in
    kernel: Kernel  # with the posterior means as its weights


def capability_chain(
    weighed: WeighedModel,
    score: Callable[[StudyModel], float],
    *,
    temperature: float,
    num_steps: int,
    burn_in: int,
    seed: int,
    told: Callable[[int, int], None] = lambda _done, _total: None,
) -> CapabilityChain:
    """Samples w in [0, 1]^G from exp(score(W_B + Σ_g w_g C_g) / T), C the consensus.

    A proposal takes one group at random and moves its weight uniformly within a reach, folded back
    at 0 and 1. The model has the base's weights again at the end.

    Args:
        weighed: The model; the chain begins at its kernel's weights.
        score: Higher is better; what is no number counts as the worst.
        temperature: T, in units of the score, above 0.
        num_steps: After burn-in, above 0.
        burn_in: Steps that do not count.
        seed: Of the chain.
        told: Hears of steps done and in all.

    Raises:
        BadCheckpointError: A file changed.
    """
    assert temperature > 0
    assert num_steps > 0
    labels = tuple(weighed.groups)
    generator = np.random.default_rng(seed)
    w_G = weighed.weights_G
    scores, sum_G, accepted = [], np.zeros(len(labels)), 0
    try:
        for label, weight in zip(labels, w_G, strict=True):
            weighed.put(label, float(weight))
        now = best = _number(score(weighed.model))
        best_G = w_G.copy()
        for step in range(burn_in + num_steps):
            group = int(generator.integers(len(labels)))
            proposed = _folded(w_G[group] + _REACH * (2 * generator.random() - 1))
            weighed.put(labels[group], proposed)
            found = _number(score(weighed.model))
            threshold = temperature * math.log(1 - generator.random())  # at most 0
            if found >= now + threshold:
                w_G[group], now = proposed, found
                accepted += step >= burn_in
                if now > best:
                    best, best_G = now, w_G.copy()
            else:
                weighed.put(labels[group], float(w_G[group]))
            if step >= burn_in:
                sum_G += w_G
            scores.append(now)
            told(step + 1, burn_in + num_steps)
    finally:
        weighed.restore()
    mean_G, acceptance = sum_G / num_steps, accepted / num_steps
    found_kernel = weighed.kernel(mean_G)
    tensors = {
        name: replace(tensor, acceptance=acceptance)
        for name, tensor in found_kernel.tensors.items()
    }
    return CapabilityChain(
        groups=labels,
        mean_G=mean_G,
        best_G=best_G,
        best_score=best,
        scores_S=np.array(scores),
        acceptance_ratio=acceptance,
        kernel=replace(
            found_kernel,
            temperature=temperature,
            num_steps=num_steps,
            burn_in=burn_in,
            seed=seed,
            tensors=MappingProxyType(tensors),
        ),
    )


def _folded(w: float) -> float:
    w = abs(w)
    return 2 - w if w > 1 else w


def _number(score: float) -> float:
    return -math.inf if math.isnan(score) else score
