"""A kernel as tables: by component, by layer, and the strategies side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from analysis.drawing import Drawing, Shape
from analysis.gram import TensorGram
from analysis.kernel.kernel import Kernel, KernelTensor
from analysis.kernel.robust import STRATEGIES
from analysis.selection import Component, component_of
from server.cli.analyze.output import Shown


def component_table(kernel: Kernel) -> Shown:
    """Returns FM Eq. 3's factors, the weights and the norms, by component."""
    groups = [
        *((component.value, {component}) for component in Component),
        ("attention", {one for one in Component if one.is_attention}),
        ("MLP", {one for one in Component if not one.is_attention}),
        ("all", {*Component, None}),
    ]
    rows = []
    for label, components in groups:
        found = [part for name, part in kernel.tensors.items() if component_of(name) in components]
        if found:
            rows.append((label, *_means(found)))
    columns = ("component", "T", "PC1", "cos", "SNR", "score", "w", "w range", "|K|")
    return Shown("Kernel by component: means over its T tensors", columns, rows)


def layer_table(kernel: Kernel) -> Shown | None:
    """Returns the weights by layer (FM appendix C), or None where no tensor has a layer."""
    layers = kernel.weights_per_layer()
    if not layers:
        return None
    return Shown(
        "Weights by layer", ("layer", "mean w"), [(str(layer), w) for layer, w in layers.items()]
    )


def strategies(grams: Sequence[TensorGram], *, whole_model: bool) -> dict[str, dict[str, Any]]:
    """Returns each strategy's coefficients, as means over tensors, and its consensus' norm."""
    grams_NN = [gram.gram_NN for gram in grams]
    joined_NN = np.sum(grams_NN, axis=0)
    found: dict[str, dict[str, Any]] = {}
    for name, kind in STRATEGIES.items():
        weigh = kind().coefficients
        whole_c_N = weigh(joined_NN)
        each_TN = [whole_c_N if whole_model else weigh(gram_NN) for gram_NN in grams_NN]
        squares = (
            float(c_N @ gram_NN @ c_N) for c_N, gram_NN in zip(each_TN, grams_NN, strict=True)
        )
        found[name] = {
            "coefficients": np.mean(each_TN, axis=0).tolist(),
            "norm": math.sqrt(max(0.0, sum(squares))),
        }
    return found


def strategy_table(found: dict[str, dict[str, Any]], names: Sequence[str]) -> Shown:
    """Returns the strategies side by side."""
    mean = found["mean"]["norm"]
    rows = [
        (
            name,
            *(round(c, 3) for c in entry["coefficients"]),
            entry["norm"] / mean if mean > 0 else None,
        )
        for name, entry in found.items()
    ]
    return Shown(
        "What each strategy gives each fine-tune (mean over tensors)",
        ("strategy", *names, "norm"),
        rows,
        ("Coefficients sum to 1. FM's kernel is the mean; the others keep outliers from it.",),
    )


def drawings(kernel: Kernel, found: Mapping[str, Mapping[str, Any]]) -> list[Drawing]:
    """Returns the weights by layer, and what `strategies` found."""
    layers = kernel.weights_per_layer()
    shares = {
        name: [entry["coefficients"][number] for entry in found.values()]
        for number, name in enumerate(kernel.names)
    }
    by_layer = Drawing(
        caption=f"Posterior means of the weights w (FM Eq. 3), T = {kernel.temperature:g}: means "
        "over each layer's tensors.",
        shape=Shape.BARS,
        x_title="layer",
        y_title="mean w",
        x=list(layers),
        series={"w": list(layers.values())},
    )
    by_strategy = Drawing(
        caption="What each strategy gives each fine-tune: means over tensors; they sum to 1.",
        shape=Shape.BARS,
        x_title="strategy",
        y_title="coefficient",
        x=list(found),
        series=shares,
    )
    return [by_layer, by_strategy] if layers else [by_strategy]


def notes(kernel: Kernel) -> list[str]:
    """Returns what a reader of the numbers must know."""
    found = [
        f"Metropolis-Hastings: {kernel.num_steps} steps after {kernel.burn_in}, T = "
        f"{kernel.temperature:g}, seed {kernel.seed}; {kernel.acceptance_ratio:.3f} of proposals "
        f"accepted. SNR of all tensors together {kernel.snr:.3f}, |K| {kernel.norm:.4g}.",
    ]
    uniform, cosine = kernel.uniform(), kernel.cosine_to_uniform
    if cosine is not None:
        beside = math.sqrt(max(0.0, 1 - cosine**2))
        found.append(
            f"Against uniform weights of equal |K|, {uniform.mean_weight:.4f} everywhere: cosine "
            f"{cosine:.6f}. So {beside:.2%} of K is the weighting's; the rest is the consensus "
            f"made smaller. The raw mean is {kernel.raw_mean().norm / kernel.norm:.3f} |K| long."
        )
    if not all(part.coherence.centred for part in kernel.tensors.values()):
        found.append("PC1 is uncentred here.")
    return found


def _means(found: Iterable[KernelTensor]) -> tuple[float | int | str, ...]:
    parts = list(found)
    weights = [part.weight for part in parts]
    scored = [part.coherence for part in parts]
    means = (
        fmean(one.pc1 for one in scored),
        fmean(one.cos_mean for one in scored),
        fmean(one.snr for one in scored),
        fmean(one.score for one in scored),
        fmean(weights),
    )
    return (
        len(parts),
        *(round(mean, 3) for mean in means),
        f"{min(weights):.3f}-{max(weights):.3f}",
        math.hypot(*(part.norm for part in parts)),
    )
