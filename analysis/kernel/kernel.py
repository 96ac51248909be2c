"""FM's kernel as a record: a weight per tensor, coefficients on its deltas, and how they came.

The kernel of a tensor is K_t = w_t Σ_i c_i Δ_i (FM Eq. 4). All of it but the deltas themselves
follows from their Gram matrices, so a kernel is a small record that `analysis.kernel.apply` turns
into weights, a tensor at a time.
Legend: N fine-tunes, T tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from analysis.gram import TensorGram
from analysis.kernel.combination import Combination, CombinedTensor, combined_norm
from analysis.kernel.consensus import Mean, Strategy, equal
from analysis.kernel.metropolis import BURN_IN, NUM_STEPS, TEMPERATURE, sample_weights
from analysis.kernel.scores import Coherence, coherence
from analysis.selection import layer_of
from linker_core.errors import InvalidRequestError

_FEWEST = 2  # of one fine-tune nothing is in common with anything


class Weighting(StrEnum):
    """Where the w_t come from."""

    SAMPLED = "sampled"  # FM §3.4
    UNIFORM = "uniform"  # one weight, which gives the sampled kernel's norm
    RAW_MEAN = "raw_mean"  # w_t = 1 and the mean delta, FM's "raw mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTensor(CombinedTensor):
    """One tensor's part of a kernel; its coefficients sum to 1."""

    mean_norm: float  # ‖mean Δ‖
    acceptance: float  # share of proposals that the tensor's chain accepted
    coherence: Coherence


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel(Combination):
    """A kernel of some fine-tunes of one base."""

    weighting: Weighting
    strategy: str  # what found the c_i
    temperature: float
    num_steps: int
    burn_in: int
    seed: int
    snr: float  # ‖mean Δ‖ / rms‖Δi - mean Δ‖ over all tensors together
    tensors: Mapping[str, KernelTensor]

    @property
    def acceptance_ratio(self) -> float:
        """Share of proposals that the chains accepted, over all tensors."""
        return sum(tensor.acceptance for tensor in self.tensors.values()) / len(self.tensors)

    @property
    def mean_weight(self) -> float:
        """The mean of the w_t."""
        return sum(tensor.weight for tensor in self.tensors.values()) / len(self.tensors)

    def uniform(self) -> Self:
        """Returns the same consensus with one weight for all tensors, and the same ‖K‖.

        What remains of a gain over this is the weighting's; the rest is the size's.
        """
        whole = math.hypot(*(tensor.consensus_norm for tensor in self.tensors.values()))
        return self._weighted(Weighting.UNIFORM, self.norm / whole if whole > 0 else 0.0)

    @property
    def cosine_to_uniform(self) -> float | None:
        """Cosine between this and `uniform`: 1 where the weights change nothing but the size."""
        whole = math.hypot(*(tensor.consensus_norm for tensor in self.tensors.values()))
        if self.norm == 0:
            return None
        dot = sum(tensor.norm * tensor.consensus_norm for tensor in self.tensors.values())
        return dot / (self.norm * whole)

    def raw_mean(self) -> Self:
        """Returns FM's "raw mean": the mean delta of every tensor, whole."""
        mean = tuple(equal(len(self.names)).tolist())
        tensors = {
            name: replace(tensor, coefficients=mean, consensus_norm=tensor.mean_norm)
            for name, tensor in self.tensors.items()
        }
        return replace(self, strategy=Mean.name, tensors=tensors)._weighted(Weighting.RAW_MEAN, 1.0)

    def weights_per_layer(self) -> dict[int, float]:
        """Returns the mean w_t of each layer's tensors (FM appendix C)."""
        layers: dict[int, list[float]] = {}
        for name, tensor in self.tensors.items():
            layer = layer_of(name)
            if layer is not None:
                layers.setdefault(layer, []).append(tensor.weight)
        return {layer: sum(found) / len(found) for layer, found in sorted(layers.items())}

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values, what follows from it included."""
        return {
            "fine_tunes": list(self.names),
            "weighting": self.weighting.value,
            "strategy": self.strategy,
            "temperature": self.temperature,
            "num_steps": self.num_steps,
            "burn_in": self.burn_in,
            "seed": self.seed,
            "acceptance_ratio": self.acceptance_ratio,
            "norm": self.norm,
            "snr": self.snr,
            "mean_weight": self.mean_weight,
            "cosine_to_uniform": self.cosine_to_uniform,
            "weights_per_layer": {str(k): w for k, w in self.weights_per_layer().items()},
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
        }

    def _weighted(self, weighting: Weighting, weight: float) -> Self:
        tensors = {name: replace(tensor, weight=weight) for name, tensor in self.tensors.items()}
        return replace(self, weighting=weighting, tensors=MappingProxyType(tensors))


def build_kernel(
    grams: Iterable[TensorGram],
    *,
    names: tuple[str, ...],
    seed: int,
    strategy: Strategy | None = None,
    temperature: float = TEMPERATURE,
    centred: bool = True,
    whole_model: bool = False,
) -> Kernel:
    """Builds a kernel (FM §3.4): w_t by Metropolis-Hastings over Eq. 3, consensus by a strategy.

    Args:
        grams: Of all tensors of the kernel.
        names: The fine-tunes', in the order of the Gram matrices.
        seed: Of the chains.
        strategy: Finds the c_i; the mean (FM Eq. 4) by default. The score is FM's whatever it is.
        temperature: T of exp(score / T).
        centred: Whether Eq. 3's PC1 is of the deltas less their mean.
        whole_model: Find one set of c_i for all tensors, from the deltas of all of them joined.

    Raises:
        InvalidRequestError: There are fewer than two fine-tunes.
    """
    check_several(names)
    grams_NN = {gram.name: gram.gram_NN for gram in grams}
    assert grams_NN
    joined_NN = np.sum(list(grams_NN.values()), axis=0)
    found = {name: coherence(gram_NN, centred=centred) for name, gram_NN in grams_NN.items()}
    scores_T = np.array([one.score for one in found.values()])
    chain = sample_weights(scores_T, temperature=temperature, seed=seed)
    strategy = strategy or Mean()
    joined_c_N = strategy.coefficients(joined_NN)
    tensors = {
        name: _kernel_tensor(
            gram_NN,
            joined_c_N if whole_model else strategy.coefficients(gram_NN),
            weight=float(chain.mean_T[number]),
            acceptance=float(chain.acceptance_T[number]),
            found=found[name],
        )
        for number, (name, gram_NN) in enumerate(grams_NN.items())
    }
    return Kernel(
        names=names,
        weighting=Weighting.SAMPLED,
        strategy=strategy.name,
        temperature=temperature,
        num_steps=NUM_STEPS,
        burn_in=BURN_IN,
        seed=seed,
        snr=coherence(joined_NN).snr,
        tensors=MappingProxyType(tensors),
    )


def check_several(names: Sequence[str]) -> None:
    """Refuses fine-tunes that are too few to have a kernel; costs nothing.

    Raises:
        InvalidRequestError: There are fewer than two.
    """
    if len(names) < _FEWEST:
        raise InvalidRequestError(
            "A kernel is what several fine-tunes have in common, and one was given. Name at least "
            "two fine-tunes of the base."
        )


def _kernel_tensor(
    gram_NN: NDArray[np.float64],
    c_N: NDArray[np.float64],
    *,
    weight: float,
    acceptance: float,
    found: Coherence,
) -> KernelTensor:
    return KernelTensor(
        weight=weight,
        coefficients=tuple(c_N.tolist()),
        consensus_norm=combined_norm(gram_NN, c_N),
        mean_norm=combined_norm(gram_NN, equal(len(c_N))),
        acceptance=acceptance,
        coherence=found,
    )


def _tensor_to_json(tensor: KernelTensor) -> dict[str, Any]:
    found = tensor.coherence
    return {
        "weight": tensor.weight,
        "coefficients": list(tensor.coefficients),
        "norm": tensor.norm,
        "acceptance": tensor.acceptance,
        "score": found.score,
        "pc1": found.pc1,
        "pc1_is_centred": found.centred,
        "cos_mean": found.cos_mean,
        "snr": found.snr,
    }
