"""The report's sections on fine-tunes: norms, cosines, loadings, stability, kernel, diagnostics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.components import mean
from analysis.record import TensorStudy
from analysis.report import figures
from analysis.report.content import Figure, Section, Table, between
from analysis.selection import Component
from analysis.stability import CORE_COSINE


def fine_tune_sections(
    studies: Sequence[TensorStudy], summary: Mapping[str, Any]
) -> Iterable[Section]:
    """Yields what is said of each fine-tune, and of pairs of them."""
    yield _norms(studies, summary)
    names = summary["pairwise_cosine"]["names"]
    if len(names) > 1:
        yield _cosines(studies, summary)
    if any(study.loadings for study in studies):
        yield _loadings(studies, names)
    if any(study.loo_cosines for study in studies):
        yield _stability(studies, summary)
    if summary["kernel"] is not None:
        yield _kernel(summary["kernel"])
    yield _diagnostics(summary)


def _norms(studies: Sequence[TensorStudy], summary: Mapping[str, Any]) -> Section:
    variants: Mapping[str, Mapping[str, Any]] = summary["variants"]
    rows = [
        (
            name,
            row["delta_norm"],
            f"{row['delta_norm_min']:.3g} to {row['delta_norm_max']:.3g}",
            row["epsilon"],
            row["cos"],
            row["role"],
        )
        for name, row in variants.items()
    ]
    columns = ("fine-tune", "|Δ|", "over tensors", "ε", "cos to base", "role")
    layers = sorted({study.layer for study in studies if study.layer is not None})
    series = {
        name: [
            mean(study.epsilons[number] for study in studies if study.layer == layer)
            for layer in layers
        ]
        for number, name in enumerate(variants)
    }
    figure = Figure(
        caption="ε = |Δ| / |W| of BS Eq. 2, the mean of a layer's tensors.",
        label="A line over the layers for each fine-tune.",
        spec=figures.curves(layers, series, x_title="layer", y_title="ε"),
    )
    caption = (
        "FM tables 8 to 10: means over tensors, and the least and the largest. ε and the cosine to "
        "the base are those of BS Eq. 2 and 1. These are sums over all weights, without sampling "
        "error."
    )
    return Section(
        heading="Fine-tunes",
        figures=[figure] if layers else [],
        tables=[Table(caption=caption, columns=columns, rows=rows)],
    )


def _cosines(studies: Sequence[TensorStudy], summary: Mapping[str, Any]) -> Section:
    pairwise = summary["pairwise_cosine"]
    names, matrix, null = pairwise["names"], pairwise["matrix"], pairwise["null95"]
    cosines_TNN = np.array([study.cosines for study in studies])
    low_NN, high_NN = np.percentile(cosines_TNN, [2.5, 97.5], axis=0)
    rows = [
        (
            f"{names[i]} and {names[j]}",
            matrix[i][j],
            between((low_NN[i, j], high_NN[i, j])),
            null[i][j],
        )
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    figure = Figure(
        caption="Cosines between deltas, means over tensors.",
        label="A matrix of cosines between the fine-tunes' deltas.",
        spec=figures.heat_map(names, matrix),
    )
    caption = (
        "Means over tensors, where 95 % of the tensors lie, and what unrelated deltas stay below "
        "95 times in 100 in a tensor."
    )
    columns = ("deltas", "cosine", "95 % of tensors", "null")
    return Section(
        heading="Cosines between fine-tunes",
        figures=[figure],
        tables=[Table(caption=caption, columns=columns, rows=rows, folded=True)],
    )


def _loadings(studies: Sequence[TensorStudy], names: Sequence[str]) -> Section:
    present = [c.value for c in Component if any(study.component == c for study in studies)]
    series = {
        name: [
            mean(
                study.loadings[number]
                for study in studies
                if study.loadings and study.component == component
            )
            for component in present
        ]
        for number, name in enumerate(names)
    }
    alone = [study.name for study in studies if study.single_source is not None]
    figure = Figure(
        caption="Squared loadings of the centred PC1, means over tensors. A centred loading is at "
        "most 1 - 1/N.",
        label="Stacked bars of the fine-tunes' parts of PC1 for each projection.",
        spec=figures.bars(
            present,
            series,
            x_title="component",
            y_title="part of PC1",
            stacked=True,
            percent=True,
        ),
    )
    sentence = (
        f"In {len(alone)} of {len(studies)} tensors one fine-tune is PC1 (a squared loading above "
        "0.8, centred or not): there PC1 says how far that one moved, not what all share."
    )
    return Section(heading="Who makes PC1", sentences=[sentence], figures=[figure])


def _stability(studies: Sequence[TensorStudy], summary: Mapping[str, Any]) -> Section:
    variants: Mapping[str, Mapping[str, Any]] = summary["variants"]
    series = {
        name: [study.loo_cosines[number] for study in studies if study.loo_cosines]
        for number, name in enumerate(variants)
    }
    rows = []
    for name, row in variants.items():
        there = [value for value in series[name] if value is not None]
        spread = None if not there else tuple(np.percentile(there, [2.5, 97.5]))
        shift = row["pc1_shift"]
        rows.append((
            name, row["jackknife_cosine"], between(spread), row["jackknife_cosine_min"],
            None if shift is None else f"{100 * shift:+.1f} points", row["role"],
        ))  # fmt: skip
    columns = ("without", "cosine", "95 % of tensors", "least", "PC1's shift", "role")
    caption = (
        "PC1 without one fine-tune against PC1 with all (FM 4.6), raw and centred: cosine of the "
        f"two directions and shift of the share, means over tensors. Core: a mean of {CORE_COSINE} "
        "or more. With one fine-tune less a share rises even where nothing is shared."
    )
    figure = Figure(
        caption=f"Cosine of PC1 without each fine-tune to PC1 with all, a point for each tensor; "
        f"the line is {CORE_COSINE}.",
        label="A box over all tensors for each fine-tune that is left out.",
        spec=figures.spreads(series, y_title="cosine", line_at=CORE_COSINE),
    )
    return Section(
        heading="Stability",
        figures=[figure],
        tables=[Table(caption=caption, columns=columns, rows=rows)],
    )


def _kernel(kernel: Mapping[str, Any]) -> Section:
    weights = kernel["weights_per_layer"]
    figure = Figure(
        caption=f"Weights of FM Eq. 3 and 4, the mean of a layer's tensors: posterior means of "
        f"{kernel['num_steps']} Metropolis-Hastings steps after {kernel['burn_in']}, T = "
        f"{kernel['temperature']:g}. The line is 0.5, the weight of a tensor without any score.",
        label="A bar for each layer.",
        spec=figures.bars(
            list(range(len(weights))),
            {"weight": weights},
            x_title="layer",
            y_title="weight",
            line_at=0.5,
        ),
    )
    sentence = (
        f"Metropolis-Hastings accepted {kernel['acceptance_ratio']:.3f} of its proposals. The mean "
        f"weight is {kernel['weight']:.3f}, the kernel's norm {kernel['norm']:.4g}, and its "
        f"signal-to-noise ratio over all tensors {kernel['snr']:.3f}. FM's gain over the raw "
        "mean may be mere scaling: `linker analyze kernel` and `linker analyze eval` compare it "
        "with uniform weights of the same norm."
    )
    return Section(heading="Kernel", sentences=[sentence], figures=[figure] if weights else [])


def _diagnostics(summary: Mapping[str, Any]) -> Section:
    found = summary["diagnostics"]
    if not found:
        return Section(heading="Diagnostics", sentences=["Nothing stands out."])
    rows = [(one["kind"], one["model"], one["reason"]) for one in found]
    return Section(
        heading="Diagnostics",
        tables=[
            Table(
                caption="FM 4.4: what stands out, and why.",
                columns=("kind", "model", "reason"),
                rows=rows,
            )
        ],
    )
