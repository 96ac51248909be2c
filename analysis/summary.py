"""A family's study in one record: what a gauge, a page and a report show of it.

Legend: N fine-tunes, T tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from analysis.components import by_component, gap_per_layer, mean
from analysis.diagnostics import Diagnostic, diagnose
from analysis.kernel.metropolis import BURN_IN, NUM_STEPS, TEMPERATURE, sample_weights
from analysis.kernel.scores import coherence
from analysis.pca import signal_to_noise
from analysis.record import TensorStudy
from analysis.stability import role_of
from analysis.study import NUM_DRAWS


def summarise(
    studies: Sequence[TensorStudy],
    *,
    base: str,
    names: Sequence[str],
    seed: int,
    num_draws: int = NUM_DRAWS,
    kl_to_base: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Returns the summary of a study as plain JSON values; nothing in it is infinite or NaN.

    Means are over tensors, each counting once (FM's way), whatever its size.

    Args:
        studies: Of every tensor looked at, fresh or restored.
        base: The base's name.
        names: Of the N fine-tunes, in the studies' order.
        seed: Of the kernel's chains.
        num_draws: That the studies were made with; only told on.
        kl_to_base: As `diagnose`.
    """
    assert studies
    diagnostics = diagnose(studies, names=names, kl_to_base=kl_to_base)
    return {
        "base": base,
        "variants": {
            name: _variant(studies, number, [one for one in diagnostics if one.model == name])
            for number, name in enumerate(names)
        },
        "components": by_component(studies),
        "gap_per_layer": gap_per_layer(studies, field="pc1_centred"),
        "pairwise_cosine": _pairwise(studies, names),
        "kernel": _kernel(studies, seed) if len(names) > 1 else None,
        "shared_fraction": _shared_fraction(studies) if len(names) == 2 else None,
        "diagnostics": [one.to_json() for one in diagnostics],
        "num_tensors": len(studies),
        "method": {
            "seed": seed,
            "num_draws": num_draws,
            "null": "random signs per run and fine-tune",
            "interval": "basic bootstrap over runs, 95 %",
            "significance": "Benjamini-Hochberg at 5 % over all tensors",
            "dtypes": sorted({dtype for study in studies for dtype in study.dtypes}),
        },
    }


def _variant(
    studies: Sequence[TensorStudy], number: int, diagnostics: Sequence[Diagnostic]
) -> dict[str, Any]:
    norms = [study.norms[number] for study in studies]
    cosines = _there(study.loo_cosines[number] for study in studies if study.loo_cosines)
    role = role_of(cosines)
    return {
        "delta_norm": fmean(norms),
        "delta_norm_max": max(norms),
        "delta_norm_min": min(norms),
        "epsilon": fmean(study.epsilons[number] for study in studies),
        "cos": fmean(study.base_cosines[number] for study in studies),
        "loading": mean(study.loadings[number] for study in studies if study.loadings),
        "loading_uncentred": mean(
            study.loadings_uncentred[number] for study in studies if study.loadings_uncentred
        ),
        "jackknife_cosine": mean(cosines),
        "jackknife_cosine_min": min(cosines, default=None),
        "pc1_shift": mean(
            study.loo_pc1_shifts[number] for study in studies if study.loo_pc1_shifts
        ),
        "jackknife_cosine_uncentred": mean(
            study.loo_cosines_uncentred[number] for study in studies if study.loo_cosines_uncentred
        ),
        "role": None if role is None else role.value,
        "diagnostics": [{"kind": one.kind.value, "reason": one.reason} for one in diagnostics],
    }


def _pairwise(studies: Sequence[TensorStudy], names: Sequence[str]) -> dict[str, Any]:
    return {
        "mean": mean(study.cos_mean for study in studies),
        "matrix": np.mean([study.cosines for study in studies], axis=0).tolist(),
        "null95": np.mean([study.whole_null95 for study in studies], axis=0).tolist(),
        "names": list(names),
    }


def _kernel(studies: Sequence[TensorStudy], seed: int) -> dict[str, Any]:
    grams_TNN = np.array([study.whole_gram for study in studies])
    scores_T = np.array([coherence(gram_NN).score for gram_NN in grams_TNN])
    chain = sample_weights(scores_T, seed=seed)
    layers: dict[int, list[float]] = {}
    for study, weight in zip(studies, chain.mean_T.tolist(), strict=True):
        if study.layer is not None:
            layers.setdefault(study.layer, []).append(weight)
    squares_T = np.clip(grams_TNN.mean(axis=(1, 2)), 0.0, None)  # ‖mean Δ‖² of each tensor
    return {
        "acceptance_ratio": chain.acceptance_ratio,
        "temperature": TEMPERATURE,
        "num_steps": NUM_STEPS,
        "burn_in": BURN_IN,
        "weight": fmean(chain.mean_T.tolist()),
        "weights_per_layer": [
            mean(layers.get(layer, ())) for layer in range(1 + max(layers, default=-1))
        ],
        "snr": signal_to_noise(grams_TNN.sum(axis=0)),
        "norm": math.sqrt(float(np.sum(chain.mean_T**2 * squares_T))),
    }


def _shared_fraction(studies: Sequence[TensorStudy]) -> dict[str, Any]:
    """FM appendix B, by cos² (see `analysis.study`)."""
    shares = _there(study.shared_fraction for study in studies)
    return {
        "mean": fmean(shares),
        "std": float(np.std(shares)),
        "null95": mean(study.shared_null95 for study in studies),
        "components": {
            component: mean(
                study.shared_fraction for study in studies if study.component == component
            )
            for component in dict.fromkeys(study.component for study in studies)
            if component is not None
        },
    }


def _there(values: Any) -> list[float]:
    return [value for value in values if value is not None]
